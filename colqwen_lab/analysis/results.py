"""Cells as a person meets them: `Results`, shown as a table and plotted, and `Series`, what a line in a plot is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from colqwen_lab.errors import BadInput, one_of, printable
from colqwen_lab.records import MIB, Cell, Environment, read_cells, write_cells
from colqwen_lab.settings import writable_folder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STATUSES = ("ok", "oom", "failed")
EIGHT_BIT = ("fp8", "w4-fp8", "w4-int8")

#: What tells one series from another, in the order in which a label names it.
CRITERIA: dict[str, Callable[[Cell], str]] = {
    "variant": lambda cell: cell.variant,
    "size": lambda cell: cell.size,
    "workload": lambda cell: cell.workload.kind,
    "visual_tokens": lambda cell: f"{cell.workload.visual_tokens or 'no'} visual tokens",
    "execution": lambda cell: cell.execution,
    "protocol": lambda cell: cell.protocol,
    "origin": lambda cell: cell.origin,
    "weights": lambda cell: cell.weights,
    "backend": lambda cell: cell.backend.requested,
    "texts": lambda cell: (
        cell.workload.pages or _texts(cell.workload.texts or "texts not recorded")
    ),
    "card": lambda cell: f"{cell.card.name} cap" if cell.card else "no cap",
    "device": lambda cell: cell.environment.device,
}

#: What a table says of pages beside their rate: the tower and the rest of a step, and what is outside of it, a page.
PAGE_COLUMNS: dict[str, Callable[[Cell], float | None]] = {
    "tokens/s": lambda cell: _tokens_per_s(cell),
    "vision ms": lambda cell: 1e3 * cell.stages.vision_encoder_s if cell.stages else None,
    "decoder ms": lambda cell: 1e3 * cell.stages.language_model_s if cell.stages else None,
    "preprocessing ms a page": lambda cell: (
        1e3 * cell.workload.preprocess_s if cell.workload.preprocess_s else None
    ),
    "index kB a page": lambda cell: (
        cell.workload.index_bytes / 1e3 if cell.workload.index_bytes else None
    ),
}


def _tokens_per_s(cell: Cell) -> float | None:
    """Padding included, as the device computes it."""
    return (
        cell.items_per_s.median * cell.workload.tokens
        if cell.items_per_s and cell.workload.tokens
        else None
    )


def _texts(recorded: str) -> str:
    """The texts asked for: a cell that failed before its batch was made does not say that ids were drawn instead."""
    return "report" if recorded.startswith("drawn") else recorded


@dataclass(frozen=True)
class Series:
    """Cells that differ in nothing but the batch size, in its order. `label` is unique among its neighbours."""

    label: str
    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        return self.cells[0]

    @property
    def variant(self) -> str:
        return self.first.variant

    @cached_property
    def rated(self) -> dict[int, Cell]:
        """The ok cells with items per second, by batch size. Of a batch measured twice the last counts."""
        return {
            cell.batch_size: cell for cell in self.cells if cell.status == "ok" and cell.items_per_s
        }

    @cached_property
    def sized(self) -> dict[int, Cell]:
        """The ok cells with a peak, by batch size."""
        return {cell.batch_size: cell for cell in self.cells if cell.status == "ok" and cell.memory}

    @property
    def lost(self) -> list[Cell]:
        """The cells that ran out of memory or failed."""
        return [cell for cell in self.cells if cell.status != "ok"]

    def describe(self) -> dict[str, Any]:
        """The series in words, ready for JSON: what ran, where, and which cells gave no figure."""
        engaged = sorted({kernel for cell in self.cells for kernel in cell.backend.engaged})
        lost = [
            {"batch_size": cell.batch_size, "status": cell.status, "reason": cell.reason}
            for cell in self.lost
        ]
        named = {name: read(self.first) for name, read in CRITERIA.items()}
        batches = [cell.batch_size for cell in self.cells]
        return {
            "label": self.label,
            **named,
            "engaged": engaged,
            "batch_sizes": batches,
            "not_ok": lost,
        }


@dataclass(frozen=True, repr=False)
class Results:
    """Cells of a sweep, a prediction or the published report: `.table()`, `.plot()`, `.select(...)`, `.save(path)`."""

    cells: tuple[Cell, ...]

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """The cells of a records file, or of the report for the word `published`.

        Raises:
            BadInput: no such file, or not a records file.
        """
        return cls(tuple(read_cells(source)))

    def save(self, path: str | Path) -> Path:
        """Write the cells as JSON lines, in place of what the file held; the file's path.

        Raises:
            BadInput: the file cannot be written, or a sweep holds it.
        """
        path = Path(path)
        writable_folder(path.parent)
        write_cells(path, self.cells)
        return path

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants, in the order of their first cell."""
        return tuple(dict.fromkeys(cell.variant for cell in self.cells))

    def select(self, **criteria: str) -> Self:
        """The cells that meet all criteria: variant, size, workload, execution, protocol, status, origin, ...

        Raises:
            BadInput: an unknown criterion, or a value that no cell has; the valid ones are named.
        """
        cells = self.cells
        for name, value in criteria.items():
            if one_of("criterion", name, [*CRITERIA, "status"]) == "status":
                one_of("status", value, STATUSES)
                cells = tuple(cell for cell in cells if cell.status == value)
            else:
                one_of(name, value, dict.fromkeys(map(CRITERIA[name], self.cells)))
                cells = tuple(cell for cell in cells if CRITERIA[name](cell) == value)
        return type(self)(cells)

    def series(self) -> tuple[Series, ...]:
        """The cells cut into series. A label is the variant, and whatever else tells its series apart."""
        found: dict[tuple[str, ...], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(tuple(read(cell) for read in CRITERIA.values()), []).append(cell)
        return tuple(
            Series(
                _label(key, [other for other in found if other[0] == key[0]]),
                tuple(sorted(cells, key=_by_batch)),
            )
            for key, cells in found.items()
        )

    def table(self) -> pd.DataFrame:
        """One row a cell, rounded for the screen. Where a figure is missing, `reason` says why."""
        import pandas as pd

        of_variant = [
            [cell for cell in self.cells if cell.variant == variant] for variant in self.variants
        ]
        varied = [
            name
            for name, read in CRITERIA.items()
            if any(len({*map(read, cells)}) > 1 for cells in of_variant)
        ]
        columns = ["variant", "batch", *varied, *(["origin"] if "origin" not in varied else [])]
        pages = [*PAGE_COLUMNS] if any(cell.workload.kind == "pages" for cell in self.cells) else []
        figures = ["items/s", "low", "high", *pages, "peak MiB", "status", "reason", "kernel"]
        figures += ["noticed"] if any(cell.interference for cell in self.cells) else []
        return pd.DataFrame(
            [_row(cell, varied) for cell in self.cells], columns=[*columns, *figures]
        )

    def plot(self, kind: str = "throughput", **options: Any) -> Figure:
        """A figure: `throughput`, `memory` (with `cards=(8, 12)` in GB), `tradeoff` or `roofline`.

        A roofline is of cells that carry their work: `lab.explain(results).plot("roofline")`.

        Raises:
            BadInput: an unknown kind.
        """
        from colqwen_lab.analysis import plots

        return plots.KINDS[one_of("plot", kind, plots.KINDS)](self.series(), **options)

    def __repr__(self) -> str:
        head = f"{len(self)} cells, {', '.join(self.variants) or 'no variant'}"
        return printable("\n".join([head, *map(line, self.cells)]))

    def _repr_html_(self) -> str:
        return f"<p>{escape(conditions(self.cells))}</p>" + html_table(self.table())


def pick(results: Results, variant: str | None, what: str) -> Series:
    """The one series of `variant` in `results`; `what` names the argument in the error.

    Raises:
        BadInput: none, or more than one; what there is is named.
    """
    found = results.series()
    matching = [series for series in found if series.variant == variant]
    if len(matching) != 1:
        there = "; ".join(series.label for series in found) or "no cell"
        wanted = f"one series of {variant}" if matching else "one series"
        raise BadInput(
            f"{what} must hold {wanted}, and holds: {there}; narrow it with .select(...)"
        )
    return matching[0]


def line(cell: Cell) -> str:
    """A cell in one line, as progress and `repr` show it."""
    head = (
        f"{cell.variant} {cell.size} {cell.workload.kind} batch {cell.batch_size} ({cell.origin}):"
    )
    if cell.status != "ok":
        return f"{head} {cell.status}: {cell.reason or 'no reason recorded'}"
    rate, memory = cell.items_per_s, cell.memory
    parts = [f"{short(rate.median)} {unit(cell)}" if rate else "no rate"]
    if rate and rate.low and rate.high:
        parts[0] += f" [{short(rate.low)} to {short(rate.high)}]"
    parts.append(f"peak {mib(memory.peak_bytes)}" if memory else "no peak")
    parts += [kernels(cell)] if cell.backend.engaged else []
    return f"{head} {', '.join(parts)}"


def conditions(cells: Sequence[Cell]) -> str:
    """Where figures come from, for titles: origin, device, size, workload, execution, protocol, cap, kernels."""
    parts: list[list[str]] = [
        [cell.origin for cell in cells],
        [device(cell.environment) for cell in cells],
    ]
    parts += [
        [read(cell) for cell in cells]
        for name, read in CRITERIA.items()
        if name in ("size", "workload")
    ]
    parts += [[CRITERIA["visual_tokens"](cell) for cell in cells if cell.workload.visual_tokens]]
    parts += [[cell.execution for cell in cells], [f"protocol {cell.protocol}" for cell in cells]]
    parts += [[f"under a {cell.card.name} cap" for cell in cells if cell.card]]
    parts += [
        [
            f"kernel {name}"
            for cell in cells
            for name in cell.backend.engaged
            if name != "torch.nn.Linear"
        ]
    ]
    parts += [["untrained weights"]] if any(random_weights(cell) for cell in cells) else []
    return " · ".join(" and ".join(dict.fromkeys(part)) for part in parts if part)


def way(series: Series) -> str:
    """EXECUTION/PROTOCOL/BACKEND, as a sweep takes it."""
    first = series.first
    return f"{first.execution}/{first.protocol}/{first.backend.requested}"


def random_weights(cell: Cell) -> bool:
    """Whether the weights were drawn, not trained: speed and memory hold, embeddings mean nothing."""
    return cell.weights.startswith("random") or "untrained" in cell.weights


def device(environment: Environment) -> str:
    """The device as a title names it: one without a GPU says CPU."""
    name = environment.device
    return name if environment.gpu or "CPU" in name or not environment.cpu else f"CPU {name}"


def eight_bit(cell: Cell) -> bool:
    """Whether its activations were asked for in 8 bits."""
    return cell.backend.requested in EIGHT_BIT


def unit(cell: Cell) -> str:
    """`queries/s` or `pages/s`."""
    return f"{cell.workload.kind}/s"


def short(value: float) -> str:
    """A figure for a sentence: three significant digits, from 100 on the whole number."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def mib(amount_bytes: float) -> str:
    """Bytes in MiB for a sentence."""
    return f"{short(amount_bytes / MIB)} MiB"


def in_mib(amount_bytes: int | None) -> float | None:
    """Bytes in MiB for a table."""
    return (
        None
        if amount_bytes is None
        else round(amount_bytes / MIB, 1 if abs(amount_bytes) > 100 * MIB else 3)
    )


def kernels(cell: Cell) -> str:
    """The kernels that engaged, each with the number of its text linears."""
    return (
        ", ".join(f"{name} x {layers}" for name, layers in cell.backend.engaged.items())
        or "not recorded"
    )


def html_table(frame: pd.DataFrame) -> str:
    """A frame as an HTML table, everything escaped; a missing figure is a dash."""
    import pandas as pd

    with pd.option_context("display.max_colwidth", None):
        return frame.to_html(index=False, na_rep="-", border=0)


def rounded(value: float | None) -> float | None:
    """Four significant digits below 1,000, one decimal above."""
    return (
        None if value is None else float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)
    )


def _by_batch(cell: Cell) -> int:
    return cell.batch_size


def _label(key: tuple[str, ...], siblings: Sequence[tuple[str, ...]]) -> str:
    differing = [
        value for value, *values in zip(key, *siblings, strict=True) if len(set(values)) > 1
    ]
    return f"{key[0]} ({', '.join(differing)})" if differing else key[0]


def _row(cell: Cell, varied: Sequence[str]) -> dict[str, Any]:
    rate, memory = cell.items_per_s, cell.memory
    return {
        "variant": cell.variant,
        "batch": cell.batch_size,
        "origin": cell.origin,
        **{name: CRITERIA[name](cell) for name in varied},
        "items/s": rounded(rate.median) if rate else None,
        "low": rounded(rate.low) if rate else None,
        "high": rounded(rate.high) if rate else None,
        **{name: rounded(read(cell)) for name, read in PAGE_COLUMNS.items()},
        "peak MiB": in_mib(memory.peak_bytes if memory else None),
        "status": cell.status,
        "reason": cell.reason or _missing(cell),
        "kernel": kernels(cell),
        "noticed": "; ".join(cell.interference),
    }


def _missing(cell: Cell) -> str:
    """Why an ok cell lacks a figure; empty where it lacks none."""
    rate, memory = cell.items_per_s, cell.memory
    lacks = {
        f"{cell.status}, no reason recorded": cell.status != "ok",
        "no rate": cell.status == "ok" and rate is None,
        "no interval: no samples kept": rate is not None and rate.low is None and not cell.step_s,
        "no interval: fewer than 6 samples": rate is not None
        and rate.low is None
        and bool(cell.step_s),
        "no peak": cell.status == "ok" and memory is None,
    }
    return "; ".join(why for why, holds in lacks.items() if holds)


def repeated(series: Series) -> list[int]:
    """The batch sizes that have more than one ok cell."""
    return [
        batch
        for batch, n in Counter(
            cell.batch_size for cell in series.cells if cell.status == "ok"
        ).items()
        if n > 1
    ]
