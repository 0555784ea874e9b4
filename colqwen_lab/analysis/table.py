"""Cells as one tidy table: `frame`, and `Results`, which shows, selects and saves them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from colqwen_lab import analysis
from colqwen_lab.analysis import render
from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.hardware import gpu_of
from colqwen_lab.records import Cell, Environment, Limits, Memory, Work, read_cells, write_cells
from colqwen_lab.settings import DATA, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The columns of the tidy frame: path in a cell, role, name and factor on the screen.
COLUMNS = pd.read_csv(DATA / "columns.csv", index_col="column")
PATHS = COLUMNS["path"].dropna().to_dict()
ROLES = COLUMNS.groupby("role").groups
SETTINGS = [*ROLES["setting"]]  # cells of a series share them
STATUSES = ("ok", "oom", "failed")
MOST_SERIES = 200
LABELS = {"visual_tokens": "{} visual tokens", "card": "{} cap"}


def frame(cells: Iterable[Cell]) -> pd.DataFrame:
    """A tidy frame, one row a cell, in raw units; `data/columns.csv` describes its columns."""
    rows = [{column: value(cell, column) for column in PATHS} for cell in cells]
    table = pd.DataFrame(rows, columns=[*PATHS])
    numbers = [*ROLES["figure"], *ROLES["page figure"], *ROLES["cost"]]
    figures = table.columns.intersection(numbers)
    table[figures] = table[figures].apply(pd.to_numeric)
    return table.assign(tokens_per_s=table["items_per_s"] * table["tokens"])


def on_screen(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Columns of a tidy frame as a screen shows them: names, units, rounded, "-" where missing."""
    columns = {}
    for name, header, factor in COLUMNS.loc[[*names], ["screen", "factor"]].itertuples():
        raw = table[name]
        if header.endswith("MiB"):
            columns[header] = raw.astype(float).map(render.in_mib, "ignore")
        else:
            plain = pd.isna(factor)
            columns[header] = raw if plain else (raw.astype(float) * factor).map(render.rounded)
    return render.screen(columns)


def value(cell: Cell, column: str) -> Any:
    """The value of a cell in a column of the tidy frame, or of a field of its environment.

    Lists and dicts are one text.
    """
    item: Any = cell
    for name in PATHS.get(column, f"environment.{column}").split("."):
        item = getattr(item, name, None)
    if column == "texts":
        item = cell.workload.pages or item or "texts not recorded"
        # Without a tokenizer the ids are random; a cell that failed early does not say so.
        return "report" if item.endswith("at the report's lengths") else item
    if isinstance(item, dict):
        item = [", ".join(f"{name} x {layers}" for name, layers in item.items())]
    return ("; ".join(item) or None) if isinstance(item, list) else item


class Series:
    """Cells that differ in the batch size only, in its order. `label` is unique in its results.

    `rated` and `sized` are the ok cells with items per second or a peak by batch size, of a
    repeated batch the last one; `failed` cells ran out of memory or failed.
    """

    def __init__(self, label: str, cells: tuple[Cell, ...]) -> None:
        self.label, self.cells, self.first = label, cells, cells[0]
        self.variant = self.first.variant
        ok = [cell for cell in cells if cell.status == "ok"]
        self.rated = {cell.batch_size: cell for cell in ok if cell.items_per_s}
        self.sized = {cell.batch_size: cell for cell in ok if cell.memory}
        self.failed = [cell for cell in cells if cell.status != "ok"]

    def to_dict(self) -> dict[str, Any]:
        """The series ready for JSON: its settings, kernels, batch sizes, and what failed."""
        return {
            "label": self.label,
            **{name: value(self.first, name) for name in SETTINGS},
            "kernels_used": sorted({name for cell in self.cells for name in cell.backend.engaged}),
            "batch_sizes": [cell.batch_size for cell in self.cells],
            "disturbed": [cell.batch_size for cell in self.cells if cell.disturbed],
            "not_ok": [
                {name: value(cell, name) for name in ("batch_size", "status", "reason")}
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
    def load(cls, source: str | Path) -> Results:
        """The cells of a records file, or of the report for `published`; see `read_cells`."""
        return cls(tuple(read_cells(source)))

    def save(self, path: str | Path) -> Path:
        """Write the cells to a new records file; returns its path. See `write_cells`."""
        write_cells(Path(path), self.cells)
        return Path(path)

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, str):
            return self.select(variant=key)
        return Results(self.cells[key]) if isinstance(key, slice) else self.cells[key]

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants, in the order of their first cell."""
        return tuple(dict.fromkeys(cell.variant for cell in self.cells))

    def select(self, **criteria: Any) -> Results:
        """The cells that meet all criteria, such as variant="awq", protocol="lean", status="ok".

        Raises BadInput for an unknown criterion, or a value that no cell has.
        """
        cells = self.cells
        for name, wanted in criteria.items():
            one_of("criterion", name, [*SETTINGS, "status"])
            values = [str(value(cell, name)) for cell in self.cells]
            one_of(name, str(wanted), STATUSES if name == "status" else dict.fromkeys(values))
            cells = tuple(cell for cell in cells if str(value(cell, name)) == str(wanted))
        return Results(cells)

    def series(self) -> tuple[Series, ...]:
        """The cells by settings; a label is the variant and the settings that tell it apart."""
        groups = defaultdict[tuple[str, ...], list[Cell]](list)
        variants = defaultdict[str, list[tuple[str, ...]]](list)
        for cell in self.cells:
            own = (LABELS.get(n, "{}").format(value(cell, n) or "no") for n in SETTINGS)
            groups[tuple(own)].append(cell)
        for settings in groups:
            variants[settings[0]].append(settings)
        varied = {
            variant: [len({*column}) > 1 for column in zip(*rows, strict=True)]
            for variant, rows in variants.items()
        }
        series = []
        for settings, cells in groups.items():
            variant, parts = settings[0], ", ".join(compress(settings, varied[settings[0]]))
            cells.sort(key=lambda cell: cell.batch_size)
            series.append(Series(f"{variant} ({parts})" if parts else variant, tuple(cells)))
        return tuple(series)

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame in raw units, one row a cell: see `frame`."""
        return frame(self.cells)

    def to_csv(self, path: str | Path | None = None) -> Path | str:
        """`to_frame()` as CSV text, or the path of the file it is written to.

        Raises BadInput if it cannot be written.
        """
        text = self.to_frame().to_csv(index=False)
        return text if path is None else write_file(path, text, f"{next(iter(PATHS))},")

    def table(self) -> pd.DataFrame:
        """One row a cell, rounded for the screen; a missing figure is "-" and has its reason."""
        raw = self.to_frame()
        pages = ROLES["page figure"] if (raw["workload"] == "pages").any() else ()
        names = [
            "variant",
            "batch_size",
            *self._varied(raw),
            "origin",
            "items_per_s",
            "low",
            "high",
            *pages,
        ]
        names += ["peak_bytes", "status", "reason", "kernels_used"]
        raw["reason"] = list(map(_reason, self.cells))
        if raw["interference"].notna().any():
            names += ["interference"]
        return on_screen(raw, names)

    def costs(self, price: float = 0) -> pd.DataFrame:
        """One row a cell with a rate: items an hour, energy, load time, percentiles of latency.

        `price` of a GPU-hour, in any currency, adds the cost of a million items.
        """
        raw = self.to_frame().dropna(subset="items_per_s")
        raw["items_per_hour"] = 3600 * raw["items_per_s"]
        raw["price_per_million"] = 1e6 * price / raw["items_per_hour"] if price else None
        known = [name for name in ROLES["cost"] if raw[name].notna().any()]
        origin = ["origin"] if raw["origin"].nunique() > 1 else []
        return on_screen(raw, ["variant", *self._varied(raw), *origin, "batch_size", *known])

    def end_to_end(self) -> pd.DataFrame:
        """One row a cell and number of loaders: pages/s from disk to disk, the slowest stage."""
        rows = [
            {name: value(cell, name) for name in ("batch_size", *SETTINGS)}
            | run.model_dump()
            | {"patch_s": run.preprocess_s, "pages_per_s": run.items_per_s}
            | {"share": run.items_per_s / rate(cell), "bottleneck": run.bottleneck}
            | {"loaders_needed": run.loaders_needed}
            for cell in self.cells
            for run in cell.end_to_end
        ]
        raw = pd.DataFrame(
            rows, columns=[*dict.fromkeys([*SETTINGS, "batch_size", *ROLES["end to end"]])]
        )
        return on_screen(raw, ["variant", *self._varied(raw), "batch_size", *ROLES["end to end"]])

    def _varied(self, raw: pd.DataFrame) -> list[str]:
        """The settings that differ among cells of one variant."""
        counts = raw.groupby("variant")[SETTINGS].nunique(dropna=False).max()
        return [name for name in SETTINGS if name != "origin" and counts[name] > 1]

    def plot(self, kind: str = "throughput", **options: Any) -> Figure:
        """A figure: throughput, memory (with `cards=(8, 12)` in GB), tradeoff or roofline.

        Raises BadInput for another kind, or a roofline of cells without work (use predictions).
        """
        kinds = analysis.plots.KINDS
        return kinds[one_of("plot", kind, kinds)](self.series(), **options)

    def __repr__(self) -> str:
        return f"{conditions(self.cells)}\n{render.text(self.table(), 100)}"

    def _repr_html_(self) -> str:
        return f"<p>{render.as_html(conditions(self.cells))}</p>" + render.html(self.table())


def few(series: Sequence[Series]) -> Sequence[Series]:
    """`series`; BadInput for more than a figure can show, or a comparison can pair."""
    if len(series) > MOST_SERIES:
        most = f"at most {MOST_SERIES} series are shown at once, got {len(series)}"
        raise BadInput(f"{most}; narrow the records")
    return series


def pick(results: Results, variants: str | Sequence[str], what: str) -> Series:
    """The only series of the `variants`, else BadInput; `what` names the argument in the error."""
    wanted = [variants] if isinstance(variants, str) else variants
    every = results.series()
    matching = [series for series in every if series.variant in wanted]
    if len(matching) != 1:
        labels = "; ".join(series.label for series in every) or "no cell"
        raise BadInput(f"{what} must hold one series, got {labels}; narrow the records to one")
    return matching[0]


# ---------------------------------------------------------------- cells


def rate(cell: Cell) -> float:
    """The median items per second of a cell that has a rate, as a float."""
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


def random_weights(cell: Cell) -> bool:
    """Whether the weights are random: speed and memory hold, embeddings mean nothing."""
    return cell.weights.startswith("random") or "untrained" in cell.weights


def disturbed(cells: Iterable[Cell]) -> int:
    """The number of cells whose measurement was disturbed: they give no verdict."""
    return sum(bool(cell.disturbed) for cell in cells)


def device(environment: Environment) -> str:
    """The device as a title names it; a machine without a GPU says CPU."""
    name = environment.device
    return name if environment.gpu or "CPU" in name or not environment.cpu else f"CPU {name}"


def limit_of(cell: Cell, work: Work | None) -> tuple[float | None, str]:
    """`(items per second at most, origin)`: from rates of the same run, else the data sheet.

    The larger of two times: all operations at the dense 16-bit rate, and every weight read once at
    the bandwidth. None for 8-bit GEMMs, which have other limits, and where none is known.
    """
    limits, origin = cell.limits, "measured in the run"
    gpu = gpu_of(cell.environment.device, cell.environment.gpu_memory_bytes)
    if gpu and not limits:
        limits = Limits(flops_per_s=gpu.flops(), bytes_per_s=gpu.bandwidth_gb_s * 1e9)
        origin = "data sheet"
    if not work or not limits or cell.configuration.eight_bit:
        return None, ""
    seconds = max(work.flops / limits.flops_per_s, work.min_bytes / limits.bytes_per_s)
    return cell.batch_size / seconds, origin


def conditions(cells: Iterable[Cell]) -> str:
    """Where figures come from, for titles: origin, device, settings, kernels, random weights."""
    rows = [
        (
            *([cell.origin], [device(cell.environment)], [cell.size], [cell.workload.budget]),
            *([cell.execution], [f"protocol {cell.protocol}"]),
            [f"{cell.card.name} cap"] if cell.card else [],
            [f"kernel {name}" for name in cell.backend.engaged if name != "torch.nn.Linear"],
            ["random weights"] if random_weights(cell) else [],
        )
        for cell in cells
    ]
    parts = [dict.fromkeys(chain(*part)) for part in zip(*rows, strict=True)]
    return " · ".join(" and ".join(part) for part in parts if part)


def _reason(cell: Cell) -> str:
    """Why a cell lacks a figure; empty if it lacks none."""
    if cell.reason or cell.status != "ok":
        return cell.reason or "no reason recorded"
    rate = cell.items_per_s
    gaps = {
        "no rate": rate is None,
        "no interval: under 6 samples": rate and rate.low is None,
        "no peak": cell.memory is None,
    }
    return "; ".join(gap for gap, missing in gaps.items() if missing)
