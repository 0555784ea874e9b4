"""Figures of series: throughput, speed vs base, peak memory, tradeoff, roofline, memory breakdown.

A variant has the same colour and marker in every figure (Okabe-Ito palette, safe for colour-blind
readers); further series of a variant are dashed. The subtitle names where the data come from.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from PIL import Image

from colqwen_lab.analysis.compare import CARDS_GB
from colqwen_lab.analysis.plan import breakdown_table
from colqwen_lab.analysis.speed import SAME_PERCENT, Speed, differences
from colqwen_lab.analysis.table import (
    Series,
    conditions,
    disturbed,
    few,
    limit_of,
    peak,
    rate,
    unit,
)
from colqwen_lab.errors import BadInput
from colqwen_lab.hardware import find_card
from colqwen_lab.records import MIB, Cell
from colqwen_lab.settings import writable_folder, write_file

FIXED = {"base": ("#0072B2", "o"), "awq": ("#D55E00", "s")}
FREE = (("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
DASHES = ("-", "--", ":", "-.")
# Groups of a memory breakdown in stacking order: how the names of their parts begin, and a colour.
PARTS = {
    "embeddings": "#0072B2",
    "text linears": "#D55E00",
    "vision": "#009E73",
    "mergers": "#CC79A7",
    "KV cache": "#E69F00",
    "activations": "#56B4E9",
    "kernel buffers": "#000000",
    "outside torch": "#FFFFFF",
    "unexplained": "#882255",
    "other": "#999999",
}
# Format, how such a file begins, and options of savefig.
FILES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("png", "\\W?PNG", {"dpi": 120}),
    ("svg", r"<\?xml[^>]*>\s*<!DOCTYPE svg", {"metadata": {"Date": None}}),
)
THOUSANDS = StrMethodFormatter("{x:,g}")


class Plot(Figure):
    """A figure that a notebook shows without pyplot and its global state."""

    def draw(self, renderer: Any) -> None:
        """Draw every text as it is: a dollar sign in a record starts no formula."""
        for text in self.findobj(Text):
            text.set_parse_math(False)  # type: ignore[attr-defined]
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        full, small = BytesIO(), BytesIO()
        self.savefig(full, format="png", dpi=90)
        # 64 colours are plenty for lines and text, and keep a notebook small.
        Image.open(full).convert("RGB").quantize(64).save(small, format="png", optimize=True)
        return small.getvalue()


def throughput(series: Sequence[Series]) -> Figure:
    """A figure of items per second by batch size, with the 95 % interval of each median."""
    figure, axes = _by_batch(series, "Throughput by batch size", _rates)
    axes.set_ylim(bottom=0)
    return legend(figure, axes)


def speed_lines(series: Sequence[Series], lines: Mapping[str, Sequence[Speed]]) -> Figure:
    """A figure of speeds vs base by batch size, in %, a line for each of the named `lines`.

    A single line has its figures written to it; `series` are then base and the other.
    """
    title = "Speed vs base at the same batch size"
    if single := len(lines) == 1:
        base, other = series
        title = f"Speed of {other.label} vs {base.label} at the same batch size"
        if differences(base.cells, other.cells):
            title = f"Not a comparison (conditions differ):\n{title}"
    figure, axes = _by_batch(series, title)
    axes.set_ylabel("speed vs base, % (negative = slower)")
    band(axes, SAME_PERCENT, f"±{SAME_PERCENT:g} %: not significant")
    free = cycle(FREE)
    for label, speeds in lines.items():
        points = {row.batch_size: (row.percent, row.low, row.high, row.verdict) for row in speeds}
        difference_line(axes, points, FIXED.get(label) or next(free), label=label)
        for batch, (percent, low, high, _) in points.items() if single else ():
            end, offset = (low, -15) if percent < 0 else (high, 8)
            at = batch, percent if end is None else end
            note(axes, f"{percent:+.1f}", at, (0, offset), ha="center")
    if single:
        axes.margins(y=0.15)
    return legend(figure, axes)


def memory(series: Sequence[Series], cards: Iterable[str | float] = ()) -> Figure:
    """A figure of peak memory in MiB by batch size, with a line at the memory of each card.

    `cards` are GB or GPU names, by default the usual sizes. Those more than 20 times above the
    largest peak are skipped: they would flatten the lines.
    """
    figure, axes = _by_batch(series, "Peak memory by batch size", _peaks)
    top = 20 * axes.dataLim.ymax
    for card in map(find_card, cards or CARDS_GB):
        if (height := card.nominal_bytes / MIB) <= top:
            axes.axhline(height, color="0.4", linestyle=(0, (4, 3)), linewidth=1)
            look: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "ha": "right",
                "color": "0.3",
            }
            note(axes, f"{card.name} card", (1, height), (-4, 3), **look)
    axes.set(ylim=(0, None), ylabel="peak memory, MiB")
    return legend(figure, axes)


def tradeoff(series: Sequence[Series]) -> Figure:
    """A figure of items per second by peak memory in MiB; labels are batch sizes."""
    figure, axes = _framed("Throughput by peak memory", _cells(series))
    for line, style in _styles(series):
        points = {batch: peak(cell) / MIB for batch, cell in line.sized.items() if cell.items_per_s}
        axes.plot([*points.values()], [rate(line.rated[batch]) for batch in points], **style)
        for batch, x in points.items():
            note(axes, str(batch), (x, rate(line.rated[batch])), (6, -9), color=style["color"])
    axes.set(ylim=(0, None), xlabel="peak memory, MiB (labels: batch size)")
    axes.margins(x=0.08)
    return legend(figure, axes)


def roofline(series: Sequence[Series]) -> Figure:
    """A figure of items per second by batch size, each series under its limit; log axes.

    The limits are those of `table.limit_of`; BadInput if no cell has one.
    """
    roofs = [{cell.batch_size: limit_of(cell, cell.work) for cell in line.cells} for line in series]
    origins = sorted({origin for roof in roofs for _, origin in roof.values() if origin})
    if not origins:
        raise BadInput(
            "a roofline needs the work of a step and a known GPU; plot the predictions of such rows"
        )
    title = f"Throughput under the roofline (limits: {' and '.join(origins)})"
    figure, axes = _by_batch(series, title, _rates)
    for (line, style), roof in zip(_styles(series), roofs, strict=True):
        wide: dict[str, Any] = {"color": style["color"], "linewidth": 6, "alpha": 0.12}
        heights = [limit or np.nan for limit, _ in roof.values()]
        axes.plot([*roof], heights, label=f"limit of {line.variant}", **wide)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    return legend(figure, axes)


def plain_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as plain numbers."""
    ticks = {"major_locator": LogLocator(subs=(1, 2, 5)), "minor_formatter": NullFormatter()}
    axis.set(major_formatter=THOUSANDS, **ticks)


def breakdown(cells: Sequence[Cell]) -> Figure:
    """A figure with stacked bars: the parts of each peak, and memory outside torch, in MiB."""
    figure, axes = _framed("Memory breakdown of the peaks", cells)
    table = breakdown_table(cells).drop(["peak", "on the card"], errors="ignore")
    groups = table.index.str.extract(f"^({'|'.join(PARTS)})", expand=False).fillna("other")
    sizes = table.groupby(groups.to_numpy()).sum().reindex(PARTS).dropna()
    look: dict[str, Any] = {"width": 0.6, "edgecolor": "0.4", "linewidth": 0.5}
    for name, bottom in (sizes.cumsum() - sizes).iterrows():
        own = {"bottom": bottom, "color": PARTS[name], "label": name}
        axes.bar(range(len(cells)), sizes.loc[name], **look, **own)
    names = [re.sub(r" \(|, ", "\n", column).rstrip(")") for column in table.columns]
    axes.set_xticks(range(len(cells)), names, fontsize=8)
    axes.set_ylabel("memory, MiB")
    return legend(figure, axes)


KINDS: dict[str, Callable[..., Figure]] = {
    kind.__name__: kind for kind in (throughput, memory, tradeoff, roofline)
}


def save(figure: Figure, stem: str, folder: str | Path) -> list[Path]:
    """The paths of `stem`.png and `stem`.svg, written to `folder`; BadInput if that fails.

    Equal figures make equal files.
    """
    paths = []
    for kind, like, options in FILES:
        content = BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "colqwen-lab"}):
            figure.savefig(content, format=kind, **options)
        path = writable_folder(Path(folder)) / f"{stem}.{kind}"
        paths.append(write_file(path, content.getvalue(), like))
    return paths


# ---------------------------------------------------------------- parts of figures


def framed(title: str, subtitle: str, height: float = 4.8) -> tuple[Figure, Axes]:
    """`(figure, axes)` with a title, and a subtitle that names where the data come from."""
    figure = Plot(figsize=(7.5, height), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=12)
    axes.set_title(textwrap.fill(subtitle, 105), fontsize=8, color="0.3")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(THOUSANDS)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(figure: Figure, axes: Axes) -> Figure:
    """The figure with a legend below the axes, each label once."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.set_figheight(figure.get_figheight() + 0.17 * (len(entries) // 2))
    look: dict[str, Any] = {"ncols": 2, "handlelength": 4, "frameon": False, "fontsize": 8}
    figure.legend([*entries.values()], [*entries], loc="outside lower center", **look)
    return figure


def intervals(axes: Axes, points: Mapping[Any, Any], **style: Any) -> None:
    """Plot (value, low, high) by x with error bars, where there is an interval."""
    value, low, high = np.array([*points.values()], dtype=float).reshape(-1, 3).T
    # With few samples a percentile interval may not contain the estimate.
    bars = np.nan_to_num([value - low, high - value]).clip(0)
    axes.plot([*points], value, **style)
    axes.errorbar([*points], value, bars, fmt="none", ecolor=style["color"], capsize=3, zorder=1)


def difference_line(axes: Axes, points: Mapping[Any, Any], look: Any, **style: Any) -> None:
    """Plot (value, low, high, verdict) by x; markers of significant differences are filled."""
    style |= {"color": look[0], "marker": look[1], "mfc": "white"}
    intervals(axes, {x: point[:3] for x, point in points.items()}, **style)
    hollow = ("inconclusive", "same")
    filled = [np.nan if point[3] in hollow else point[0] for point in points.values()]
    axes.plot([*points], filled, look[1], color=look[0], zorder=5)


def band(axes: Axes, margin: float, label: str) -> None:
    """A zero line, and a grey band of the differences that do not count."""
    axes.axhspan(-margin, margin, color="0.88", label=label)
    axes.axhline(0, color="0.3", linewidth=1)
    hollow = "hollow marker: no significant difference"
    axes.plot([], [], "o", color="0.3", mfc="white", label=hollow)


def note(
    axes: Axes, text: str, at: Any, offset: tuple[int, int], fontsize: int = 8, **look: Any
) -> None:
    """Write a small text beside a point, `offset` in points."""
    axes.annotate(text, at, offset, textcoords="offset points", fontsize=fontsize, **look)


def _framed(title: str, cells: Sequence[Cell]) -> tuple[Figure, Axes]:
    """Axes of rates, under the conditions of the cells and how many of them were disturbed."""
    count = disturbed(cells)
    notes = f" · {count} of {len(cells)} cells disturbed" if count else ""
    figure, axes = framed(title, conditions(cells) + notes)
    axes.set_ylabel(" and ".join(dict.fromkeys(map(unit, cells))))
    return figure, axes


def _cells(series: Sequence[Series]) -> list[Cell]:
    return [cell for line in few(series) for cell in line.cells]


def _rates(line: Series) -> dict[int, Any]:
    rates = {batch: cell.items_per_s for batch, cell in line.rated.items()}
    return {batch: rate and (rate.median, rate.low, rate.high) for batch, rate in rates.items()}


def _peaks(line: Series) -> dict[int, Any]:
    return {batch: (peak(cell) / MIB, None, None) for batch, cell in line.sized.items()}


def _styles(series: Sequence[Series]) -> Iterator[tuple[Series, dict[str, Any]]]:
    """Each series with its line style: colour and marker by variant, dashes by configuration."""
    others = [name for name in dict.fromkeys(line.variant for line in series) if name not in FIXED]
    looks = FIXED | dict(zip(others, cycle(FREE), strict=False))
    dashes = {variant: cycle(DASHES) for variant in looks}
    for line in series:
        colour, marker = looks[line.variant]
        style = {"color": colour, "marker": marker, "linestyle": next(dashes[line.variant])}
        yield line, style | {"label": line.label}


def _by_batch(
    series: Sequence[Series], title: str, points: Callable[[Series], Any] = lambda _: {}
) -> tuple[Figure, Axes]:
    """Axes over batch sizes, with the (value, low, high) `points` by batch of each series.

    Failed cells are marked on the axis.
    """
    cells = _cells(series)
    figure, axes = _framed(title, cells)
    ticks = sorted({cell.batch_size for cell in cells})
    axes.set(xscale="log", xticks=ticks, xlabel="batch size")
    axes.xaxis.set(minor_locator=NullLocator(), major_formatter=THOUSANDS)
    axis = axes.get_xaxis_transform()
    for number, (line, style) in enumerate(_styles(series)):
        if by_batch := points(line):
            intervals(axes, by_batch, **style)
        for cell in line.failed:
            at, colour = (cell.batch_size, 0.03 + 0.06 * number), style["color"]
            axes.plot(*at, "x", color=colour, transform=axis, clip_on=False, zorder=6)
            text = cell.status.replace("oom", "OOM")
            note(axes, text, at, (-6, 0), xycoords=axis, ha="right", va="center", color=colour)
    return figure, axes
