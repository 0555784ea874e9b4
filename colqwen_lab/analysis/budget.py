"""Two series under a memory budget: what fits a card, and which is faster at its largest batch.

A card's "8 GB" is 8 GiB nominal. A row needs its peak plus what lies outside torch's allocator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd

from colqwen_lab.analysis.render import mib
from colqwen_lab.analysis.speed import Recommendation, Speed, differences, recommend, speed_ratio
from colqwen_lab.analysis.table import Pair, Series, memory_of, peak, rate
from colqwen_lab.hardware import USABLE_SHARE, fit_of, need_bytes, usable
from colqwen_lab.records import GIB, MIB, Cell

#: Every card holds models with lower peaks: what lies outside torch is larger.
SMALL = 100 * MIB


class Budget(NamedTuple):
    """The largest batch of each side that fits in `need_bytes` of usable memory, and their speed.

    The outcome is `only awq`, `only base`, `no rates`, or the verdict on speed.
    """

    need_bytes: int
    outcome: str
    base: Cell | None
    awq: Cell | None
    speed: Speed | None


def card_fits(pair: Pair, cards_gb: Iterable[float]) -> pd.DataFrame:
    """One row a card and side: its largest measured batch that fits, or else is tight.

    `headroom_bytes` is pessimistic, so negative where tight. `best_batch_size` is the fastest
    batch with the same verdict. `ratio` is awq's rate over base's, each at its largest batch.
    """
    rows = []
    comparable = not differences(pair[0].cells, pair[1].cells)
    for gb in cards_gb:
        base, awq = (_fit(series, gb) for series in pair)
        ours, theirs = base["items_per_s"], awq["items_per_s"]
        ratio = theirs / ours if comparable and ours and theirs else None
        rows += [{"side": "base", "ratio": ratio} | base, {"side": "awq", "ratio": ratio} | awq]
    return pd.DataFrame(rows)


def _fit(series: Series, card_gb: float) -> dict[str, Any]:
    nominal = round(card_gb * GIB)
    fits = {batch: fit_of(memory_of(cell), nominal) for batch, cell in series.sized.items()}
    verdict = next((fit for fit in ("fits", "tight") if fit in fits.values()), "does not fit")
    cells = [series.sized[b] for b, fit in fits.items() if fit == verdict != "does not fit"]
    largest = cells[-1] if cells else None
    best = max((cell for cell in cells if cell.items_per_s), key=rate, default=None)
    above = largest.batch_size if largest else 0
    note = ""
    if larger := next((cell for cell in series.cells if cell.batch_size > above), None):
        status = mib(peak(larger)) if larger.batch_size in fits else larger.status
        note = f"batch {larger.batch_size}: {status}"
    return {
        "card_gb": card_gb,
        "label": series.label,
        "verdict": verdict,
        "batch_size": largest and largest.batch_size,
        "items_per_s": largest and largest.items_per_s and rate(largest),
        "peak_bytes": largest and peak(largest),
        "headroom_bytes": largest and usable(nominal) - need_bytes(memory_of(largest))[1],
        "best_batch_size": best and best.batch_size,
        "best_items_per_s": best and rate(best),
        "note": note,
    }


def obstacle(pair: Pair) -> str:
    """Why memory budgets do not apply to these models; empty where they do."""
    if differences(pair[0].cells, pair[1].cells):
        return "the two sides were not measured under the same conditions"
    if not all(series.rated and series.sized for series in pair):
        return "one side has no row with a rate and a peak"
    small = all(peak(cell) < SMALL for series in pair for cell in series.sized.values())
    return "every card holds models this small" if small else ""


def budgets(pair: Pair) -> list[Budget]:
    """The budgets at which a largest batch changes."""
    both = [cell for series in pair for cell in series.sized.values()]
    steps = []
    for need in sorted({need_bytes(memory_of(cell))[1] for cell in both}):
        base, awq = (_largest_within(series, need) for series in pair)
        outcome, speed = "no rates", None
        if base is None or awq is None:
            outcome = "only awq" if base is None else "only base"
        elif base.items_per_s and awq.items_per_s:
            speed = speed_ratio(base, awq)
            outcome = speed.verdict
        steps.append(Budget(need, outcome, base, awq, speed))
    return steps


def _largest_within(series: Series, usable_bytes: int) -> Cell | None:
    cells = reversed(series.sized.values())
    return next((c for c in cells if need_bytes(memory_of(c))[1] <= usable_bytes), None)


def find_crossover(steps: Sequence[Budget]) -> dict[str, Any]:
    """A dict of the least budget, in bytes, from which base's median rate is no lower than awq's.

    It holds the largest batch of each side and their rates. `nominal_bytes` is the card that surely
    has that memory. Empty without a crossover.
    """
    start: dict[str, Any] = {}
    for need, _, base, awq, speed in reversed(steps):
        if base is None or not base.items_per_s or (awq and (not speed or speed.percent > 0)):
            break
        start = {"nominal_bytes": math.ceil(need / USABLE_SHARE), "need_bytes": need}
        start |= {"base_batch_size": base.batch_size, "base_items_per_s": rate(base)}
        start |= {"awq_batch_size": awq and awq.batch_size, "awq_items_per_s": awq and rate(awq)}
    return start


def budget_sentences(steps: Sequence[Budget], base: str, awq: str) -> Iterator[Recommendation]:
    """A sentence for each stretch of budgets with one outcome."""
    ends = [f" to {step.need_bytes / GIB:.2f} GiB" for step in steps[1:]] + [" GiB or more"]
    for outcome, pairs in groupby(zip(steps, ends, strict=False), lambda pair: pair[0].outcome):
        stretch = list(pairs)
        free = f"{stretch[0][0].need_bytes / GIB:.2f}{stretch[-1][1]} free"
        if outcome in ("only base", "only awq"):
            fitting = base if outcome == "only base" else awq
            yield Recommendation(outcome.split()[1], f"With {free}, only {fitting} fits.")
        elif rows := [step.speed for step, _ in stretch if step.speed]:
            yield recommend(rows, base, awq, f"with {free}, each at its largest batch")
