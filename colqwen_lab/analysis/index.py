"""What an index costs: the smallest format that loses nothing, and how long a search takes.

A million pages are extrapolated only where time over pages is a straight line.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from colqwen_lab import analysis
from colqwen_lab.analysis import render
from colqwen_lab.analysis.fidelity import Fidelities
from colqwen_lab.analysis.table import device
from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.records import read_rows
from colqwen_lab.retrieval.record import Fidelity, SearchTime

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MILLION = 10**6
SIXTEEN_BITS = "16 bits"  # as the model gives a page
#: A line is straight if it passes each median of three sizes or more within this share. It is
#: extended to at most a hundred times the largest size.
STRAIGHT, FEWEST_SIZES, REACH = 0.05, 3, 100


def formats(fidelities: Fidelities, frontier: bool = False) -> pd.DataFrame:
    """One row a variant and format, by the bytes of a page: nDCG@5 with its verdict, recall.

    With `frontier` only those that nothing smaller matches in nDCG@5.
    """
    records = [record for record in fidelities.records if record.page_bytes]
    if frontier:
        records = [record for record in fidelities.frontier(index=True) if record.page_bytes]
    rows = [
        {
            "variant": record.variant,
            "format": record.index_format or SIXTEEN_BITS,
            "kB a page": render.rounded(_bytes(record) / 1000),
            **fidelities.ndcg(record),
            **{name: np.mean(record.values[name]) for name in ("nDCG@10", "recall@5")},
        }
        for record in sorted(records, key=_bytes)
    ]
    return render.screen(pd.DataFrame(rows).round(4))


def sizes(fidelities: Fidelities, price: str | float = "") -> pd.DataFrame:
    """One row a format of base: bytes of a page, GB of a million pages, and their price.

    `price` is the price of a GB for a month.
    """
    try:
        a_gb = float(price) if str(price) else None
    except ValueError:
        raise BadInput(f"price must be a number, of a GB for a month, got {price!r}") from None
    rows = []
    base = _bytes(fidelities.base)
    for record in fidelities.records:
        if record.variant == fidelities.base.variant and record.page_bytes:
            gigabytes = record.page_bytes * MILLION / 1e9
            row = {
                "format": record.index_format or SIXTEEN_BITS,
                "kB a page": render.rounded(record.page_bytes / 1000),
                "% of 16 bits": round(100 * record.page_bytes / base, 1),
                "GB a million pages": render.rounded(gigabytes),
            }
            cost = {} if a_gb is None else {"a month": round(gigabytes * a_gb, 2)}
            rows.append(row | cost)
    return render.screen(pd.DataFrame(rows).sort_values("kB a page", ascending=False))


def smallest(fidelities: Fidelities) -> str:
    """The smallest index whose nDCG@5 is the same as base's in 16 bits, and what became of smaller.

    The verdicts are those of the intervals.
    """
    records = sorted((r for r in fidelities.records if r.page_bytes), key=_bytes)
    losses = {record.label: fidelities.loss(record, "nDCG@5") for record in records}
    good = [record for record in records if losses[record.label].verdict in ("same", "better")]
    best, base = good[0], fidelities.base
    if best is base:
        first = f"No smaller index is shown to find pages as well as base in {SIXTEEN_BITS}."
    else:
        loss, page_bytes = losses[best.label], _bytes(best)
        first = (
            f"{best.label} is the smallest index that finds pages as well as base in "
            f"{SIXTEEN_BITS}: {render.short(page_bytes / 1000)} kB a page, "
            f"{100 * page_bytes / _bytes(base):.0f} % of {render.short(_bytes(base) / 1000)} kB, "
            f"with nDCG@5 {loss.variant:.3f} against {loss.base:.3f}, difference "
            f"{loss.difference:+.3f} {loss.interval}, within {fidelities.margin:g}."
        )
    smaller: dict[str, list[str]] = {}
    for record in records[: records.index(best)]:
        smaller.setdefault(losses[record.label].verdict, []).append(record.label)
    rest = [f"Smaller and {word}: {', '.join(labels)}." for word, labels in smaller.items()]
    return " ".join([first, *rest])


def _bytes(record: Fidelity) -> float:
    return record.page_bytes or 0


@dataclass(frozen=True)
class Line:
    """Search times of one format, kernel and number of queries over the number of pages.

    `million_s` is the time for a million pages on the least-squares line of relative errors; None
    where nothing is extrapolated, for the `reason`. `deviation` is the largest relative error.
    """

    records: tuple[SearchTime, ...]
    million_s: float | None
    deviation: float | None
    reason: str

    @classmethod
    def through(cls, records: list[SearchTime]) -> Self:
        """The line of records that differ in their pages alone."""
        ordered = tuple(sorted(records, key=lambda record: record.pages))
        if len(ordered) < FEWEST_SIZES:
            return cls(ordered, None, None, f"fewer than {FEWEST_SIZES} sizes")
        pages = np.array([float(record.pages) for record in ordered])
        times = np.array([1 / record.rate.median for record in ordered])
        line = np.polynomial.Polynomial.fit(pages, times, 1, w=1 / times)
        deviation = float(abs(line(pages) / times - 1).max())
        off = f"off by {100 * deviation:.1f} % at most"
        if deviation > STRAIGHT:
            return cls(ordered, None, deviation, f"not straight, {off}")
        if pages[-1] * REACH < MILLION:
            return cls(ordered, None, deviation, f"fewer than {MILLION // REACH:,} pages")
        return cls(ordered, float(line(MILLION)), deviation, f"straight, {off}")

    @property
    def label(self) -> str:
        """Format, number of queries and kernel."""
        last = self.records[-1]
        return f"{last.index_format}, {many(last.queries)}, {last.kernel}"


@dataclass(frozen=True, repr=False)
class SearchTimes:
    """Searches of synthetic indexes, of one shape of page on one machine."""

    records: tuple[SearchTime, ...]

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """The records of a file of the newest shape and machine. Raises BadInput if none."""
        rows = read_rows(source, SearchTime, "search-times")
        newest = max(rows, key=lambda row: row.environment.started_at or "").run
        return cls(tuple(row for row in rows if row.run == newest))

    @property
    def lines(self) -> list[Line]:
        """A line for each format, kernel and number of queries."""

        def key(record: SearchTime) -> tuple[Any, ...]:
            return order.index(record.index_format), record.queries, record.kernel

        order = [record.index_format for record in self.records]
        return [Line.through([*group]) for _, group in groupby(sorted(self.records, key=key), key)]

    def table(self) -> pd.DataFrame:
        """One row a search: time with its interval, bytes per second, share of a copy's."""
        return render.screen([self._row(r) for line in self.lines for r in line.records])

    @staticmethod
    def _row(record: SearchTime) -> dict[str, Any]:
        share = record.limit_share
        return {
            "format": record.index_format,
            "queries": record.queries,
            "kernel": record.kernel,
            "pages": record.pages,
            "ms": render.rounded(1000 / record.rate.median),
            "95 % interval": _interval(record),
            "GB/s": render.rounded(record.bytes_per_s / 1e9),
            "% of copy": None if share is None else round(100 * share, 1),
            "disturbed": "yes" if record.interference else "",
        }

    def million(self) -> pd.DataFrame:
        """One row a line: GB of a million pages, and the seconds of a search, extrapolated."""
        rows = []
        for line in self.lines:
            last, seconds = line.records[-1], line.million_s
            rows.append(
                {
                    "format": last.index_format,
                    "queries": last.queries,
                    "kernel": last.kernel,
                    "GB": render.rounded(last.page_bytes * MILLION / 1e9),
                    "extrapolated s": None if seconds is None else render.rounded(seconds),
                    "line through the sizes": line.reason,
                }
            )
        return render.screen(rows)

    def verdict(self) -> str:
        """A sentence a number of queries: the fastest search of the most pages, by format."""
        sentences = []
        for queries in sorted({record.queries for record in self.records}):
            lasts = [line.records[-1] for line in self.lines]
            lasts = [record for record in lasts if record.queries == queries]
            most = max(record.pages for record in lasts)
            best: dict[str, SearchTime] = {}
            for record in sorted(lasts, key=lambda record: -record.rate.median):
                if record.pages == most:
                    best.setdefault(record.index_format, record)
            times = ", ".join(map(_time, best.values()))
            sentences.append(f"{many(queries).capitalize()} over {most:,} pages: {times}.")
        return " ".join(sentences)

    def plot(self, queries: int = 0) -> Figure:
        """A figure of search times by the number of pages; dotted where extrapolated.

        `queries` is how many at once; 0 is the fewest. Raises BadInput if none has so many.
        """
        counts = sorted({record.queries for record in self.records})
        asked = one_of("queries", str(queries or counts[0]), [*map(str, counts)])
        return analysis.index_plots.search_times(self, int(asked))

    def conditions(self) -> str:
        """Where the figures come from, for titles."""
        first = self.records[0]
        count = sum(bool(record.interference) for record in self.records)
        parts = [
            f"measured · {device(first.environment)} · synthetic pages",
            f"{first.vectors:,} x {first.dims} values a page · {first.query_tokens} tokens a query",
            f"{count} of {len(self.records)} disturbed" if count else "",
        ]
        return " · ".join(filter(None, parts))

    def to_dict(self) -> dict[str, Any]:
        """The records and the lines, ready for JSON."""
        rows = [
            record.model_dump(by_alias=True, exclude={"step_s"})
            | {"searches_per_s": record.rate.model_dump(), "limit_share": record.limit_share}
            for record in self.records
        ]
        lines = [
            {"line": line.label, "million_s": line.million_s, "reason": line.reason}
            for line in self.lines
        ]
        return {"records": rows, "lines": lines, "verdict": self.verdict()}

    def __repr__(self) -> str:
        return f"{self.conditions()}\n{self.verdict()}"


def many(queries: int) -> str:
    """`one query`, or `64 queries`."""
    return "one query" if queries == 1 else f"{queries} queries"


def _time(record: SearchTime) -> str:
    """`6.8 ms [6.7 to 6.9] in int8 (88 % of the copy bandwidth)`."""
    milliseconds = f"{render.short(1000 / record.rate.median)} ms {_interval(record)}".rstrip()
    share = record.limit_share
    limit = f" ({100 * share:.0f} % of the copy bandwidth)" if share else ""
    return f"{milliseconds} in {record.index_format}{limit}"


def _interval(record: SearchTime) -> str:
    rate = record.rate
    if not rate.low or not rate.high:
        return ""
    low, high = 1000 / rate.high, 1000 / rate.low
    return render.interval(low, high, 1 if low >= 100 else 2 if low >= 10 else 3)
