"""Figures of fidelity: the loss by weight size, every metric of a variant, pages side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from itertools import chain, cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from colqwen_lab.analysis.fidelity import Fidelities, Loss
from colqwen_lab.analysis.plots import (
    FIXED,
    FREE,
    Plot,
    band,
    difference_line,
    framed,
    intervals,
    legend,
    note,
    plain_ticks,
)
from colqwen_lab.errors import BadInput
from colqwen_lab.records import MIB

PAGES = 5  # of a ranking
KINDS_OF_WEIGHTS = {  # colour and marker by the origin of the weights
    "base": FIXED["base"],
    "tuned by AutoRound": FIXED["awq"],
    "rounded without tuning": FREE[3],
}


def frontier(fidelities: Fidelities, metric: str = "nDCG@5") -> Figure:
    """A figure of the difference to base in `metric` by the MiB of the weights, with intervals."""
    title = f"{metric} compared with base, by weight size"
    figure, axes = framed(title, fidelities.conditions(), 5.2)
    band(axes, fidelities.margin, f"±{fidelities.margin:g}: the margin")
    best = fidelities.frontier(metric)
    _frontier(axes, {r.weights_bytes / MIB: fidelities.loss(r, metric).difference for r in best})
    named = []
    for record in (each for each in fidelities.records if not each.index_format):
        row, x = fidelities.loss(record, metric), record.weights_bytes / MIB
        number = 0 if record is fidelities.base else 2 if record.iters == 0 else 1
        label, look = [*KINDS_OF_WEIGHTS.items()][number]
        difference_line(axes, {x: _point(row)}, look, label=label, linestyle="")
        if number < 2:
            named.append((x, max(row.difference, row.high or -1), record.label, look[0]))
    axes.margins(x=0.08, y=0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.45 * (high - low))
    # The labels stand in a row above all points, in the order of the points.
    text: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8}
    text |= {"arrowprops": {"arrowstyle": "-", "color": "0.75", "shrinkB": 0, "relpos": (0.5, 0)}}
    text |= {"textcoords": "axes fraction"}
    places = np.linspace(0.04, 0.96, len(named))
    for place, (x, y, label, colour) in zip(places, sorted(named), strict=True):
        axes.annotate(label, (x, y), (place, 0.8), color=colour, **text)
    axes.set(xlabel="weights, MiB", ylabel=f"{metric}, difference to base")
    return legend(figure, axes)


def metrics(fidelities: Fidelities, label: str = "") -> Figure:
    """A figure of the difference to base in every metric, with intervals; filled: significant."""
    record = fidelities.pick(label)
    losses = fidelities.all_losses(record)
    figure, axes = framed(f"{record.label} compared with base", fidelities.conditions())
    band(axes, fidelities.margin, f"±{fidelities.margin:g}: the margin")
    difference_line(axes, dict(enumerate(map(_point, losses))), FIXED["awq"], linestyle="")
    axes.set_xticks(range(len(losses)), [loss.metric for loss in losses], fontsize=8)
    axes.set_ylabel("difference to base, mean over queries")
    return legend(figure, axes)


def index(fidelities: Fidelities, metric: str = "nDCG@5") -> Figure:
    """A figure of `metric` by the bytes of a stored page: a colour a variant, a label a format."""
    figure, axes = framed(f"{metric} by the size of the index", fidelities.conditions(), 5.2)
    sizes = {r.label: r.page_bytes / 1000 for r in fidelities.records if r.page_bytes}
    records = [record for record in fidelities.records if record.label in sizes]
    variants = dict.fromkeys(record.variant for record in records)
    looks = dict(zip(variants, chain(FIXED.values(), cycle(FREE)), strict=False))
    for record in records:
        row, (colour, marker) = fidelities.loss(record, metric), looks[record.variant]
        point = [row.variant, *(None if e is None else row.base + e for e in (row.low, row.high))]
        style = {"color": colour, "marker": marker, "linestyle": "", "label": record.variant}
        x = sizes[record.label]
        intervals(axes, {x: point}, **style)
        note(
            axes,
            record.index_format or "16 bits",
            (x, row.variant),
            (4, 4),
            color=colour,
            fontsize=7,
        )
    best = fidelities.frontier(metric, index=True)
    _frontier(axes, {sizes[r.label]: fidelities.loss(r, metric).variant for r in best})
    axes.set(xscale="log", xlabel="index, kB a page", ylabel=metric)
    plain_ticks(axes.xaxis)
    axes.margins(x=0.12)
    return legend(figure, axes)


def _point(loss: Loss) -> tuple[Any, ...]:
    return loss.difference, loss.low, loss.high, loss.verdict


def _frontier(axes: Axes, points: dict[float, float]) -> None:
    label = "frontier: nothing smaller is as good"
    axes.plot([*points], [*points.values()], "--", color="0.5", linewidth=1, label=label)


KINDS: dict[str, Callable[..., Figure]] = {"frontier": frontier, "index": index, "metrics": metrics}


def pictures(fidelities: Fidelities, which: str = "worst", label: str = "") -> Figure:
    """A figure of the first pages of the worst or best query: base's ranking above the variant's.

    Raises BadInput for another query, or for records from a file, which hold no pages.
    """
    base, record, corpus = fidelities.base, fidelities.pick(label), fidelities.corpus
    query = fidelities.query(which, label)
    if corpus is None:
        raise BadInput("records from a file hold no pages; run lab.fidelity(...) to see them")
    answers = corpus.relevance[corpus.query_ids[query]]
    figure = Plot(figsize=(6.4, 4.3), layout="constrained")
    after, before = (side.values["nDCG@5"][query] for side in (record, base))
    figure.suptitle(
        f"The {which} query: “{textwrap.shorten(corpus.queries[query], 80)}”\n"
        f"nDCG@5 of {record.label} {after:.2f} against {before:.2f} of base\n"
        + textwrap.fill(fidelities.conditions(), 90),
        fontsize=9,
    )
    grid = figure.subplots(2, min(PAGES, len(corpus.page_ids)), squeeze=False)
    for row, side in zip(grid, (base, record), strict=True):
        row[0].set_ylabel(side.label)
        for place, (axes, page_id) in enumerate(zip(row, side.top[query], strict=False), 1):
            relevant = answers.get(page_id, 0) > 0
            axes.set_title(f"{place}: {page_id}{', answers' if relevant else ''}", fontsize=8)
            axes.set(xticks=[], yticks=[])
            frame = ("#009E73", 4) if relevant else ("0.75", 1)
            axes.spines[:].set(color=frame[0], linewidth=frame[1])
            page = corpus.page(page_id)
            if isinstance(page, str):
                text = textwrap.fill(textwrap.shorten(page, 400), 34)
                axes.text(0.04, 0.96, text, va="top", fontsize=8)
            else:
                axes.imshow(page)
    return figure
