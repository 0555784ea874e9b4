"""Figures of series: throughput, speed vs base, peak memory, tradeoff, roofline, memory breakdown.

A variant has the same colour and marker in every figure (Okabe-Ito palette, safe for colour-blind
readers); further series of a variant are dashed. The subtitle names where the data come from.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from PIL import Image

from colqwen_lab.analysis.compare import CARDS_GB, Comparison
from colqwen_lab.analysis.speed import SAME_PERCENT, Speed, differences
from colqwen_lab.analysis.table import Series, conditions, disturbed, limit_of, peak, rate, unit
from colqwen_lab.errors import BadInput
from colqwen_lab.hardware import OUTSIDE_TORCH_BYTES, find_card, outside_bytes
from colqwen_lab.records import MIB, Cell
from colqwen_lab.settings import writable_folder

FIXED = {"base": ("#0072B2", "o"), "awq": ("#D55E00", "s")}
FREE = (("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (2, 5)), (0, (8, 2, 1, 2, 1, 2)))
# Groups of a memory breakdown in stacking order: their colour, and how the names of parts begin.
PARTS = {
    "embeddings": ("#0072B2", "embeddings"),
    "text linears": ("#D55E00", "text linears"),
    "vision encoder, mergers": ("#009E73", "vision", "mergers"),
    "head, norms": ("#CC79A7", "head", "text norms"),
    "KV cache": ("#E69F00", "KV cache"),
    "activations": ("#56B4E9", "activations", "inputs", "outputs"),
    "kernel buffers": ("#000000", "kernel buffers", "backend buffers"),
    "workspace, rounding": ("#999999", "cuBLAS workspace", "allocator rounding"),
    "outside torch": ("#FFFFFF", "outside torch"),
    "unexplained": ("#882255", ""),
}
OUT_OF_REACH = 20  # the largest card that a memory figure shows, over the largest peak
THOUSANDS = StrMethodFormatter("{x:,g}")


class Plot(Figure):
    """A figure that a notebook shows without pyplot and its global state."""

    def draw(self, renderer: Any) -> None:
        """Draw every text as it is: a dollar sign in a record starts no formula."""
        with matplotlib.rc_context({"text.parse_math": False}):
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
    """Items per second by batch size, with the 95 % interval of each median."""
    figure, axes = _by_batch(series, "Throughput by batch size", _unit(series))
    for line, style in _styles(series):
        rates = [(r.median, r.low, r.high) for c in line.rated.values() if (r := c.items_per_s)]
        intervals(axes, line.rated, rates, **style)
    axes.set_ylim(bottom=0)
    return legend(figure, axes)


def speed_vs_base(comparison: Comparison) -> Figure:
    """The speed of a variant vs base by batch size, in %, with intervals; negative = slower."""
    base, other = series = (comparison.base, comparison.awq)
    title = f"Speed of {other.label} vs {base.label} at the same batch size"
    if differences(base.cells, other.cells):
        title = f"Not a comparison (conditions differ):\n{title}"
    look = FIXED.get(other.variant, FREE[0])
    figure = speed_lines(series, {other.label: comparison.speeds}, title, [look])
    (axes,) = figure.axes
    for speed in comparison.speeds:
        end, offset = (speed.low, -15) if speed.percent < 0 else (speed.high, 8)
        at = speed.batch_size, speed.percent if end is None else end
        _note(axes, f"{speed.percent:+.1f}", at, (0, offset), ha="center")
    axes.margins(y=0.15)
    return figure


def speed_lines(
    series: Sequence[Series],
    lines: Mapping[str, Sequence[Speed]],
    title: str = "Speed vs base at the same batch size",
    looks: Iterable[tuple[str, str]] = FREE,
) -> Figure:
    """Speeds vs base by batch size, in %, one line for each of the named `lines` of a run.

    Markers of significant differences are filled. `looks` are colours and markers.
    """
    figure, axes = _by_batch(series, title, "speed vs base, % (negative = slower)")
    band(axes, SAME_PERCENT, f"±{SAME_PERCENT:g} %: not significant")
    for (label, speeds), look in zip(lines.items(), cycle(looks), strict=False):
        rows = [(speed.percent, speed.low, speed.high, speed.verdict) for speed in speeds]
        difference_line(axes, [speed.batch_size for speed in speeds], rows, look, label=label)
    return legend(figure, axes)


def memory(series: Sequence[Series], cards: Iterable[str | float] = ()) -> Figure:
    """Peak memory in MiB by batch size, with a line at the memory of each card.

    `cards` are GB or GPU names, by default the usual sizes. Those more than 20 times above the
    largest peak are left out: they would flatten the lines.
    """
    figure, axes = _by_batch(series, "Peak memory by batch size", "peak memory, MiB")
    for line, style in _styles(series):
        axes.plot([*line.sized], [peak(cell) / MIB for cell in line.sized.values()], **style)
    top = max((peak(cell) / MIB for line in series for cell in line.sized.values()), default=0)
    for card in map(find_card, cards or CARDS_GB):
        if (height := card.nominal_bytes / MIB) <= OUT_OF_REACH * top:
            axes.axhline(height, color="0.4", linestyle=(0, (4, 3)), linewidth=1)
            look = {"xycoords": ("axes fraction", "data"), "ha": "right", "color": "0.3"}
            _note(axes, f"{card.name} card", (1, height), (-4, 3), **look)
    axes.set_ylim(bottom=0)
    return legend(figure, axes)


def tradeoff(series: Sequence[Series]) -> Figure:
    """Items per second by peak memory in MiB; each point is labelled with its batch size."""
    figure, axes = framed("Throughput by peak memory", _subtitle(series))
    for line, style in _styles(series):
        cells = [cell for cell in line.rated.values() if cell.memory]
        peaks, rates = [peak(cell) / MIB for cell in cells], [rate(cell) for cell in cells]
        axes.plot(peaks, rates, **style)
        for cell, *at in zip(cells, peaks, rates, strict=True):
            _note(axes, str(cell.batch_size), at, (6, -9), color=style["color"])
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.set_xlabel("peak memory, MiB (labels: batch size)")
    axes.set_ylabel(_unit(series))
    return legend(figure, axes)


def roofline(series: Sequence[Series]) -> Figure:
    """Items per second by batch size, each series under its limit; both axes are logarithmic.

    The limit is `table.limit_of`: the lower of compute and memory bandwidth.

    Raises:
        BadInput: no cell has a limit.
    """
    figure, axes = _by_batch(series, "", _unit(series))
    origins = set()
    for line, style in _styles(series):
        roof = {}
        for cell in line.cells:
            limit, origin = limit_of(cell, cell.work)
            if limit:
                roof[cell.batch_size] = limit
                origins.add(origin)
        wide: dict[str, Any] = {"color": style["color"], "linewidth": 6, "alpha": 0.12}
        axes.plot([*roof], [*roof.values()], label=f"limit of {line.variant}", **wide)
        axes.plot([*line.rated], [rate(cell) for cell in line.rated.values()], ms=4, **style)
    if not origins:
        raise BadInput(
            "a roofline needs the work of a step and a known GPU; plot the predictions of such rows"
        )
    figure.suptitle(f"Throughput under the roofline (limits: {' and '.join(sorted(origins))})")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(THOUSANDS)
    axes.yaxis.set_minor_formatter(NullFormatter())
    return legend(figure, axes)


def breakdown(cells: Sequence[Cell]) -> Figure:
    """A stacked bar a cell: the parts of its peak, and the memory outside torch, in MiB."""
    figure, axes = framed("Memory breakdown of the peaks", subtitle(cells))
    rows = [_parts(cell) for cell in cells]
    bottom = np.zeros(len(rows))
    for group, (colour, *_) in PARTS.items():
        sizes = np.array([row[group] for row in rows]) / MIB
        if sizes.any():
            look: dict[str, Any] = {"color": colour, "edgecolor": "0.4", "linewidth": 0.5}
            axes.bar(range(len(rows)), sizes, 0.6, bottom, label=group, **look)
            bottom += sizes
    names = [f"{c.variant}\nbatch {c.batch_size}\n{c.execution}\n{c.protocol}" for c in cells]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylabel("memory, MiB")
    return legend(figure, axes)


KINDS: dict[str, Callable[..., Figure]] = {
    "throughput": throughput,
    "memory": memory,
    "tradeoff": tradeoff,
    "roofline": roofline,
}


def save(figure: Figure, stem: str, folder: str | Path) -> list[Path]:
    """The paths of `stem`.png and `stem`.svg, written to `folder`. Equal figures make equal files.

    Raises:
        BadInput: the folder cannot be written.
    """
    paths = [writable_folder(Path(folder)) / f"{stem}.{kind}" for kind in ("png", "svg")]
    try:
        with matplotlib.rc_context({"svg.hashsalt": "colqwen-lab"}):
            figure.savefig(paths[0], dpi=120)
            figure.savefig(paths[1], metadata={"Date": None})
    except OSError as error:
        raise BadInput(
            f"cannot write {stem} to {folder}: {error.strerror}; name a folder you can write"
        ) from None
    return paths


# ---------------------------------------------------------------- parts of figures


def framed(title: str, subtitle: str, height: float = 4.8) -> tuple[Figure, Axes]:
    """A figure with its title, and a subtitle that names where the data come from."""
    figure = Plot(figsize=(7.5, height), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=12)
    axes.set_title(textwrap.fill(subtitle, 120), fontsize=8, color="0.3")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(THOUSANDS)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def subtitle(cells: Sequence[Cell]) -> str:
    """Origin, device, size, workload and configuration of cells, and how many were disturbed."""
    count = disturbed(cells)
    return conditions(cells) + (f" · {count} of {len(cells)} cells disturbed" if count else "")


def legend(figure: Figure, axes: Axes) -> Figure:
    """The figure with a legend below the axes, each label once."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.set_figheight(figure.get_figheight() + 0.17 * (len(entries) // 2))
    look: dict[str, Any] = {"ncols": 2, "handlelength": 4, "frameon": False, "fontsize": 8}
    figure.legend([*entries.values()], [*entries], loc="outside lower center", **look)
    return figure


def intervals(axes: Axes, x: Iterable[float], points: Sequence[Any], **style: Any) -> None:
    """Plot (value, low, high) points with error bars, where there is an interval."""
    value, low, high = np.reshape(np.array(points, dtype=float), (-1, 3)).T
    # With few samples a percentile interval may not contain the estimate.
    bars = np.nan_to_num([value - low, high - value]).clip(0)
    axes.plot([*x], value, **style)
    axes.errorbar([*x], value, bars, fmt="none", ecolor=style["color"], capsize=3, zorder=1)


def difference_line(
    axes: Axes, x: Sequence[float], rows: Sequence[Any], look: tuple[str, str], **style: Any
) -> None:
    """Plot (value, low, high, verdict) rows; markers of significant differences are filled."""
    colour, marker = look
    points = [row[:3] for row in rows]
    intervals(axes, x, points, color=colour, marker=marker, mfc="white", **style)
    filled = [row[0] if row[3] not in ("inconclusive", "same") else np.nan for row in rows]
    axes.plot(x, filled, marker, color=colour, zorder=5)


def band(axes: Axes, margin: float, label: str) -> None:
    """A zero line, and a grey band of the differences that do not count."""
    axes.axhspan(-margin, margin, color="0.88", label=label)
    axes.axhline(0, color="0.3", linewidth=1)
    hollow = "hollow marker: no significant difference"
    axes.plot([], [], "o", color="0.3", mfc="white", label=hollow)


def _subtitle(series: Sequence[Series]) -> str:
    return subtitle([cell for line in series for cell in line.cells])


def _unit(series: Sequence[Series]) -> str:
    return " and ".join(dict.fromkeys(unit(cell) for line in series for cell in line.cells))


def _note(axes: Axes, text: str, at: Any, offset: tuple[int, int], **look: Any) -> None:
    axes.annotate(text, at, offset, textcoords="offset points", fontsize=8, **look)


def _styles(series: Sequence[Series]) -> Iterator[tuple[Series, dict[str, Any]]]:
    """Each series with its line style: colour and marker by variant, dashes by configuration."""
    looks, seen = dict(FIXED), Counter[str]()
    for line in series:
        free = FREE[(len(looks) - len(FIXED)) % len(FREE)]
        colour, marker = looks.setdefault(line.variant, free)
        dashes = DASHES[seen[line.variant] % len(DASHES)]
        seen[line.variant] += 1
        style = {"color": colour, "marker": marker, "linestyle": dashes, "label": line.label}
        yield line, style


def _by_batch(series: Sequence[Series], title: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure over batch sizes, log2, with a tick at each; failed cells are marked on the axis."""
    figure, axes = framed(title, _subtitle(series))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({cell.batch_size for line in series for cell in line.cells}))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.set_xlabel("batch size")
    axes.set_ylabel(ylabel)
    axis = axes.get_xaxis_transform()
    for number, (line, style) in enumerate(_styles(series)):
        for cell in line.failed:
            at, colour = (cell.batch_size, 0.03 + 0.06 * number), style["color"]
            axes.plot(*at, "x", color=colour, transform=axis, clip_on=False, zorder=6)
            text = cell.status.replace("oom", "OOM")
            _note(axes, text, at, (-6, 0), xycoords=axis, ha="right", va="center", color=colour)
    return figure, axes


def _parts(cell: Cell) -> Counter[str]:
    """Bytes by group of PARTS; outside torch only on a GPU, measured or assumed."""
    groups = Counter[str]()
    if cell.memory:
        outside = outside_bytes(cell.memory)
        parts = dict(cell.memory.breakdown or {"unexplained": cell.memory.peak_bytes})
        if cell.environment.gpu:
            parts["outside torch"] = OUTSIDE_TORCH_BYTES[1] if outside is None else outside
        for part, size in parts.items():
            group = next(name for name, (_, *of) in PARTS.items() if part.startswith(tuple(of)))
            groups[group] += size
    return groups
