"""A figure of search times over the number of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from colqwen_lab.analysis.plots import DASHES, FIXED, FREE, framed, intervals, legend, plain_ticks

if TYPE_CHECKING:
    from colqwen_lab.analysis.index import SearchTimes


def search_times(times: SearchTimes, queries: int) -> Figure:
    """A figure of milliseconds a search by pages: a line a format, in its fastest kernel."""
    title = f"Search time of {'one query' if queries == 1 else f'{queries} queries'} by pages"
    figure, axes = framed(title, times.conditions())
    lines = [line for line in times.lines if line.records[0].queries == queries]
    lines.sort(key=lambda line: line.records[-1].rate.median)
    fastest = {line.records[0].index_format: line for line in lines}
    looks = [*FIXED.values(), *FREE]
    for number, (name, line) in enumerate(fastest.items()):
        last, (colour, marker) = line.records[-1], looks[number % len(looks)]
        style = {"color": colour, "marker": marker, "label": f"{name}, {last.kernel}"}
        rates = {r.pages: (r.rate.median, r.rate.high, r.rate.low) for r in line.records}
        points = {x: [1000 / rate if rate else None for rate in own] for x, own in rates.items()}
        intervals(axes, points, linestyle=DASHES[number // len(looks)], **style)
        if line.million_s:
            ends = [last.pages, 10**6], [1000 / last.rate.median, 1000 * line.million_s]
            axes.plot(*ends, ":", color=colour, linewidth=1, label="dotted: extrapolated")
    axes.set(xscale="log", yscale="log", xlabel="pages in the index", ylabel="ms a search")
    plain_ticks(axes.yaxis)
    axes.xaxis.set(major_formatter="{x:,.0f}", minor_formatter=NullFormatter())
    return legend(figure, axes)
