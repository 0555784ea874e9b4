"""BASE against a quantised variant, from records alone: at equal batch, under a memory budget, and what follows.

Percentages are of BASE: an overhead of -50 % is half of BASE's items per second, a saving of 50 % half of its peak.
A card's "8 GB" is 8 GiB nominal. What a row needs of it is its peak plus what lies outside torch's allocator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from colqwen_lab.analysis.results import (
    Results,
    Series,
    eight_bit,
    html_table,
    mib,
    pick,
    random_weights,
    repeated,
    rounded,
    short,
    unit,
)
from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.hardware import OUTSIDE_TORCH_BYTES, USABLE_SHARE, Fit, fit_of, need_bytes, usable
from colqwen_lab.records import GIB, Cell, Memory, published_cells

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from colqwen_lab.analysis.claims import Claim

#: Below this, in percent, two rates are not told apart: MLPerf's audit takes 2 % as different.
SAME_PERCENT = 2.0
#: A bootstrap of the ratio of medians: fewer than six samples a side give no 95 % interval of a median.
RESAMPLES, FEWEST_SAMPLES, SEED = 2000, 6, 0
CARDS_GB = (8, 12, 16, 24)
#: What must be equal on both sides before a difference in speed is the variant's and not the machine's.
MACHINE = ("gpu", "driver", "cuda", "cpu", "threads", "power_limit_w", "torch")


@dataclass(frozen=True)
class Overhead:
    """The rates at one batch size; `overhead_percent` is awq / base - 1 with its 95 % interval, negative = slower."""

    batch_size: int
    base_items_per_s: float
    awq_items_per_s: float
    overhead_percent: float
    low: float | None
    high: float | None
    verdict: Literal["faster", "slower", "cannot tell"]


@dataclass(frozen=True)
class Saving:
    """The peaks at one batch size; `saving_percent` is 1 - awq / base."""

    batch_size: int
    base_peak_bytes: int
    awq_peak_bytes: int
    saving_percent: float


@dataclass(frozen=True)
class CardFit:
    """What one variant does on one card: its largest batch that fits (or, if none does, is tight), of those measured.

    `headroom_bytes` is pessimistic, so negative where tight. `best_*` is the fastest batch under the same verdict.
    """

    variant: str
    verdict: Fit
    batch_size: int | None
    items_per_s: float | None
    peak_bytes: int | None
    headroom_bytes: int | None
    best_batch_size: int | None
    best_items_per_s: float | None
    note: str


@dataclass(frozen=True)
class Card:
    """A memory budget. `ratio` is awq's rate over base's, each at its largest batch; null where one has none."""

    card_gb: float
    nominal_bytes: int
    usable_bytes: int
    base: CardFit
    awq: CardFit
    ratio: float | None


@dataclass(frozen=True)
class Crossover:
    """The smallest usable memory from which on base, at its largest batch, is at least as fast as awq at its own.

    By the medians; `open` is true where an interval leaves awq the chance to be faster. `nominal_bytes` is the card
    that surely has it. All are null where there is no crossover; `reason` says why.
    """

    reason: str
    budget_bytes: int | None = None
    nominal_bytes: int | None = None
    base_batch_size: int | None = None
    base_items_per_s: float | None = None
    awq_batch_size: int | None = None
    awq_items_per_s: float | None = None
    open: bool = field(default=False, repr=False)

    @property
    def as_fast(self) -> str:
        if self.open:
            return "at least as fast or not told apart"
        base, awq = self.base_items_per_s, self.awq_items_per_s
        near = base and awq and 100 * abs(awq / base - 1) < SAME_PERCENT
        return "at least as fast" + (
            f" (where that begins, by less than {SAME_PERCENT:g} %)" if near else ""
        )


@dataclass(frozen=True)
class Recommendation:
    """What to use (`base`, `awq` or `either`), in one sentence with its figures, and how that was derived."""

    use: Literal["base", "awq", "either"]
    sentence: str
    derived: str


@dataclass(frozen=True)
class Stretch:
    """Budgets, in bytes of usable memory, over which the same thing is to be said. `end_bytes` None: no upper end."""

    regime: str
    start_bytes: int
    end_bytes: int | None
    percents: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two series held against each other. A notebook shows it; `.to_dict()`, `.markdown()` and `.plot()` export it."""

    base: Series
    awq: Series
    overhead: tuple[Overhead, ...]
    memory: tuple[Saving, ...]
    cards: tuple[Card, ...]
    crossover: Crossover
    recommendations: tuple[Recommendation, ...]
    caveats: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON. `claims` is there when the figures are the published ones."""
        parts = ("overhead", "memory", "cards", "recommendations")
        out: dict[str, Any] = {"base": self.base.describe(), "awq": self.awq.describe()}
        out |= {name: [asdict(value) for value in getattr(self, name)] for name in parts}
        out |= {
            "crossover": asdict(self.crossover),
            "caveats": list(self.caveats),
            "verdict": self.verdict(),
        }
        return out | ({"claims": [asdict(claim) for claim in self.claims]} if self.claims else {})

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The report's claims held against its own rows; none unless these are the report's figures."""
        from colqwen_lab.analysis.claims import claims

        return claims(self) if [*self.base.cells, *self.awq.cells] == published_cells() else ()

    def verdict(self) -> str:
        """One to three sentences: memory, speed at the same batch, and the budget from which base is as fast."""
        base, awq = self.base.label, self.awq.label
        said = []
        if percents := [row.saving_percent for row in self.memory]:
            said.append(f"At the same batch {awq} saves {span(percents)} % of {base}'s peak memory")
        if speeds := [
            f"{what} at {batches_of(rows)}" for what, rows in by_verdict(self.overhead).items()
        ]:
            said.append(f"Speed of {awq}: {'; '.join(speeds)}")
        start, why = self.crossover.budget_bytes, self.crossover.reason
        at_least = f"From {_gib(start)} of usable memory on" if start else ""
        said.append(
            f"{at_least} {base} is {self.crossover.as_fast}, each at its largest batch"
            if start
            else f"No crossover: {why}"
        )
        return ". ".join(said) + "."

    def overhead_table(self) -> pd.DataFrame:
        """One row a shared batch: both rates, the overhead with its interval, the verdict, the memory saved."""
        import pandas as pd

        saved = {row.batch_size: round(row.saving_percent, 1) for row in self.memory}
        what = unit(self.base.first)
        rows = [
            {
                "batch": row.batch_size,
                f"{self.base.label} {what}": rounded(row.base_items_per_s),
                f"{self.awq.label} {what}": rounded(row.awq_items_per_s),
                "overhead %": round(row.overhead_percent, 1),
                "95 % interval": interval(row),
                "verdict": row.verdict,
                "memory saved %": saved.get(row.batch_size),
            }
            for row in self.overhead
        ]
        return pd.DataFrame(rows)

    def card_table(self) -> pd.DataFrame:
        """One row a card and variant: does it fit, the largest batch, the rate there, peak and headroom."""
        import pandas as pd

        rows = [
            {
                "card GB": card.card_gb,
                "variant": label,
                "verdict": fit.verdict,
                "largest batch": fit.batch_size,
                unit(self.base.first): rounded(fit.items_per_s),
                "peak": mib(fit.peak_bytes) if fit.peak_bytes else "",
                "headroom": mib(fit.headroom_bytes) if fit.headroom_bytes is not None else "",
                "note": fit.note,
            }
            for card in self.cards
            for label, fit in ((self.base.label, card.base), (self.awq.label, card.awq))
        ]
        return pd.DataFrame(rows).astype({"largest batch": "Int64"} if rows else {})

    def claims_table(self) -> pd.DataFrame:
        """One row a claim of the report, what its rows say, and whether it follows."""
        import pandas as pd

        return pd.DataFrame(
            [asdict(claim) for claim in self.claims], columns=["claim", "rows_say", "follows"]
        )

    def markdown(self) -> str:
        """The comparison as a Markdown report, in the layout of the report it grew from."""
        from colqwen_lab.analysis.render import report

        return report(self)

    def plot(self, kind: str = "overhead", **options: Any) -> Figure:
        """A figure: `overhead`, `throughput`, `memory` (with `cards=(8, 12)` in GB) or `tradeoff`.

        Raises:
            BadInput: an unknown kind.
        """
        from colqwen_lab.analysis import plots

        if one_of("plot", kind, ["overhead", *plots.KINDS]) == "overhead":
            return plots.overhead(self)
        asked = tuple(card.card_gb for card in self.cards)
        cards = {"cards": asked} if kind == "memory" and asked != CARDS_GB else {}
        return plots.KINDS[kind]((self.base, self.awq), **cards | options)

    def __repr__(self) -> str:
        rows = [
            f"batch {o.batch_size}: {o.overhead_percent:+.1f} % {interval(o)} {o.verdict}"
            for o in self.overhead
        ]
        return "\n".join(
            [
                f"{self.awq.label} against {self.base.label}: {self.verdict()}",
                *map(str.rstrip, rows),
            ]
        )

    def _repr_html_(self) -> str:
        tables = html_table(self.overhead_table()) + html_table(self.card_table())
        return f"<p>{escape(self.verdict())}</p>{tables}<ul>{''.join(f'<li>{escape(c)}</li>' for c in self.caveats)}</ul>"


@dataclass(frozen=True, repr=False)
class SideBySide:
    """Comparisons by where they were measured: a device, and what else tells them apart. Never one series of several.

    `left_out` is what stands in none of them.
    """

    comparisons: dict[str, Comparison]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON: the comparisons by place."""
        found = {where: one.to_dict() for where, one in self.comparisons.items()}
        return {
            "side_by_side": found,
            "gpus": self.gpu_table().to_dict("records"),
            "left_out": list(self.left_out),
        }

    def overhead_table(self) -> pd.DataFrame:
        """One row a batch, for each place the overhead with its verdict, and the memory saved."""
        import pandas as pd

        columns: dict[str, dict[int, Any]] = {}
        for where, one in self.comparisons.items():
            said = {
                row.batch_size: f"{row.overhead_percent:+.1f} %, {row.verdict}"
                for row in one.overhead
            }
            columns[f"{where}: overhead"] = said
            columns[f"{where}: memory saved %"] = {
                row.batch_size: round(row.saving_percent, 1) for row in one.memory
            }
        return pd.DataFrame(columns).sort_index().rename_axis("batch").reset_index()

    def gpu_table(self) -> pd.DataFrame:
        """One row a place and model: the largest batch that ran there, its rate and peak, and the fastest batch."""
        import pandas as pd

        rows = [
            _on_device(where, series)
            for where, one in self.comparisons.items()
            for series in (one.base, one.awq)
        ]
        return pd.DataFrame(rows).astype({"largest batch": "Int64", "fastest batch": "Int64"})

    def markdown(self) -> str:
        """The tables side by side, then each comparison's own report."""
        from colqwen_lab.analysis.render import side_by_side

        return side_by_side(self)

    def plot(self, kind: str = "throughput", **options: Any) -> Figure:
        """All series in one figure, each its own line: kinds as of `Results`."""
        both = [series for one in self.comparisons.values() for series in (one.base, one.awq)]
        cells = {id(cell): cell for series in both for cell in series.cells}
        return Results(tuple(cells.values())).plot(kind, **options)

    def __repr__(self) -> str:
        return "\n".join(f"{where}: {one!r}" for where, one in self.comparisons.items())

    def _repr_html_(self) -> str:
        left_out = "".join(f"<p>{escape(one)}</p>" for one in self.left_out)
        return html_table(self.overhead_table()) + html_table(self.gpu_table()) + left_out


def _on_device(where: str, series: Series) -> dict[str, Any]:
    ran = series.sized.keys() | series.rated.keys()
    largest = max(ran, default=None)
    at = series.rated.get(largest or 0), series.sized.get(largest or 0)
    fastest = max(series.rated, key=lambda batch: rate(series.rated[batch]), default=None)
    return {
        "where": where,
        "model": series.variant,
        "largest batch": largest,
        "items/s": rounded(rate(at[0])) if at[0] else None,
        "peak": mib(peak(at[1])) if at[1] else "",
        "fastest batch": fastest,
        "items/s there": rounded(rate(series.rated[fastest])) if fastest else None,
        "not ok": ", ".join(f"{cell.batch_size} {cell.status}" for cell in series.lost),
    }


def by_place(
    base: Results, awq: Results, cards: Sequence[float] = CARDS_GB
) -> Comparison | SideBySide:
    """`awq` held against `base` wherever both were measured, and each of several models or kernels there on its own.

    A place is a device, size, workload, execution and protocol.

    Raises:
        BadInput: as of `compare`.
    """
    both = [_places(side) for side in (base, awq)]
    every = list(dict.fromkeys([*both[0], *both[1]]))
    shared = [place for place in every if place in both[0] and place in both[1]]
    if len(every) > 1:  # a model alone in a file that is on both sides would be held against itself
        shared = [
            at for at in shared if both[0][at] != both[1][at] or len(both[0][at].variants) > 1
        ]
    if not shared:
        return compare(base, awq, cards)
    varied = [
        at for at in range(len(every[0])) if at == 0 or len({place[at] for place in every}) > 1
    ]
    names = {place: ", ".join(place[at] for at in varied) for place in every}
    pairs, left_out = (
        {},
        [f"{names[at]}: nothing to compare with there." for at in every if at not in shared],
    )
    for place in shared:
        sides = both[0][place], both[1][place]
        series = [one for one in sides[0].series() if one.variant == "base"]
        plain = [one for one in series if not eight_bit(one.first)]
        others = [one for one in sides[1].series() if one.variant != "base"]
        if len(plain) == 1 and others:
            left_out += [
                f"{names[place]}: {one.label}, a way of base's own."
                for one in series
                if one is not plain[0]
            ]
            for one in others:
                name = f"{names[place]}, {one.label}" if len(others) > 1 else names[place]
                pairs[name] = Results(plain[0].cells), Results(one.cells)
        else:
            pairs[names[place]] = sides
    found = {name: compare(*sides, cards) for name, sides in pairs.items()}
    return (
        SideBySide(found, tuple(left_out))
        if len(every) > 1 or len(found) > 1
        else next(iter(found.values()))
    )


def _places(results: Results) -> dict[tuple[str, ...], Results]:
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in results:
        found.setdefault((cell.environment.device, *cell.settings()), []).append(cell)
    return {place: Results(tuple(cells)) for place, cells in found.items()}


def compare(base: Results, awq: Results, cards: Sequence[float] = CARDS_GB) -> Comparison:
    """`awq` held against `base`; `cards` are memory budgets in GB.

    Of `base` the variant `base` is taken, else its only one; of `awq` its only variant, else its only one that is not
    base. The same variant on both sides is a control: it must come out as "cannot tell".

    Raises:
        BadInput: the series are ambiguous, differ in size, workload, execution or protocol, or a card is not one.
    """
    first = pick(
        base, "base" if "base" in base.variants else _only(base.variants), "the first argument"
    )
    others = [variant for variant in awq.variants if variant != "base"]
    second = pick(awq, _only(awq.variants) or _only(others), "the second argument")
    if first.first.settings() != second.first.settings():
        theirs = [" ".join(series.first.settings()) for series in (first, second)]
        raise BadInput(
            f"not comparable: {first.label} is {theirs[0]}, {second.label} is {theirs[1]}"
        )
    if first.label == second.label:
        first, second = (
            Series(f"{first.label} (A)", first.cells),
            Series(f"{second.label} (B)", second.cells),
        )
    differing = machines_differ(first, second)
    overhead = tuple(overheads(first, second, told_apart=not differing))
    held = tuple(on_card(first, second, gb, told_apart=not differing) for gb in cards)
    everywhere = fit_everywhere(first, second, held)
    memory = tuple(savings(first, second))
    speeds = ((), ()) if differing else (overhead, () if everywhere else tuple(walk(first, second)))
    return Comparison(
        base=first,
        awq=second,
        overhead=overhead,
        memory=memory,
        cards=held,
        crossover=Crossover(everywhere) if everywhere else find_crossover(first, second, differing),
        recommendations=tuple(recommend(first, second, memory, *speeds)),
        caveats=tuple(caveats(first, second, differing)),
    )


# ---------------------------------------------------------------- at equal batch


def overheads(base: Series, awq: Series, told_apart: bool = True) -> Iterator[Overhead]:
    """The overhead at every batch that both measured. `told_apart` false: the machines differ, so no verdict."""
    for batch in sorted(base.rated.keys() & awq.rated.keys()):
        yield overhead(base.rated[batch], awq.rated[batch], told_apart)


def overhead(base: Cell, awq: Cell, told_apart: bool = True) -> Overhead:
    """The overhead of one row against another, item by item: their batch sizes may differ."""
    before, after = rate(base), rate(awq)
    percent = 100 * (after / before - 1)
    low, high = _interval(base, awq) if told_apart else (None, None)
    clear = (
        told_apart
        and abs(percent) >= SAME_PERCENT
        and (low is None or high is None or low * high > 0)
    )
    verdict: Any = ("faster" if percent > 0 else "slower") if clear else "cannot tell"
    return Overhead(awq.batch_size, before, after, percent, low, high, verdict)


def _interval(base: Cell, awq: Cell) -> tuple[float | None, float | None]:
    """The 95 % bootstrap interval of the overhead in percent, from the step times."""
    if min(len(base.step_s), len(awq.step_s)) < FEWEST_SAMPLES:
        return None, None
    draw = np.random.default_rng(SEED)
    medians = [
        np.median(draw.choice(one.step_s, (RESAMPLES, len(one.step_s))), axis=1)
        for one in (base, awq)
    ]
    ratios = awq.batch_size / base.batch_size * medians[0] / medians[1]
    low, high = np.percentile(100 * (ratios - 1), [2.5, 97.5])
    return float(low), float(high)


def savings(base: Series, awq: Series) -> Iterator[Saving]:
    """The share of the peak saved at every batch that both measured."""
    for batch in sorted(base.sized.keys() & awq.sized.keys()):
        before, after = peak(base.sized[batch]), peak(awq.sized[batch])
        yield Saving(batch, before, after, 100 * (1 - after / before))


def machines_differ(base: Series, awq: Series) -> list[str]:
    """What differs of machine, versions and origin between two series; none if their speeds may be compared."""
    found = []
    for name in ("origin", *MACHINE):
        ours, theirs = (_recorded(series, name) for series in (base, awq))
        if ours != theirs or len(ours) > 1:
            found.append(f"{name} ({' and '.join(ours)} against {' and '.join(theirs)})")
    return found


def _recorded(series: Series, name: str) -> list[str]:
    values = {
        cell.origin if name == "origin" else getattr(cell.environment, name)
        for cell in series.cells
    }
    return sorted("not recorded" if value is None else str(value) for value in values)


# ---------------------------------------------------------------- under a budget


def on_card(base: Series, awq: Series, card_gb: float, told_apart: bool = True) -> Card:
    """Both series on a card of `card_gb` GB.

    Raises:
        BadInput: not a positive number.
    """
    if not 0 < card_gb < math.inf:
        raise BadInput(
            f"a card is a memory budget in GB above 0, not {card_gb}; for example 8 or 12"
        )
    card_gb = int(card_gb) if card_gb == int(card_gb) else card_gb
    nominal = round(card_gb * GIB)
    fits = [_card_fit(series, nominal) for series in (base, awq)]
    before, after = (fit.items_per_s for fit in fits)
    ratio = after / before if before and after and told_apart else None
    return Card(card_gb, nominal, usable(nominal), fits[0], fits[1], ratio)


def _card_fit(series: Series, nominal: int) -> CardFit:
    verdicts = {batch: fit_of(memory_of(cell), nominal) for batch, cell in series.sized.items()}
    verdict: Fit = next(
        (fit for fit in ("fits", "tight") if fit in verdicts.values()), "does not fit"
    )
    if verdict == "does not fit":
        smallest = min(series.sized.values(), key=peak, default=None)
        why = (
            f"batch {smallest.batch_size} alone peaks at {mib(peak(smallest))}"
            if smallest
            else "no row has a peak"
        )
        return CardFit(series.variant, verdict, None, None, None, None, None, None, why)
    within = [series.sized[batch] for batch, fit in verdicts.items() if fit == verdict]
    largest = max(within, key=lambda cell: cell.batch_size)
    rates = {cell.batch_size: rate(cell) for cell in within if cell.items_per_s}
    best = max(rates, key=lambda batch: rates[batch], default=None)
    return CardFit(
        variant=series.variant,
        verdict=verdict,
        batch_size=largest.batch_size,
        items_per_s=rates.get(largest.batch_size),
        peak_bytes=peak(largest),
        headroom_bytes=usable(nominal) - need_bytes(memory_of(largest))[1],
        best_batch_size=best,
        best_items_per_s=rates.get(best) if best else None,
        note="; ".join(_card_notes(series, verdicts, largest)),
    )


def _card_notes(series: Series, verdicts: dict[int, Fit], largest: Cell) -> Iterator[str]:
    """What stands above the largest batch: nothing measured, a tight one, one that ran out of memory."""
    above = [batch for batch, fit in verdicts.items() if batch > largest.batch_size]
    lost = [cell for cell in series.lost if cell.batch_size > largest.batch_size]
    if verdicts[largest.batch_size] == "fits" and (
        tight := [batch for batch in above if verdicts[batch] == "tight"]
    ):
        yield f"batch {max(tight)} is tight"
    yield from (
        f"batch {cell.batch_size} {cell.status} on {cell.environment.device}" for cell in lost
    )
    if not above and not lost:
        yield "larger not measured"


def fit_everywhere(base: Series, awq: Series, cards: Sequence[Card]) -> str:
    """Why cards and budgets say nothing of models this small; empty where they do."""
    peaks = [peak(cell) for series in (base, awq) for cell in series.sized.values()]
    lost = base.lost or awq.lost
    if (
        not peaks
        or not cards
        or lost
        or max(peaks) > min(card.nominal_bytes for card in cards) / 100
    ):
        return ""
    return f"no batch peaks above {mib(max(peaks))}, which every card holds with more than 99 % to spare"


def largest_within(series: Series, usable_bytes: int) -> Cell | None:
    """The row with the largest batch whose need, at the worst, is within `usable_bytes`."""
    rows = [
        cell for cell in series.sized.values() if need_bytes(memory_of(cell))[1] <= usable_bytes
    ]
    return max(rows, key=lambda cell: cell.batch_size, default=None)


def budgets(base: Series, awq: Series) -> list[tuple[int, Cell | None, Cell | None]]:
    """Every amount of usable memory at which a largest batch may change, with the largest of both sides there."""
    rows = [*base.sized.values(), *awq.sized.values()]
    needs = sorted({need_bytes(memory_of(cell))[1] for cell in rows})
    return [(need, largest_within(base, need), largest_within(awq, need)) for need in needs]


def find_crossover(base: Series, awq: Series, differing: Sequence[str] = ()) -> Crossover:
    """The crossover of two series, found by walking the budgets down from the largest."""
    if differing:
        return Crossover("the speeds were not recorded under one environment")
    if not all((base.rated, awq.rated, base.sized, awq.sized)):
        return Crossover("one side has no row with a rate and a peak")
    found, row, unsure = None, None, False
    for need, ours, theirs in reversed(budgets(base, awq)):
        if ours is None or not ours.items_per_s or (theirs and not theirs.items_per_s):
            break
        row = overhead(ours, theirs) if theirs else None
        if row and row.overhead_percent > 0:
            break
        unsure |= row is not None and row.high is not None and row.high > 0
        found = need, ours, theirs
    if found is None:
        faster = row is None or row.verdict == "faster"
        what = f"{awq.label} is the faster" if faster else "the rates are not told apart"
        return Crossover(f"{what}, each at its largest batch, even where every row fits")
    need, ours, theirs = found
    return Crossover(
        f"each at the largest batch whose peak and memory outside torch are within {mib(need)}",
        budget_bytes=need,
        nominal_bytes=math.ceil(need / USABLE_SHARE),
        base_batch_size=ours.batch_size,
        base_items_per_s=rate(ours),
        awq_batch_size=theirs.batch_size if theirs else None,
        awq_items_per_s=rate(theirs) if theirs else None,
        open=unsure,
    )


def walk(base: Series, awq: Series) -> Iterator[Stretch]:
    """The budgets from the smallest need on, cut where another thing is to be said."""
    steps = []
    for need, ours, theirs in budgets(base, awq):
        row = (
            overhead(ours, theirs)
            if ours and theirs and ours.items_per_s and theirs.items_per_s
            else None
        )
        steps.append((_regime(ours, theirs, row), need, row.overhead_percent if row else None))
    groups = [(regime, list(group)) for regime, group in groupby(steps, key=lambda step: step[0])]
    ends = [*(group[0][1] for _, group in groups[1:]), None]
    for (regime, group), end in zip(groups, ends, strict=False):
        yield Stretch(
            regime, group[0][1], end, tuple(percent for *_, percent in group if percent is not None)
        )


def _regime(ours: Cell | None, theirs: Cell | None, row: Overhead | None) -> str:
    if ours is None:
        return "only awq"
    if theirs is None:
        return "only base"
    if row is None:
        return "no rates"
    return {"faster": "awq faster", "slower": "base faster", "cannot tell": "either"}[row.verdict]


# ---------------------------------------------------------------- what follows


def recommend(
    base: Series,
    awq: Series,
    memory: Sequence[Saving],
    overhead: Sequence[Overhead],
    stretches: Sequence[Stretch],
) -> Iterator[Recommendation]:
    """When to use which, each from the figures alone. By budget, by batch, and by the time of a step."""
    a, b = base.label, awq.label
    if saving := [row for row in memory if row.saving_percent > 0]:
        sentence = f"{b} saves {span(row.saving_percent for row in saving)} % of the peak at {batches_of(saving)}."
        yield Recommendation(
            "awq", sentence, f"1 - its peak / {a}'s, at every batch that both measured"
        )
    said: dict[str, tuple[Any, str]] = {
        "only awq": ("awq", f"{b} fits, {a} does not"),
        "only base": ("base", f"{a} fits, {b} does not"),
        "awq faster": ("awq", f"{b} is the faster, each at its largest batch"),
        "base faster": ("base", f"{a} is the faster, each at its largest batch"),
        "either": (
            "either",
            f"the rates differ by less than {SAME_PERCENT:g} %, each at its largest batch",
        ),
    }
    for stretch in stretches:
        if stretch.regime in said:
            use, what = said[stretch.regime]
            if stretch.regime == "either" and max(map(abs, stretch.percents)) >= SAME_PERCENT:
                what = "the rates are not told apart, each at its largest batch"
            till = (
                f"of usable memory to {_gib(stretch.end_bytes)}"
                if stretch.end_bytes
                else "of usable memory on"
            )
            by = f" ({span(stretch.percents, '+')} %)" if stretch.percents else ""
            yield Recommendation(
                use,
                f"From {_gib(stretch.start_bytes)} {till} {what}{by}.",
                "the largest measured batch of either whose peak and memory outside torch are within the budget",
            )
    uses: dict[str, Any] = {"slower": "base", "faster": "awq"}
    for verdict, rows in by_verdict(overhead).items():
        percents = span([row.overhead_percent for row in rows], "+")
        sentence = f"At the same batch {b} is {verdict} at {batches_of(rows)} ({percents} %)."
        if verdict == "cannot tell":
            sentence = f"At the same batch the rates are not told apart at {batches_of(rows)} ({percents} %)."
        yield Recommendation(
            uses.get(verdict, "either"),
            sentence,
            f"its rate / {a}'s - 1, at every batch that both measured",
        )
    if overhead:
        row = overhead[0]
        times = [
            1000 * row.batch_size / value for value in (row.base_items_per_s, row.awq_items_per_s)
        ]
        sentence = f"A step of {row.batch_size} takes {short(times[0])} ms with {a} and {short(times[1])} ms with {b}."
        yield Recommendation(
            uses.get(row.verdict, "either"), sentence, "the smallest shared batch over its rate"
        )


def caveats(base: Series, awq: Series, differing: Sequence[str]) -> Iterator[str]:
    """What the figures cannot claim: where they come from, what differs, what was not measured."""
    cells = [*base.cells, *awq.cells]
    ok = [cell for cell in cells if cell.status == "ok"]
    yield "The figures are " + " and ".join(dict.fromkeys(cell.origin for cell in cells)) + "."
    if differing:
        yield f"No verdict on speed: the two sides differ in {'; '.join(differing)}."
    if not base.rated.keys() & awq.rated.keys():
        yield "No batch size was measured on both sides."
    if any(len(cell.step_s) < FEWEST_SAMPLES for cell in ok):
        yield f"No interval where a source kept fewer than {FEWEST_SAMPLES} samples: a verdict there has one figure."
    methods = {cell.memory.method for cell in ok if cell.memory}
    if "tracked" in methods and len(methods) > 1:
        yield "Peaks by different methods: tracked from the tensors on one side, the CUDA allocator's on the other."
    if any(
        cell.memory and (cell.memory.device_bytes is None or cell.memory.reserved_bytes is None)
        for cell in ok
    ):
        least, most = (amount // 10**6 for amount in OUTSIDE_TORCH_BYTES)
        yield f"Memory outside torch was not measured in every row; {least} to {most} MB are assumed there."
    devices = " and ".join(dict.fromkeys(cell.environment.device for cell in cells))
    yield f"Rates under a memory budget are those of {devices} under that budget, not of a card of that size."
    if any(cell.environment.gpu is None and cell.environment.cpu for cell in cells):
        yield "Run on a CPU: its rates say nothing about a GPU's."
    yield from _differences(base, awq)
    for series in (base, awq):
        if any(random_weights(cell) for cell in series.cells):
            yield f"{series.label} has untrained weights: speed and memory hold, embeddings mean nothing."
        if unsteady := [
            str(cell.batch_size) for cell in series.cells if cell.timing and not cell.timing.steady
        ]:
            yield f"{series.label} was not steady at batch {', '.join(unsteady)}."
        if twice := repeated(series):
            yield f"{series.label} has batch {', '.join(map(str, twice))} more than once; the last row counts."
        yield from (
            f"{series.label} batch {c.batch_size}: {c.status}, {c.reason or 'no reason'}."
            for c in series.lost
        )


def _differences(base: Series, awq: Series) -> Iterator[str]:
    """What else is not equal on the two sides: texts, padded length, precision, and whether they were timed in turn."""
    both = [
        (base.rated[batch], awq.rated[batch])
        for batch in sorted(base.rated.keys() & awq.rated.keys())
    ]
    reads: dict[str, Callable[[Cell], Any]] = {
        "texts": lambda cell: cell.workload.texts,
        "padded length": lambda cell: cell.workload.tokens,
        "precision": lambda cell: cell.backend.dtype,
    }
    for name, read in reads.items():
        if differing := [(a, b) for a, b in both if read(a) != read(b)]:
            a, b = differing[0]
            yield f"The {name} differs: {read(a)} against {read(b)} at batch {a.batch_size}.".replace(
                "None", "not recorded"
            )
    if any(b.timing and a.variant not in b.timing.interleaved_with for a, b in both):
        yield "The two were not timed in turn: a drift between the runs would look like a difference."


# ---------------------------------------------------------------- small things


def rate(cell: Cell) -> float:
    """Items per second of a cell that has them."""
    assert cell.items_per_s is not None
    return cell.items_per_s.median


def memory_of(cell: Cell) -> Memory:
    """The memory of a cell that has it."""
    assert cell.memory is not None
    return cell.memory


def peak(cell: Cell) -> int:
    """Peak bytes of a cell that has them."""
    return memory_of(cell).peak_bytes


def span(values: Iterable[float], sign: str = "") -> str:
    """Figures as `-59.4 to -4.0`, or as one where they are one."""
    figures = sorted(values)
    return " to ".join(
        dict.fromkeys(format(end, f"{sign}.1f") for end in (figures[0], figures[-1]))
    )


def interval(row: Overhead) -> str:
    """`[-51.2 to -50.1]`, or empty where there is none."""
    return "" if row.low is None or row.high is None else f"[{row.low:+.1f} to {row.high:+.1f}]"


def by_verdict(overhead: Iterable[Overhead]) -> dict[str, list[Overhead]]:
    """The rows of each verdict, in the order in which a verdict first comes."""
    found: dict[str, list[Overhead]] = {}
    for row in overhead:
        found.setdefault(row.verdict, []).append(row)
    return found


def batches_of(rows: Sequence[Overhead] | Sequence[Saving]) -> str:
    """`batch 8, 16`."""
    return "batch " + ", ".join(str(row.batch_size) for row in rows)


def _gib(amount_bytes: float) -> str:
    return f"{amount_bytes / GIB:.2f} GiB"


def _only(values: Sequence[str]) -> str | None:
    return values[0] if len(values) == 1 else None
