"""How well a variant retrieves compared with base, from fidelity records: intervals and verdicts.

A difference is the variant's mean over queries minus base's. Its 95 % interval is a bootstrap over
the queries, paired: both sides share the resampled queries, so their difficulty cancels out.
Queries with the same relevant pages, as phrasings of one question, are resampled together. Where
all differences are equal, the interval is the rule of three's, 3/n on either side (Hanley and
Lippman-Hand 1983).
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pandas as pd

from colqwen_lab import analysis
from colqwen_lab.analysis import render
from colqwen_lab.analysis.speed import bootstrapped
from colqwen_lab.analysis.table import Results, device, peak, rate, unit
from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.retrieval.record import NAMES, Fidelity, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from colqwen_lab.retrieval.data import Corpus

MARGIN = 0.01  # smaller differences do not count, in the metric's own unit
MIN_QUERIES = 30  # with fewer, the bootstrap interval covers far less than 95 %
LOWER_IS_BETTER = ("score error",)
CLOSENESS = ("overlap@5", "Kendall's tau", "score error")  # columns of the table
LITTLE = 0.1  # below this mean nDCG@5 of base there is little to lose


class Loss(NamedTuple):
    """One metric of a variant and of base: both means, their difference and its 95 % interval.

    same: the interval is within the margin. worse, better: the difference is at least the margin
    and the interval excludes zero. inconclusive: neither; `reason` says if more queries are needed.
    """

    metric: str
    base: float
    variant: float
    difference: float
    low: float | None
    high: float | None
    verdict: str
    reason: str = ""

    @property
    def interval(self) -> str:
        """`[-0.012 to +0.003]`, or empty without an interval."""
        return render.interval(self.low, self.high, 3, "+")


def loss(base: Fidelity, record: Fidelity, metric: str, margin: float = MARGIN) -> Loss:
    """The loss of `record` against `base` in one metric. Raises BadInput if their inputs differ."""
    if base.inputs != record.inputs:
        same = "the same data, queries, pages, size and visual tokens"
        raise BadInput(f"{record.label} and base must have {same}; run both in one command")
    before, after = (np.array(side.values[metric]) for side in (base, record))
    changes = after - before
    mean = float(changes.mean())
    if base.query_groups:  # a group is one sample: its deviation, as a share of all queries
        deviations = np.bincount(base.query_groups, changes - mean)
        changes = mean + deviations * len(deviations) / len(changes)
    count = len(changes)
    low = high = None
    verdict, reason = "inconclusive", ""
    if record is base:
        low = high = 0.0
    elif count < MIN_QUERIES:
        reason = f"{count} queries are too few; use at least {MIN_QUERIES}."
    elif np.ptp(changes) < 1e-9:
        low, high = mean - 3 / count, mean + 3 / count
        change = "No query changed" if abs(mean) < 1e-9 else "All queries changed alike"
        bound = f"rule out a {100 * max(-low, high):.0f} % loss"
        reason = f"{change}; {count} queries are too few to {bound}."
    else:
        low, high = bootstrapped((changes,), np.mean)
    if low is not None and high is not None:
        if -margin <= low and high <= margin:
            verdict, reason = "same", ""
        elif abs(mean) >= margin and low * high > 0:
            better = (mean > 0) != (metric in LOWER_IS_BETTER)
            verdict, reason = "better" if better else "worse", ""
    return Loss(metric, float(before.mean()), float(after.mean()), mean, low, high, verdict, reason)


@dataclass(frozen=True, repr=False)
class Fidelities:
    """Base and its variants on one data set. `corpus` holds the pages, if they are at hand."""

    records: tuple[Fidelity, ...]
    margin: float = MARGIN
    corpus: Corpus | None = None

    def __post_init__(self) -> None:
        if not self.base.is_base:
            raise BadInput(f"the first record must be of base, got {self.base.label}; run base too")
        for record in self.records:
            self.loss(record, NAMES[0])  # raises if the inputs differ

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """The newest records of a file that share inputs, machine and base weights."""
        sets: dict[str, dict[str, Fidelity]] = {}
        for row in sorted(read(source), key=lambda row: row.environment.started_at or ""):
            shared = f"{row.inputs} {row.environment.identity()}"
            newest = sets.setdefault(shared, {})
            if row.is_base and newest.get("base", row).weights != row.weights:
                newest.clear()
            newest[row.label] = row
        return cls(tuple(sorted(newest.values(), key=lambda row: not row.is_base)))

    @property
    def base(self) -> Fidelity:
        return self.records[0]

    @property
    def others(self) -> tuple[Fidelity, ...]:
        return self.records[1:]

    def pick(self, label: str = "") -> Fidelity:
        """The record with this label; by default the first variant. Raises BadInput."""
        by_label = {record.label: record for record in self.records}
        return by_label[one_of("variant", label or self.records[:2][-1].label, by_label)]

    def loss(self, record: Fidelity, metric: str) -> Loss:
        """The loss of `record` in one metric. Raises BadInput for an unknown metric."""
        return loss(self.base, record, one_of("metric", metric, NAMES), self.margin)

    def all_losses(self, record: Fidelity) -> list[Loss]:
        """The losses of `record` in every metric."""
        return [self.loss(record, metric) for metric in NAMES]

    def table(self) -> pd.DataFrame:
        """One row a variant: bytes, nDCG@5 and its loss, closeness to base's scores, speed."""
        indexed = any(record.index_format for record in self.records)
        rows = []
        for record in self.records:
            speed = record.pages_per_s
            row = {"variant": record.label, "weights MiB": render.in_mib(record.weights_bytes)}
            if indexed and record.page_bytes:
                row |= {"index kB a page": render.rounded(record.page_bytes / 1000)}
            row |= self.ndcg(record) | {name: np.mean(record.values[name]) for name in CLOSENESS}
            row |= {"page cosine, median": record.page_cosine.median}
            row |= {"page cosine, min": record.page_cosine.least}
            row |= {"pages/s": speed and render.rounded(speed.median)}
            rows.append(row | {"kernel": ", ".join(record.backend.engaged)})
        return render.screen(pd.DataFrame(rows).round(4))

    def ndcg(self, record: Fidelity) -> dict[str, Any]:
        """The columns of a table for nDCG@5: mean, difference to base, interval, verdict."""
        row = self.loss(record, "nDCG@5")
        figures = {"nDCG@5": row.variant, "difference": row.difference}
        return figures | {"95 % interval": row.interval, "verdict": row.verdict}

    def losses(self, label: str = "") -> pd.DataFrame:
        """One row a metric of one variant: both means, the difference with interval and verdict."""
        record = self.pick(label)
        table = pd.DataFrame(self.all_losses(record)).round(4)
        intervals = [loss.interval for loss in self.all_losses(record)]
        table = table.assign(low=intervals).drop(columns="high")
        return render.screen(
            table.rename(columns={"variant": record.label, "low": "95 % interval"})
        )

    def cosines(self) -> pd.DataFrame:
        """Two rows a variant: cosines of its query and page token embeddings to base's."""
        rows = [
            {"variant": record.label, "of": kind, **cosines.model_dump()}
            for record in self.others
            for kind, cosines in (("queries", record.query_cosine), ("pages", record.page_cosine))
        ]
        return render.screen(pd.DataFrame(rows).round(4))

    def frontier(self, metric: str = "nDCG@5", index: bool = False) -> list[Fidelity]:
        """The records that none with fewer bytes matches in the mean of `metric`, by bytes.

        The bytes are those of the weights, or with `index` those of a stored page.
        """
        sign = -1 if one_of("metric", metric, NAMES) in LOWER_IS_BETTER else 1
        size = attrgetter("page_bytes" if index else "weights_bytes")
        records = [r for r in self.records if (r.page_bytes if index else not r.index_format)]

        def score(record: Fidelity) -> float:
            return sign * float(np.mean(record.values[metric]))

        frontier: list[Fidelity] = []
        for record in sorted(records, key=lambda record: (size(record), -score(record))):
            if not frontier or score(record) > score(frontier[-1]):
                frontier.append(record)
        return frontier

    def plot(self, kind: str = "frontier", **options: Any) -> Figure:
        """A figure: frontier (loss by weights), index (by a page's bytes; both `metric="nDCG@5"`),
        or metrics (all of one variant; `label="awq"`).
        """
        kinds = analysis.fidelity_plots.KINDS
        return kinds[one_of("plot", kind, kinds)](self, **options)

    def query(self, which: str = "worst", label: str = "") -> int:
        """The index of the query whose nDCG@5 fell most (worst) or rose most (best).

        Kendall's tau decides between equal ones. Raises BadInput for another `which`.
        """
        record = self.pick(label)
        gain = np.array(record.values["nDCG@5"]) - np.array(self.base.values["nDCG@5"])
        order = np.lexsort((record.values["Kendall's tau"], gain))
        return int(order[0 if one_of("query", which, ("worst", "best")) == "worst" else -1])

    def pictures(self, which: str = "worst", label: str = "") -> Figure:
        """The first pages of the worst or best query: base's ranking above the variant's."""
        return analysis.fidelity_plots.pictures(self, which, label)

    def conditions(self) -> str:
        """Where the figures come from, for titles."""
        base = self.base
        skipped = f"{base.skipped} skipped" if base.skipped else ""
        untrained = "untrained weights" if "untrained" in base.weights else ""
        groups = base.query_groups or range(len(base.query_ids))
        different = f" ({len({*groups})} different)" if len({*groups}) < len(groups) else ""
        counts = (f"{len(base.query_ids)} queries{different}", f"{base.pages} pages")
        parts = ["measured", device(base.environment), base.size, base.data, *counts]
        cut = f"{base.cut} long texts cut" if base.cut else ""
        parts += [f"{base.visual_tokens} visual tokens", skipped, cut, untrained]
        return " · ".join(filter(None, parts))

    def verdict(self) -> str:
        """Two sentences a variant: nDCG@5 with its verdict; the pages kept and the bytes."""
        sentences = []
        if (ndcg_of_base := np.mean(self.base.values["nDCG@5"])) < LITTLE:
            few = f"nDCG@5 {ndcg_of_base:.4f}"
            sentences = [f"Base itself finds almost nothing here ({few}): little can be lost."]
        for record in self.others:
            ndcg, overlap = (self.loss(record, metric) for metric in ("nDCG@5", "overlap@5"))
            difference = f"{ndcg.difference:+.3f} {ndcg.interval}".rstrip()
            finds = f"finds pages {ndcg.verdict} than base"
            if ndcg.verdict == "same":
                finds, difference = "finds pages as well as base", f"within {self.margin:g}"
            elif ndcg.verdict == "inconclusive":
                finds = "against base is inconclusive"
            means = f"nDCG@5 {ndcg.variant:.4f} against {ndcg.base:.4f}"
            what, share = "its weights are", record.weights_bytes / self.base.weights_bytes
            if record.index_format and record.page_bytes and self.base.page_bytes:
                what, share = "its index is", record.page_bytes / self.base.page_bytes
            saved = 100 - 100 * share
            sentences += [
                f"{record.label} {finds}: {means}, difference {difference}.",
                ndcg.reason,
                f"It keeps {100 * overlap.variant:.0f} % of base's first five pages; {what} "
                f"{abs(saved):.0f} % {'smaller' if saved >= 0 else 'larger'}.",
            ]
        return " ".join(filter(None, sentences))

    def to_dict(self) -> dict[str, Any]:
        """The records, their losses and the verdict, ready for JSON."""
        per_query = {"values", "top", "query_ids", "query_groups", "page_step_s"}
        variants = [
            record.model_dump(by_alias=True, exclude=per_query)
            | {"label": record.label, "queries": len(record.query_ids)}
            | {"losses": [loss._asdict() for loss in self.all_losses(record)]}
            | {"pages_per_s": speed.median if (speed := record.pages_per_s) else None}
            for record in self.records
        ]
        frontier = [record.label for record in self.frontier()]
        figures = {"margin": self.margin, "variants": variants, "frontier": frontier}
        return figures | {"verdict": self.verdict()}

    def __repr__(self) -> str:
        return f"{self.conditions()}\n{self.verdict()}"

    def _repr_html_(self) -> str:
        above, below = map(render.as_html, (self.conditions(), self.verdict()))
        return f"<p>{above}</p>{render.html(self.table())}<p>{below}</p>"


def side_by_side(results: Results, fidelities: Fidelities) -> pd.DataFrame:
    """Speed, peak memory and nDCG@5 of each variant at its fastest batch, one row a series.

    `weights` says whether both measurements used the same weights.
    """
    plain = [record for record in reversed(fidelities.records) if not record.index_format]
    records = {(record.variant, record.size): record for record in plain}
    rows = []
    for series in results.series():
        sized = [cell for cell in series.rated.values() if cell.memory]
        for cell in sorted(sized, key=rate, reverse=True)[:1]:
            row = {"variant": series.label, "batch": cell.batch_size}
            row |= {unit(cell): render.rounded(rate(cell)), "peak MiB": render.in_mib(peak(cell))}
            if record := records.get((cell.variant, cell.size)):
                same = "same" if cell.weights == record.weights else "different"
                row |= fidelities.ndcg(record) | {"weights": same}
            rows.append(row)
    return render.screen(pd.DataFrame(rows).round(4))
