"""Two series under a memory budget: what fits a card, and which is faster at its largest batch.

A card's "8 GB" is 8 GiB nominal. A row needs its peak plus what lies outside torch's allocator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from colqwen_lab.analysis.render import mib
from colqwen_lab.analysis.speed import differences, speed_ratio
from colqwen_lab.analysis.table import Pair, Series, memory_of, peak, rate
from colqwen_lab.hardware import USABLE_SHARE, Fit, fit_of, need_bytes, usable
from colqwen_lab.records import GIB, Cell


def card_fits(pair: Pair, cards_gb: Iterable[float]) -> pd.DataFrame:
    """One row a card and side: its largest measured batch that fits, or else is tight.

    `headroom_bytes` is pessimistic, so negative where tight. `best_batch_size` is the fastest
    batch with the same verdict. `ratio` is awq's rate over base's, each at its largest batch.
    """
    rows = []
    comparable = not differences(pair[0].cells, pair[1].cells)
    for card_gb in cards_gb:
        both = [_fit(series, card_gb) for series in pair]
        ours, theirs = (fit["items_per_s"] for fit in both)
        ratio = theirs / ours if ours and theirs and comparable else None
        rows += [
            {**fit, "side": s, "ratio": ratio} for fit, s in zip(both, ("base", "awq"), strict=True)
        ]
    return pd.DataFrame(rows)


def _fit(series: Series, card_gb: float) -> dict[str, Any]:
    nominal = round(card_gb * GIB)
    fits = {batch: fit_of(memory_of(cell), nominal) for batch, cell in series.sized.items()}
    verdict = next((fit for fit in ("fits", "tight") if fit in fits.values()), "does not fit")
    batches = [batch for batch, fit in fits.items() if fit == verdict != "does not fit"]
    cell = series.sized[max(batches)] if batches else None
    rates = {batch: rate(series.rated[batch]) for batch in batches if batch in series.rated}
    best = max(rates, key=rates.__getitem__, default=None)
    return {
        "card_gb": card_gb,
        "nominal_bytes": nominal,
        "usable_bytes": usable(nominal),
        "label": series.label,
        "verdict": verdict,
        "batch_size": cell and cell.batch_size,
        "items_per_s": cell and rates.get(cell.batch_size),
        "peak_bytes": cell and peak(cell),
        "headroom_bytes": cell and usable(nominal) - need_bytes(memory_of(cell))[1],
        "best_batch_size": best,
        "best_items_per_s": best and rates[best],
        "note": _note(series, fits, cell),
    }


def _note(series: Series, fits: dict[int, Fit], largest: Cell | None) -> str:
    """What limits the largest batch."""
    if largest is None:
        smallest = min(series.sized.values(), key=peak, default=None)
        if smallest is None:
            return "no row has a peak"
        return f"batch {smallest.batch_size} peaks at {mib(peak(smallest))}"
    above = {batch: fit for batch, fit in fits.items() if batch > largest.batch_size}
    tight = [batch for batch, fit in above.items() if fit == "tight" != fits[largest.batch_size]]
    failed = [cell for cell in series.failed if cell.batch_size > largest.batch_size]
    notes = [f"batch {max(tight)} is tight"] if tight else []
    notes += [f"batch {c.batch_size} {c.status} on {c.environment.device}" for c in failed]
    return "; ".join(notes) if above or failed else "largest measured"


def too_small(pair: Pair, cards_gb: Iterable[float]) -> str:
    """Why cards say nothing of models this small; empty where they do."""
    peaks = [peak(cell) for series in pair for cell in series.sized.values()]
    smallest = min(cards_gb, default=0) * GIB
    if not peaks or any(series.failed for series in pair) or max(peaks) > smallest / 100:
        return ""
    return f"no batch peaks above {mib(max(peaks))}, less than 1 % of every card"


def budgets(pair: Pair) -> pd.DataFrame:
    """One row a budget at which a largest batch changes: `need_bytes` of usable memory.

    The largest batch and rate of both sides there, `percent`, `high` and `reason` of their speed
    ratio, and the outcome: only awq, only base, no rates, faster, slower or inconclusive.
    """
    both = [cell for series in pair for cell in series.sized.values()]
    rows = []
    for need in sorted({need_bytes(memory_of(cell))[1] for cell in both}):
        ours, theirs = (_largest_within(series, need) for series in pair)
        row: dict[str, Any] = {"need_bytes": need, "outcome": "no rates"}
        for side, cell in (("base", ours), ("awq", theirs)):
            row[f"{side}_batch_size"] = cell and cell.batch_size
            row[f"{side}_items_per_s"] = cell and cell.items_per_s and rate(cell)
        if ours is None or theirs is None:
            row["outcome"] = "only awq" if ours is None else "only base"
        elif ours.items_per_s and theirs.items_per_s:
            speed = speed_ratio(ours, theirs)
            row |= {"outcome": speed.verdict, "percent": speed.percent}
            row |= {"high": speed.high, "reason": speed.reason}
        rows.append(row)
    columns = ["need_bytes", "outcome", "base_batch_size", "base_items_per_s", "awq_batch_size"]
    return pd.DataFrame(
        rows, columns=[*columns, "awq_items_per_s", "percent", "high", "reason"]
    ).astype({"percent": float, "high": float})


def _largest_within(series: Series, usable_bytes: int) -> Cell | None:
    cells = series.sized.values()
    within = [cell for cell in cells if need_bytes(memory_of(cell))[1] <= usable_bytes]
    return max(within, key=lambda cell: cell.batch_size, default=None)


def find_crossover(steps: pd.DataFrame) -> dict[str, Any]:
    """The least budget from which on base is at least as fast, each at its largest batch.

    By the medians; `open` says that an interval leaves awq the chance to be faster.
    `nominal_bytes` is the card that surely has that memory. Empty without a crossover.
    """
    only_base = (steps["outcome"] == "only base") & steps["base_items_per_s"].notna()
    behind = only_base | (steps["percent"] <= 0)
    last = int(behind[::-1].cumprod().sum())
    if not last:
        return {}
    start = steps.iloc[-last].drop(["outcome", "percent", "high", "reason"]).to_dict()
    return {
        "nominal_bytes": math.ceil(start["need_bytes"] / USABLE_SHARE),
        "open": bool((steps["high"].iloc[-last:] > 0).any()),
        **{name: None if pd.isna(value) else value for name, value in start.items()},
    }


def stretches(steps: pd.DataFrame) -> pd.DataFrame:
    """The budgets cut where the outcome changes: outcome, start_bytes, end_bytes, the percents."""
    changes = (steps["outcome"] != steps["outcome"].shift()).cumsum()
    table = steps.groupby(changes).agg(
        outcome=("outcome", "first"),
        start_bytes=("need_bytes", "first"),
        percents=("percent", lambda values: list(values.dropna())),
        disturbed=("reason", lambda values: bool(values.fillna("").any())),
    )
    return table.assign(end_bytes=table["start_bytes"].shift(-1))
