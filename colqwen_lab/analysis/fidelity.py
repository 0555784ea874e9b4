"""What a variant's retrieval loses against BASE, from fidelity records: intervals, verdicts, tables, figures.

A difference is the variant's mean over queries less BASE's. Its 95 % interval is a paired bootstrap over the queries:
the same queries are drawn on both sides, so what makes a query hard falls out. Where all differences are equal that
would be [0, 0] however few they are: there it is the rule of three's, 3/n on either side (Hanley and Lippman-Hand
1983). Against itself BASE has overlap, tau and cosine 1 and no score error, so these are losses like any other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from colqwen_lab.analysis.compare import RESAMPLES, SEED, peak, rate
from colqwen_lab.analysis.results import Results, device, html_table, rounded
from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.records import MIB
from colqwen_lab.retrieval.metrics import NAMES
from colqwen_lab.retrieval.record import Fidelity, read

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from colqwen_lab.retrieval.data import Corpus

#: A difference below this is none, in the metrics' own unit.
MARGIN = 0.01
#: Below this many queries a bootstrap interval of differences that are mostly zero covers far less than 95 %.
FEWEST_QUERIES = 30
LOWER_IS_BETTER = ("score error",)
#: Where BASE's mean nDCG@5 is below this, there is next to nothing to lose.
LITTLE = 0.1


@dataclass(frozen=True)
class Loss:
    """One metric of a variant beside BASE's; `difference` is variant - BASE, with its 95 % interval.

    `worse` or `better`: at least the margin, and the interval on one side of zero. `same within x`: all of the
    interval is within the margin x. Else `cannot tell`, for the `reason` if there is one beside the interval's width.
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
    def told(self) -> str:
        """The verdict with its reason."""
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict

    @property
    def interval(self) -> str:
        """`[-0.012 to +0.003]`, or empty where there is none."""
        return (
            ""
            if self.low is None or self.high is None
            else f"[{self.low:+.3f} to {self.high:+.3f}]"
        )


def check_margin(margin: float) -> None:
    """Raise BadInput if no difference can be told by this margin."""
    if not 0 < margin < 1:
        raise BadInput(f"margin {margin}; valid: above 0 and below 1, such as {MARGIN}")


def check_inputs(base: Fidelity, record: Fidelity) -> None:
    """Raise BadInput if the two are of other queries or pages, another size or another budget."""
    if base.inputs != record.inputs:
        of, than = (
            f"{one.data} ({len(one.query_ids)} queries, {one.pages} pages), {one.size}, budget {one.visual_tokens}"
            for one in (record, base)
        )
        raise BadInput(f"{record.label} is of {of}; {base.label} of {than}: not the same inputs")


def loss(base: Fidelity, record: Fidelity, metric: str, margin: float = MARGIN) -> Loss:
    """The loss of one metric. Raises BadInput if the two are not of the same inputs."""
    check_inputs(base, record)
    before, after = (np.array(one.values[metric]) for one in (base, record))
    differences = after - before
    count, mean = len(differences), float(differences.mean())
    means = float(before.mean()), float(after.mean()), mean
    if record is base:
        return Loss(metric, *means, 0.0, 0.0, f"same within {margin:g}")
    if count < FEWEST_QUERIES:
        return Loss(
            metric, *means, None, None, "cannot tell", f"{count} queries, {FEWEST_QUERIES} needed"
        )
    if alike := float(np.ptp(differences)) < 1e-9:
        low, high = mean - 3 / count, mean + 3 / count
    else:
        drawn = np.random.default_rng(SEED).integers(count, size=(RESAMPLES, count))
        low, high = (
            float(end) for end in np.percentile(differences[drawn].mean(axis=1), [2.5, 97.5])
        )
    if -margin <= low and high <= margin:
        return Loss(metric, *means, low, high, f"same within {margin:g}")
    if abs(mean) >= margin and low * high > 0:
        better = (mean > 0) != (metric in LOWER_IS_BETTER)
        return Loss(metric, *means, low, high, "better" if better else "worse")
    reason = f"all {count} queries alike, so within 3/{count}" if alike else ""
    return Loss(metric, *means, low, high, "cannot tell", reason)


@dataclass(frozen=True, repr=False)
class Fidelities:
    """BASE and variants on one data set: `.table()`, `.losses(variant)`, `.plot()`, `.pictures()`, `.verdict()`.

    With a `corpus`, the pages themselves, queries can be shown as pictures.
    """

    records: tuple[Fidelity, ...]
    margin: float = MARGIN
    corpus: Corpus | None = None

    def __post_init__(self) -> None:
        if self.records[0].variant != "base":
            raise BadInput(
                f"fidelity is held against base, and the first record is of {self.records[0].label}"
            )
        check_margin(self.margin)
        for record in self.records:
            check_inputs(self.base, record)

    @classmethod
    def load(cls, source: str | Path, margin: float = MARGIN) -> Self:
        """The records of a file. Raises BadInput if it is none."""
        return cls(tuple(read(source)), margin)

    @property
    def base(self) -> Fidelity:
        return self.records[0]

    @property
    def others(self) -> tuple[Fidelity, ...]:
        return self.records[1:]

    def pick(self, label: str = "") -> Fidelity:
        """The record of this label; of none, the first variant that is not BASE. Raises BadInput."""
        by_label = {one.label: one for one in self.records}
        return by_label[
            one_of("variant", label or (self.others or self.records)[0].label, by_label)
        ]

    def loss(self, record: Fidelity, metric: str) -> Loss:
        """What `record` loses in one metric, against BASE. Raises BadInput for an unknown one."""
        return loss(self.base, record, one_of("metric", metric, NAMES), self.margin)

    def all_losses(self, record: Fidelity) -> list[Loss]:
        """What it loses in every metric."""
        return [self.loss(record, metric) for metric in NAMES]

    def table(self) -> pd.DataFrame:
        """One row a variant: bytes, nDCG@5 and what it loses with its verdict, nearness to BASE's scores, speed."""
        import pandas as pd

        return pd.DataFrame([self._row(record) for record in self.records])

    def _row(self, record: Fidelity) -> dict[str, Any]:
        ndcg, speed = self.loss(record, "nDCG@5"), record.pages_per_s
        means = {metric: float(np.mean(values)) for metric, values in record.values.items()}
        return {
            "variant": record.label,
            "weights MiB": round(record.weights_bytes / MIB, 2),
            "nDCG@5": round(ndcg.variant, 4),
            "difference": round(ndcg.difference, 4) if record is not self.base else None,
            "95 % interval": ndcg.interval if record is not self.base else "",
            "verdict": ndcg.told if record is not self.base else "",
            "overlap@5": round(means["overlap@5"], 3),
            "Kendall's tau": round(means["Kendall's tau"], 3),
            "score error %": round(100 * means["score error"], 2),
            "page cosine, median": round(record.page_cosine.median, 4),
            "page cosine, least": round(record.page_cosine.least, 4),
            "pages/s": rounded(speed.median) if speed else None,
            "kernel": ", ".join(record.backend.engaged),
        }

    def losses(self, label: str = "") -> pd.DataFrame:
        """One row a metric of one variant: BASE's mean, its own, the difference with its interval, the verdict."""
        import pandas as pd

        rows = self.all_losses(self.pick(label))
        return pd.DataFrame(
            {
                "metric": [row.metric for row in rows],
                "base": [round(row.base, 4) for row in rows],
                self.pick(label).label: [round(row.variant, 4) for row in rows],
                "difference": [round(row.difference, 4) for row in rows],
                "95 % interval": [row.interval for row in rows],
                "verdict": [row.told for row in rows],
            }
        )

    def cosines(self) -> pd.DataFrame:
        """Two rows a variant: how near to BASE's its token embeddings of queries and of pages are, by quantiles."""
        import pandas as pd

        rows = [
            {"variant": record.label, "of": what}
            | {name: rounded(value) for name, value in cosines.model_dump().items()}
            for record in self.others
            for what, cosines in (("queries", record.query_cosine), ("pages", record.page_cosine))
        ]
        return pd.DataFrame(rows).astype({"tokens": int} if rows else {})

    def frontier(self, metric: str = "nDCG@5") -> list[Fidelity]:
        """The records that no other beats: none has fewer bytes and as good a mean. By bytes."""
        sign = -1 if metric in LOWER_IS_BETTER else 1
        ranked = sorted(
            self.records,
            key=lambda one: (one.weights_bytes, -sign * self.loss(one, metric).variant),
        )
        best, found = -np.inf, []
        for record in ranked:
            if (mean := sign * self.loss(record, metric).variant) > best:
                best = mean
                found.append(record)
        return found

    def plot(self, kind: str = "frontier", **options: Any) -> Figure:
        """A figure: `frontier` (fidelity over bytes, `metric="nDCG@5"`) or `metrics` (every loss and its interval).

        Raises:
            BadInput: an unknown kind.
        """
        from colqwen_lab.analysis import fidelity_plots

        return fidelity_plots.KINDS[one_of("plot", kind, fidelity_plots.KINDS)](self, **options)

    def query(self, which: str = "worst", label: str = "") -> int:
        """The number of the query whose nDCG@5 fell most (`worst`) or rose most (`best`), then by Kendall's tau.

        Raises:
            BadInput: neither of the two.
        """
        record = self.pick(label)
        gain = np.array(record.values["nDCG@5"]) - np.array(self.base.values["nDCG@5"])
        order = np.lexsort((record.values["Kendall's tau"], gain))
        return int(order[0 if one_of("query", which, ("worst", "best")) == "worst" else -1])

    def pictures(self, which: str = "worst", label: str = "") -> Figure:
        """A query's first pages, BASE's above the variant's; a page that answers it has a thick frame.

        Raises:
            BadInput: neither `worst` nor `best`, or records from a file, whose pages are not at hand.
        """
        from colqwen_lab.analysis import fidelity_plots

        if self.corpus is None:
            raise BadInput("records from a file hold no pages; run lab.fidelity(...) to see them")
        return fidelity_plots.pictures(
            self, self.corpus, self.query(which, label), self.pick(label), which
        )

    def conditions(self) -> str:
        """Where the figures come from, for titles."""
        first = self.base
        parts = [device(first.environment), first.size, first.data]
        parts += [f"{len(first.query_ids)} queries, {first.pages} pages"]
        parts += [f"{first.skipped} left out"] if first.skipped else []
        parts += ["untrained weights"] if "untrained" in first.weights else []
        return " · ".join(parts)

    def verdict(self) -> str:
        """A sentence a variant: what nDCG@5 loses, with its interval, how many first pages are kept, and the bytes."""
        ndcg = float(np.mean(self.base.values["nDCG@5"]))
        little = (
            f"Base itself finds next to nothing here (nDCG@5 {ndcg:.3f}): there is little to lose. "
        )
        return (little if ndcg < LITTLE else "") + " ".join(
            self._sentence(record) for record in self.others
        )

    def _sentence(self, record: Fidelity) -> str:
        ndcg, overlap = (self.loss(record, metric) for metric in ("nDCG@5", "overlap@5"))
        said = {"worse": "retrieves worse than base", "better": "retrieves better than base"}
        said |= {"cannot tell": "cannot be told from base, nor said to be the same"}
        what = said.get(ndcg.verdict, f"retrieves as base does, within {self.margin:g}")
        lost = " ".join(
            part for part in (f"{ndcg.difference:+.3f}", ndcg.interval, ndcg.reason) if part
        )
        return (
            f"{record.label} {what}: nDCG@5 {ndcg.base:.3f} to {ndcg.variant:.3f} ({lost}), "
            f"{100 * overlap.variant:.0f} % of base's first five pages kept, weights "
            f"{record.weights_bytes / self.base.weights_bytes - 1:+.0%}."
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        named = ("variant", "label", "size", "weights", "iters", "data", "pages", "weights_bytes")
        rows = [
            {name: getattr(record, name) for name in named}
            | {
                "queries": len(record.query_ids),
                "losses": [asdict(row) for row in self.all_losses(record)],
            }
            | {name: getattr(record, name).model_dump() for name in ("query_cosine", "page_cosine")}
            | {"pages_per_s": speed.median if (speed := record.pages_per_s) else None}
            for record in self.records
        ]
        on_frontier = [record.label for record in self.frontier()]
        return {
            "margin": self.margin,
            "variants": rows,
            "frontier": on_frontier,
            "verdict": self.verdict(),
        }

    def __repr__(self) -> str:
        return "\n".join([self.conditions(), *(self._sentence(record) for record in self.others)])

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.conditions())}</p>{html_table(self.table())}<p>{escape(self.verdict())}</p>"


def one_row(results: Results, found: Fidelities) -> pd.DataFrame:
    """Speed, memory and fidelity of each variant on one row: at its fastest batch, and what nDCG@5 loses.

    A variant without a fidelity record of its size has dashes there; `weights` says whether both ran the very same.
    """
    import pandas as pd

    records = {(one.variant, one.size): one for one in reversed(found.records)}
    rows = []
    for series in results.series():
        timed = [cell for batch, cell in series.rated.items() if batch in series.sized]
        if not timed:
            continue
        cell = max(timed, key=rate)
        row = {
            "variant": series.label,
            "batch": cell.batch_size,
            f"{cell.workload.kind}/s": rounded(rate(cell)),
        }
        row |= {"peak MiB": round(peak(cell) / MIB, 2)}
        if record := records.get((cell.variant, cell.size)):
            ndcg = found.loss(record, "nDCG@5")
            row |= {
                "nDCG@5": round(ndcg.variant, 4),
                "95 % interval": ndcg.interval,
                "verdict": ndcg.told,
            }
            row |= {"weights": "the same" if cell.weights == record.weights else "others"}
        rows.append(row)
    return pd.DataFrame(rows)
