"""A figure of search times over the number of pages."""

from __future__ import annotations

from itertools import chain, cycle
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from colqwen_lab.analysis.plots import DASHES, FIXED, FREE, framed, intervals, legend, plain_ticks

if TYPE_CHECKING:
    from colqwen_lab.analysis.index import SearchTimes


def search_times(times: SearchTimes) -> Figure:
    """A figure of milliseconds a search by pages: a colour a format, a line a number of queries."""
    figure, axes = framed("Search time by the number of pages", times.conditions())
    lines = times.lines
    formats = dict.fromkeys(line.records[0].index_format for line in lines)
    looks = dict(zip(formats, cycle(chain(FIXED.values(), FREE)), strict=False))
    kinds = dict.fromkeys((line.records[0].queries, line.records[0].kernel) for line in lines)
    dashes = dict(zip(kinds, cycle(DASHES), strict=False))
    for line in lines:
        last = line.records[-1]
        colour, marker = looks[last.index_format]
        style = {"color": colour, "marker": marker, "label": line.label}
        rates = {r.pages: (r.rate.median, r.rate.high, r.rate.low) for r in line.records}
        points = {x: [1000 / rate if rate else None for rate in own] for x, own in rates.items()}
        dash = dashes[last.queries, last.kernel]
        intervals(axes, points, linestyle=dash, **style)
        if line.million_s:
            ends = [last.pages, 10**6], [1000 / last.rate.median, 1000 * line.million_s]
            axes.plot(*ends, ":", color=colour, linewidth=1, label="dotted: extrapolated")
    axes.set(xscale="log", yscale="log", xlabel="pages in the index", ylabel="ms a search")
    for axis in (axes.xaxis, axes.yaxis):
        plain_ticks(axis)
    return legend(figure, axes)
