"""Cells as one tidy table: `frame`, and `Results`, which shows, selects and saves them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import pandas as pd

from colqwen_lab import analysis
from colqwen_lab.analysis import render
from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.hardware import gpu_of
from colqwen_lab.records import MIB, Cell, Environment, Memory, Work, read_cells, write_cells
from colqwen_lab.settings import writable_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATUSES = ("ok", "oom", "failed")

# The tidy frame: column -> where a cell holds it. Settings first: cells of a series share them all.
SETTINGS = {
    "variant": "variant",
    "size": "size",
    "workload": "workload.kind",
    "visual_tokens": "workload.visual_tokens",
    "execution": "execution",
    "protocol": "protocol",
    "origin": "origin",
    "weights": "weights",
    "kernel": "backend.requested",
    "texts": "workload.texts",  # for pages: the pages
    "card": "card.name",  # the memory cap
    "device": "environment.device",
}
OUTCOME = {
    "status": "status",  # ok, oom or failed
    "reason": "reason",
    "dtype": "backend.dtype",
    "started_at": "environment.started_at",
}
FIGURES = {
    "batch_size": "workload.batch_size",
    "items_per_s": "items_per_s.median",
    "low": "items_per_s.low",  # the 95 % interval of items_per_s
    "high": "items_per_s.high",
    "tokens": "workload.tokens",  # padded tokens of the longest batch
    "padded_share": "workload.padded_share",
    "vision_encoder_s": "stages.vision_encoder_s",
    "language_model_s": "stages.language_model_s",
    "preprocess_s": "workload.preprocess_s",  # one page, outside the step
    "index_bytes": "workload.index_bytes",  # the embeddings of one page
    "weights_bytes": "memory.weights_bytes",
    "peak_bytes": "memory.peak_bytes",
    "reserved_bytes": "memory.reserved_bytes",
    "device_bytes": "memory.device_bytes",
    "flops": "work.flops",  # one step
    "min_bytes": "work.min_bytes",
}
COLUMNS = SETTINGS | OUTCOME | FIGURES
# Columns of the screen: name -> (column of the frame, factor). Pages have the second group too.
SCREEN = {"items/s": ("items_per_s", 1), "low": ("low", 1), "high": ("high", 1)}
PAGE_SCREEN = {
    "tokens/s": ("tokens_per_s", 1),
    "vision encoder ms": ("vision_encoder_s", 1e3),
    "language model ms": ("language_model_s", 1e3),
    "preprocessing ms a page": ("preprocess_s", 1e3),
    "index kB a page": ("index_bytes", 1e-3),
}
LABELS = {"visual_tokens": "{} visual tokens", "card": "{} cap"}


def frame(cells: Iterable[Cell]) -> pd.DataFrame:
    """A tidy frame, one row a cell, in seconds, bytes and items per second.

    Its columns are those of SETTINGS, OUTCOME and FIGURES, and `tokens_per_s` (padding included),
    `kernels_used` (kernel x text linears) and `interference` (what disturbed the measurement).
    """
    rows = [
        {name: _value(cell, name) for name in COLUMNS}
        | {"kernels_used": kernels(cell), "interference": "; ".join(cell.interference) or None}
        for cell in cells
    ]
    table = pd.DataFrame(rows, columns=[*COLUMNS, "kernels_used", "interference"])
    table = table.astype({name: float for name in FIGURES if table[name].dtype == object})
    return table.assign(tokens_per_s=table["items_per_s"] * table["tokens"])


def _value(cell: Cell, column: str) -> Any:
    value: Any = cell
    for name in COLUMNS[column].split("."):
        value = getattr(value, name, None)
    if column == "texts":
        value = cell.workload.pages or value or "texts not recorded"
        # Without a tokenizer the ids are random; a cell that failed early does not say so.
        return "report" if value.endswith("at the report's lengths") else value
    return value


@dataclass(frozen=True)
class Series:
    """Cells that differ in the batch size only, in its order. `label` is unique in its results."""

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
        """The ok cells with items per second by batch size; of a repeated batch the last one."""
        return {cell.batch_size: cell for cell in self._ok if cell.items_per_s}

    @cached_property
    def sized(self) -> dict[int, Cell]:
        """The ok cells with a peak by batch size."""
        return {cell.batch_size: cell for cell in self._ok if cell.memory}

    @property
    def failed(self) -> list[Cell]:
        """The cells that ran out of memory or failed."""
        return [cell for cell in self.cells if cell.status != "ok"]

    @property
    def repeated(self) -> list[int]:
        """The batch sizes with more than one ok cell."""
        return [batch for batch, n in Counter(c.batch_size for c in self._ok).items() if n > 1]

    @property
    def _ok(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.status == "ok"]

    def to_dict(self) -> dict[str, Any]:
        """The series ready for JSON: its settings, kernels, batch sizes, and what failed."""
        return {
            "label": self.label,
            **{name: _value(self.first, name) for name in SETTINGS},
            "kernels_used": sorted({name for cell in self.cells for name in cell.backend.engaged}),
            "batch_sizes": [cell.batch_size for cell in self.cells],
            "disturbed": [cell.batch_size for cell in self.cells if cell.interference],
            "not_ok": [
                {"batch_size": cell.batch_size, "status": cell.status, "reason": cell.reason}
                for cell in self.failed
            ],
        }


#: Base and the series to compare with it.
Pair = tuple[Series, Series]


@dataclass(frozen=True, repr=False)
class Results:
    """Cells, measured, predicted or published; `results[0]` is a cell, `results["awq"]` Results."""

    cells: tuple[Cell, ...]

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """The cells of a records file, or of the report for the word `published`.

        Raises:
            BadInput: no such file, or not a records file.
        """
        return cls(tuple(read_cells(source)))

    def save(self, path: str | Path) -> Path:
        """Write the cells to a new records file; returns its path.

        Raises:
            BadInput: the file holds rows already, or cannot be written.
        """
        path = Path(path)
        writable_folder(path.parent)
        write_cells(path, self.cells)
        return path

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    @overload
    def __getitem__(self, key: int) -> Cell: ...
    @overload
    def __getitem__(self, key: str | slice) -> Self: ...
    def __getitem__(self, key: int | str | slice) -> Cell | Self:
        if isinstance(key, str):
            return self.select(variant=key)
        return type(self)(self.cells[key]) if isinstance(key, slice) else self.cells[key]

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants, in the order of their first cell."""
        return tuple(dict.fromkeys(cell.variant for cell in self.cells))

    def select(self, **criteria: Any) -> Self:
        """The cells that meet all criteria, such as variant="awq", protocol="lean", status="ok".

        Raises:
            BadInput: an unknown criterion, or a value that no cell has.
        """
        cells = self.cells
        for name, wanted in criteria.items():
            one_of("criterion", name, [*SETTINGS, "status"])
            values = [str(_value(cell, name)) for cell in self.cells]
            one_of(name, str(wanted), STATUSES if name == "status" else dict.fromkeys(values))
            cells = tuple(cell for cell in cells if str(_value(cell, name)) == str(wanted))
        return type(self)(cells)

    def series(self) -> tuple[Series, ...]:
        """The cells by settings; a label is the variant and the settings that tell it apart."""
        groups: dict[tuple[str, ...], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(tuple(_label(cell, name) for name in SETTINGS), []).append(cell)
        series = []
        for key, cells in groups.items():
            columns = zip(*(other for other in groups if other[0] == key[0]), strict=True)
            parts = [own for own, column in zip(key, columns, strict=True) if len({*column}) > 1]
            label = f"{key[0]} ({', '.join(parts)})" if parts else key[0]
            series.append(Series(label, tuple(sorted(cells, key=lambda c: c.batch_size))))
        return tuple(series)

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame in raw units, one row a cell: see `frame`."""
        return frame(self.cells)

    def to_csv(self, path: str | Path) -> Path:
        """Write `to_frame()` as CSV; returns the path. Raises BadInput if it cannot be written."""
        path = Path(path)
        try:
            self.to_frame().to_csv(path, index=False)
        except OSError as error:
            raise BadInput(
                f"cannot write {path}: {error.strerror}; name a file in a folder you can write"
            ) from None
        return path

    def table(self) -> pd.DataFrame:
        """One row a cell, rounded for the screen; a missing figure is "-" and has its reason."""
        raw = self.to_frame()
        counts = raw.groupby("variant")[list(SETTINGS)].nunique(dropna=False)
        varied = [name for name in SETTINGS if name != "origin" and (counts[name] > 1).any()]
        pages = PAGE_SCREEN if (raw["workload"] == "pages").any() else {}
        figures = SCREEN | pages | {"peak MiB": ("peak_bytes", 1 / MIB)}
        table = raw[["variant", "batch_size", *varied, "origin"]].rename(
            columns={"batch_size": "batch"}
        )
        for name, (column, factor) in figures.items():
            table[name] = (raw[column] * factor).map(render.rounded)
        table["status"] = raw["status"]
        table["reason"] = list(map(_reason, self.cells))
        table["kernel"] = raw["kernels_used"]
        if raw["interference"].notna().any():
            table["disturbed by"] = raw["interference"]
        return render.screen(table)

    def plot(self, kind: str = "throughput", **options: Any) -> Figure:
        """A figure: throughput, memory (with `cards=(8, 12)` in GB), tradeoff or roofline.

        Raises:
            BadInput: an unknown kind, or a roofline of cells without work (use predictions).
        """
        kinds = analysis.plots.KINDS
        return kinds[one_of("plot", kind, kinds)](self.series(), **options)

    def __repr__(self) -> str:
        return f"{conditions(self.cells)}\n{render.text(self.table(), 100)}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(conditions(self.cells))}</p>" + render.html(self.table())


def pick(results: Results, variants: str | Sequence[str], what: str) -> Series:
    """The only series of the only one of `variants`; `what` names the argument in the error.

    Raises:
        BadInput: none, or more than one.
    """
    wanted = [variants] if isinstance(variants, str) else variants
    matching = [series for series in results.series() if series.variant in wanted]
    if len(matching) != 1:
        labels = "; ".join(series.label for series in results.series()) or "no cell"
        raise BadInput(f"{what} must hold one series, got {labels}; narrow it with .select(...)")
    return matching[0]


# ---------------------------------------------------------------- cells


def rate(cell: Cell) -> float:
    """Items per second of a cell that has them."""
    assert cell.items_per_s is not None
    return cell.items_per_s.median


def memory_of(cell: Cell) -> Memory:
    """The memory of a cell that has it."""
    assert cell.memory is not None
    return cell.memory


def peak(cell: Cell) -> int:
    """Peak bytes of a cell that has them."""
    return memory_of(cell).peak_bytes


def unit(cell: Cell) -> str:
    """`queries/s` or `pages/s`."""
    return f"{cell.workload.kind}/s"


def kernels(cell: Cell) -> str | None:
    """The kernels used, each with its number of text linears; None if not recorded."""
    used = cell.backend.engaged
    return ", ".join(f"{name} x {layers}" for name, layers in used.items()) or None


def random_weights(cell: Cell) -> bool:
    """Whether the weights are random: speed and memory hold, embeddings mean nothing."""
    return cell.weights.startswith("random") or "untrained" in cell.weights


def disturbed(cells: Iterable[Cell]) -> int:
    """The number of cells whose measurement was disturbed: they give no verdict."""
    return sum(bool(cell.interference) for cell in cells)


def device(environment: Environment) -> str:
    """The device as a title names it; a machine without a GPU says CPU."""
    name = environment.device
    return name if environment.gpu or "CPU" in name or not environment.cpu else f"CPU {name}"


def limit_of(cell: Cell, work: Work | None) -> tuple[float | None, str]:
    """`(items per second at most, origin)`: from rates of the same run, else the data sheet.

    None for 8-bit GEMMs, which have other limits, and where none is known.
    """
    if work is None or cell.configuration.eight_bit:
        return None, ""
    if cell.limits:
        flops_per_s, bytes_per_s = cell.limits.flops_per_s, cell.limits.bytes_per_s
    elif gpu := gpu_of(cell.environment.device, cell.environment.gpu_memory_bytes):
        flops_per_s, bytes_per_s = gpu.flops(), gpu.bandwidth_gb_s * 1e9
    else:
        return None, ""
    seconds = max(work.flops / flops_per_s, work.min_bytes / bytes_per_s)
    return cell.batch_size / seconds, "measured in the run" if cell.limits else "data sheet"


def conditions(cells: Iterable[Cell]) -> str:
    """Where figures come from, for titles: origin, device, settings and kernels."""
    cells = list(cells)
    names = ("origin", "device", "size", "workload", "visual_tokens", "execution", "protocol")
    parts = [[_label(c, name) for c in cells if _value(c, name)] for name in (*names, "card")]
    parts[1] = [device(cell.environment) for cell in cells]
    parts[6] = [f"protocol {cell.protocol}" for cell in cells]
    used = [name for cell in cells for name in cell.backend.engaged]
    parts += [[f"kernel {name}" for name in used if name != "torch.nn.Linear"]]
    parts += [["random weights"] if any(map(random_weights, cells)) else []]
    return " · ".join(" and ".join(dict.fromkeys(part)) for part in parts if part)


def _label(cell: Cell, name: str) -> str:
    return LABELS.get(name, "{}").format(_value(cell, name) or "no")


def _reason(cell: Cell) -> str:
    """Why a cell lacks a figure; empty if it lacks none."""
    if cell.status != "ok":
        return cell.reason or f"{cell.status}, no reason recorded"
    reasons = [] if cell.items_per_s else ["no rate"]
    if cell.items_per_s and cell.items_per_s.low is None:
        samples = "fewer than 6 samples" if cell.step_s else "no samples kept"
        reasons.append(f"no interval: {samples}")
    return cell.reason or "; ".join(reasons + ([] if cell.memory else ["no peak"]))
