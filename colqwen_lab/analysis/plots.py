"""Figures of series: throughput, overhead, peak memory, and throughput over memory.

A variant keeps its colour and marker in every figure (Okabe-Ito, safe for colour-blind eyes); a second series of the
same variant is dashed. The second line of a title says where the figures come from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter
from PIL import Image

from colqwen_lab.analysis.compare import (
    CARDS_GB,
    SAME_PERCENT,
    Comparison,
    Overhead,
    machines_differ,
    peak,
    rate,
)
from colqwen_lab.analysis.results import Series, conditions, unit, way
from colqwen_lab.errors import BadInput
from colqwen_lab.records import GIB, MIB
from colqwen_lab.settings import writable_folder

FIXED = {"base": ("#0072B2", "o"), "awq": ("#D55E00", "s")}
FREE = (("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (2, 5)), (0, (8, 2, 1, 2, 1, 2)))
#: A card this many times above the largest peak would squash the plot.
OUT_OF_REACH = 20
DPI = 120


class Plot(Figure):
    """A figure that a notebook shows without pyplot and its global state."""

    def draw(self, renderer: Any) -> None:
        """Text from records is text: a dollar sign starts no formula."""
        for text in self.findobj(Text):
            shown = text.get_text()  # type: ignore[attr-defined]
            if (plain := re.sub(r"(?<!\\)\$", r"\\$", shown)) != shown:
                text.set_text(plain)  # type: ignore[attr-defined]
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        drawn, small = BytesIO(), BytesIO()
        self.savefig(drawn, format="png", dpi=90)
        # 64 colours are plenty for lines and text, and keep a notebook small.
        Image.open(drawn).convert("RGB").quantize(64).save(small, format="png", optimize=True)
        return small.getvalue()


def throughput(series: Sequence[Series]) -> Figure:
    """Items per second over the batch size, with the 95 % interval of each median."""
    figure, axes = _axes(series, "Throughput over batch size")
    for one, style in _styles(series):
        rows = list(one.rated.values())
        rates = [cell.items_per_s for cell in rows if cell.items_per_s]
        bars = np.reshape([spread(r.median, r.low, r.high) for r in rates], (-1, 2)).T
        batches = [cell.batch_size for cell in rows]
        axes.errorbar(batches, [r.median for r in rates], yerr=bars, capsize=3, **style)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(_unit(series))
    _batch_axis(axes, series)
    return _legend(figure, axes)


def overhead(comparison: Comparison) -> Figure:
    """The overhead in percent over the batch size. A filled marker is told apart from zero, a hollow one is not."""
    both = (comparison.base, comparison.awq)
    title = f"{comparison.awq.label} against {comparison.base.label} at the same batch size"
    if machines_differ(*both):
        title = f"Not a comparison (conditions differ):\n{title}"
    figure, axes = _axes(both, title)
    style = _styles(both)[1][1]
    _zero(axes)
    rows = comparison.overhead
    _overheads(axes, rows, **style | {"mfc": "white"})
    told = [row for row in rows if row.verdict != "cannot tell"]
    axes.plot(
        [row.batch_size for row in told],
        [row.overhead_percent for row in told],
        style["marker"],
        color=style["color"],
        zorder=5,
    )
    for row in rows:
        under = row.overhead_percent < 0
        end = row.low if under else row.high
        axes.annotate(
            f"{row.overhead_percent:+.1f}",
            (row.batch_size, row.overhead_percent if end is None else end),
            xytext=(0, -15 if under else 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_ylabel(f"difference in {_unit(both)}, % (negative = slower)")
    axes.margins(y=0.15)
    _batch_axis(axes, both)
    return _legend(figure, axes)


def overhead_lines(series: Sequence[Series], lines: Mapping[str, Sequence[Overhead]]) -> Figure:
    """Several overheads of one run over the batch size, a line each, with their intervals."""
    figure, axes = _axes(series, "Overhead at the same batch size, way by way")
    _zero(axes)
    for (name, rows), (colour, marker) in zip(
        lines.items(), (*FIXED.values(), *FREE), strict=False
    ):
        _overheads(axes, rows, color=colour, marker=marker, label=name)
    axes.set_ylabel(f"difference in {_unit(series)}, % (negative = slower)")
    _batch_axis(axes, series)
    return _legend(figure, axes)


def memory(series: Sequence[Series], cards: Sequence[float] | None = None) -> Figure:
    """Peak memory over the batch size, with a line at each card's nominal memory; `cards` in GB.

    Without `cards` those of the usual ones are drawn that the data reach half of, and at least the smallest. A card
    more than 20 times above the largest peak is left out, asked for or not: the tiny model would lie flat below it.
    """
    figure, axes = _axes(series, "Peak memory over batch size")
    scale, name = _scale(series)
    for one, style in _styles(series):
        rows = one.sized.values()
        axes.plot(
            [cell.batch_size for cell in rows], [peak(cell) / scale for cell in rows], **style
        )
    drawn = _cards_drawn(_largest_peak(series), cards)
    axes.set_ylim(
        0, 1.1 * max([_largest_peak(series), *(card * GIB for card in drawn)]) / scale or 1
    )
    for card in drawn:
        axes.axhline(card * GIB / scale, color="0.4", linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate(
            f"{card:g} GB card",
            (1, card * GIB / scale),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.3",
        )
    axes.set_ylabel(f"peak memory, {name}")
    _batch_axis(axes, series)
    return _legend(figure, axes)


def tradeoff(series: Sequence[Series]) -> Figure:
    """Items per second over peak memory; each point carries its batch size."""
    figure, axes = _axes(series, "Throughput over peak memory")
    scale, name = _scale(series)
    for one, style in _styles(series):
        rows = [cell for batch, cell in one.rated.items() if batch in one.sized]
        points = [(peak(cell) / scale, rate(cell)) for cell in rows]
        axes.plot([x for x, _ in points], [y for _, y in points], **style)
        for cell, point in zip(rows, points, strict=True):
            text = str(cell.batch_size)
            axes.annotate(
                text,
                point,
                xytext=(6, -9),
                textcoords="offset points",
                fontsize=8,
                color=style["color"],
            )
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.set_xlabel(f"peak memory, {name} (points: batch size)")
    axes.set_ylabel(_unit(series))
    return _legend(figure, axes)


def roofline(series: Sequence[Series]) -> Figure:
    """Items per second over batch size, both logarithmic, under the roof of each variant's own weights.

    A roof is the lower of two: the work of a batch over the rate of a large product, and every weight that it needs,
    read once, over the rate of a copy. Of several series of a variant the highest roof is drawn.

    Raises:
        BadInput: no cell carries its work and has a limit.
    """
    from colqwen_lab.analysis.plan import limit_of

    roofs: dict[str, dict[int, float]] = {}
    origins = set()
    for one in series:
        for cell in one.cells:
            limit, origin = limit_of(cell, cell.work)
            if limit:
                of_variant = roofs.setdefault(one.variant, {})
                of_variant[cell.batch_size] = max(limit, of_variant.get(cell.batch_size, 0))
                origins.add(origin)
    if not roofs:
        raise BadInput(
            "no cell carries its work and a limit; valid: lab.explain(results) of rows from a known GPU"
        )
    figure, axes = _axes(
        series, f"Throughput under the roofline (limits: {' and '.join(sorted(origins))})"
    )
    figure.set_size_inches(7.5, 6.2)
    markers = {one.variant: style["marker"] for one, style in _styles(series)}
    dashes: dict[str, Any] = dict(
        zip(markers, ("-", (0, (3, 1)), ":", "-.") * len(markers), strict=False)
    )
    for variant, roof in roofs.items():
        roof_style: dict[str, Any] = {
            "color": "0.75",
            "linewidth": 5,
            "linestyle": dashes[variant],
            "label": f"roof of {variant}'s weights",
        }
        axes.plot(sorted(roof), [roof[batch] for batch in sorted(roof)], **roof_style)
    colours = [colour for colour, _ in (*FIXED.values(), *FREE)]
    ways = dict(zip(dict.fromkeys(map(way, series)), colours * len(series), strict=False))
    for one in series:
        rows = list(one.rated.values())
        style: dict[str, Any] = {
            "color": ways[way(one)],
            "marker": markers[one.variant],
            "markersize": 4,
        }
        style["linestyle"] = dashes[one.variant]
        axes.plot(
            [cell.batch_size for cell in rows],
            [rate(cell) for cell in rows],
            label=one.label,
            **style,
        )
    axes.set_yscale("log", base=10)
    axes.set_ylabel(_unit(series))
    _batch_axis(axes, series)
    figure.legend(
        *axes.get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        loc="outside lower center",
        ncols=2,
    )
    return figure


KINDS: dict[str, Callable[..., Figure]] = {
    "throughput": throughput,
    "memory": memory,
    "tradeoff": tradeoff,
    "roofline": roofline,
}


def save(figure: Figure, stem: str, folder: str | Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg to `folder`; their paths. Equal figures make equal files.

    Raises:
        BadInput: the folder cannot be written.
    """
    paths = [writable_folder(Path(folder)) / f"{stem}.{kind}" for kind in ("png", "svg")]
    try:
        with matplotlib.rc_context({"svg.hashsalt": "colqwen-lab"}):
            figure.savefig(paths[0], dpi=DPI)
            figure.savefig(paths[1], metadata={"Date": None})
    except OSError as error:
        raise BadInput(
            f"cannot write {stem} to {folder}: {error.strerror}; name a folder that can be written"
        ) from None
    return paths


# ---------------------------------------------------------------- parts


def framed(title: str, conditions: str, height: float = 4.6) -> tuple[Figure, Axes]:
    """A figure with its title, and below that where its figures come from."""
    figure = Plot(figsize=(7.5, height), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=12)
    axes.set_title(conditions, fontsize=8, color="0.3", wrap=True)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def spread(value: float, low: float | None, high: float | None) -> tuple[float, float]:
    """An interval as an error bar has it, none where there is none.

    A percentile interval may leave the estimate just outside when the samples are few.
    """
    return max(0.0, value - (value if low is None else low)), max(
        0.0, (value if high is None else high) - value
    )


def _axes(series: Sequence[Series], title: str) -> tuple[Figure, Axes]:
    return framed(title, conditions([cell for one in series for cell in one.cells]))


def _overheads(axes: Axes, rows: Sequence[Overhead], **style: Any) -> None:
    bars = [spread(row.overhead_percent, row.low, row.high) for row in rows]
    points = [row.batch_size for row in rows], [row.overhead_percent for row in rows]
    axes.errorbar(*points, yerr=np.reshape(bars, (-1, 2)).T, capsize=3, **style)


def _zero(axes: Axes) -> None:
    axes.axhspan(
        -SAME_PERCENT, SAME_PERCENT, color="0.85", label=f"±{SAME_PERCENT:g} %: not told apart"
    )
    axes.axhline(0, color="0.3", linewidth=1)


def _styles(series: Sequence[Series]) -> list[tuple[Series, dict[str, Any]]]:
    """Each series with its line: colour and marker by variant, dashes by how often the variant came before."""
    free = iter(FREE * len(series))
    by_variant, seen, styles = dict(FIXED), Counter[str](), []
    for one in series:
        if one.variant not in by_variant:
            by_variant[one.variant] = next(free)
        color, marker = by_variant[one.variant]
        dashes = DASHES[seen[one.variant] % len(DASHES)]
        seen[one.variant] += 1
        styles.append(
            (one, {"color": color, "marker": marker, "linestyle": dashes, "label": one.label})
        )
    return styles


def _batch_axis(axes: Axes, series: Sequence[Series]) -> None:
    """Powers of two, a tick at each batch size; a cell without a figure is an x on the axis, named by its status."""
    batches = sorted({cell.batch_size for one in series for cell in one.cells})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(batches))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("batch size")
    for nth, (one, style) in enumerate(_styles(series)):
        for cell in one.lost:
            height = 0.03 + 0.06 * nth
            where = axes.get_xaxis_transform()
            axes.plot(
                [cell.batch_size],
                [height],
                "x",
                color=style["color"],
                transform=where,
                clip_on=False,
                zorder=6,
            )
            axes.annotate(
                "OOM" if cell.status == "oom" else cell.status,
                (cell.batch_size, height),
                xycoords=where,
                xytext=(-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                color=style["color"],
            )


def _legend(figure: Figure, axes: Axes) -> Figure:
    """A legend of the lines without their error bars."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        plain = [
            handle[0] if isinstance(handle, ErrorbarContainer) else handle for handle in handles
        ]
        axes.legend(plain, labels, frameon=False, fontsize=9, handlelength=4)
    return figure


def _unit(series: Sequence[Series]) -> str:
    return (
        " and ".join(dict.fromkeys(unit(cell) for one in series for cell in one.cells)) or "items/s"
    )


def _largest_peak(series: Sequence[Series]) -> int:
    return max((peak(cell) for one in series for cell in one.sized.values()), default=0)


def _scale(series: Sequence[Series]) -> tuple[int, str]:
    return (GIB, "GiB") if _largest_peak(series) >= GIB else (MIB, "MiB")


def _cards_drawn(largest_peak_bytes: int, cards: Iterable[float] | None) -> list[float]:
    """The cards, in GB, that a memory plot has room for."""
    room = sorted(
        card for card in cards or CARDS_GB if card * GIB <= OUT_OF_REACH * largest_peak_bytes
    )
    return (
        room
        if cards
        else [card for card in room if card * GIB <= 2 * largest_peak_bytes] or room[:1]
    )
