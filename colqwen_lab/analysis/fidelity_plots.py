"""Figures of fidelity: what is lost over bytes, every metric with its interval, and pages before and after."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from colqwen_lab.analysis.plots import FIXED, FREE, Plot, framed, spread
from colqwen_lab.records import MIB
from colqwen_lab.retrieval.record import Fidelity

if TYPE_CHECKING:
    from colqwen_lab.analysis.fidelity import Fidelities
    from colqwen_lab.retrieval.data import Corpus

#: Pages shown of each ranking, and the width in pixels that each is drawn at.
SHOWN, THUMBNAIL = 5, 130
ANSWERS, DOES_NOT = "#009E73", "0.75"
#: What a label on its side takes of the width of a figure.
LABEL = 0.03


def _conditions(found: Fidelities) -> str:
    return f"measured · {found.conditions()} · budget {found.base.visual_tokens} visual tokens"


def frontier(found: Fidelities, metric: str = "nDCG@5") -> Figure:
    """The loss in `metric` over the bytes of the weights, with its interval; tuned and plainly rounded models apart."""
    figure, axes = framed(
        f"What is lost of {metric} over what the weights take", _conditions(found), 5.2
    )
    axes.axhspan(-found.margin, found.margin, color="0.88", label=f"±{found.margin:g}: the margin")
    best = found.frontier(metric)
    axes.plot(
        [one.weights_bytes / MIB for one in best],
        [found.loss(one, metric).difference for one in best],
        color="0.5",
        linewidth=1,
        linestyle="--",
        label="frontier: nothing smaller is as good",
        zorder=1,
    )
    tops = {}
    for record in found.records:
        row = found.loss(record, metric)
        plain = record.iters == 0
        colour, marker = (
            FIXED["base"] if record is found.base else FREE[3] if plain else FIXED["awq"]
        )
        bars = spread(row.difference, row.low, row.high)
        at = record.weights_bytes / MIB
        axes.errorbar(
            at, row.difference, [[end] for end in bars], color=colour, marker=marker, capsize=3
        )
        if not plain:
            tops[at, row.difference + bars[1]] = record.label, colour
    kinds = {one.iters == 0 for one in found.others}
    others = [
        ("tuned by AutoRound", FIXED["awq"], False in kinds),
        ("rounded plainly", FREE[3], True in kinds),
    ]
    for name, (colour, marker), there in [("base", FIXED["base"], True), *others]:
        if there:
            axes.plot([], [], color=colour, marker=marker, linestyle="", label=name)
    axes.margins(x=0.08, y=0.1)
    _name(axes, tops)
    axes.set_xlabel("weights, MiB")
    axes.set_ylabel(f"{metric}, difference to base")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def _name(axes: Axes, tops: dict[tuple[float, float], tuple[str, str]]) -> None:
    """Label the points in a row above them all, side by side, each with a line to the upper end of its interval."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.45 * (high - low))
    left, right = axes.get_xlim()
    slots: list[float] = []
    for at, _ in sorted(tops):
        slots.append(max([(at - left) / (right - left), *(slot + LABEL for slot in slots[-1:])]))
    for nth, point in enumerate(sorted(tops)):
        label, colour = tops[point]
        axes.annotate(
            label,
            point,
            (min(slots[nth], 0.98 - LABEL * (len(slots) - 1 - nth)), 0.8),
            textcoords="axes fraction",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.7, "shrinkB": 0},
        )


def metrics(found: Fidelities, label: str = "") -> Figure:
    """Every metric's difference to BASE with its interval; a filled marker is told apart from zero."""
    record = found.pick(label)
    rows = found.all_losses(record)[::-1]
    figure, axes = framed(f"{record.label} against base, metric by metric", _conditions(found), 3.8)
    colour, marker = FIXED["awq"]
    axes.axvspan(-found.margin, found.margin, color="0.88", label=f"±{found.margin:g}: the margin")
    axes.axvline(0, color="0.3", linewidth=1)
    for place, row in enumerate(rows):
        bars = [[end] for end in spread(row.difference, row.low, row.high)]
        face = colour if row.verdict in ("worse", "better") else "white"
        axes.errorbar(
            row.difference, place, xerr=bars, color=colour, marker=marker, mfc=face, capsize=3
        )
    axes.set_yticks(range(len(rows)), [row.metric for row in rows])
    axes.set_xlabel("difference to base, mean over queries, 95 % interval")
    axes.legend(frameon=False, fontsize=8)
    return figure


KINDS: dict[str, Callable[..., Figure]] = {"frontier": frontier, "metrics": metrics}


def pictures(found: Fidelities, corpus: Corpus, query: int, record: Fidelity, which: str) -> Figure:
    """The first pages for one query in BASE's order and in the variant's."""
    answers = corpus.relevance[corpus.query_ids[query]]
    number = {page: place for place, page in enumerate(corpus.page_ids)}
    shown = min(SHOWN, len(corpus.page_ids))
    figure = Plot(figsize=(6.4, 4.3), layout="constrained")
    before, after = (one.values["nDCG@5"][query] for one in (found.base, record))
    said = f"nDCG@5 {before:.2f} to {after:.2f}"
    said = f"The {which} query: “{textwrap.shorten(corpus.queries[query], 80)}”\n{record.label} against base, {said}"
    figure.suptitle(f"{said}\n{textwrap.fill(_conditions(found), 90)}", fontsize=9)
    grid = figure.subplots(2, shown, squeeze=False)
    for row, one in zip(grid, (found.base, record), strict=True):
        row[0].set_ylabel(one.label)
        for place, (axes, page) in enumerate(zip(row, one.top[query], strict=False)):
            _page(axes, corpus.page(number[page]))
            right = answers.get(page, 0) > 0
            axes.set_title(f"{place + 1}: {page}{', answers' if right else ''}", fontsize=8)
            for side in axes.spines.values():
                side.set(color=ANSWERS if right else DOES_NOT, linewidth=4 if right else 1)
    return figure


def _page(axes: Axes, page: Image.Image | str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if isinstance(page, str):
        axes.text(0.04, 0.96, textwrap.fill(textwrap.shorten(page, 400), 34), va="top", fontsize=8)
    else:
        small = page.copy()
        small.thumbnail((THUMBNAIL, 2 * THUMBNAIL))
        axes.imshow(small)
