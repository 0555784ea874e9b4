"""The report's claims against its rows, by the functions that compare any two series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from colqwen_lab.analysis.budget import Budget, budget_sentences, card_fits
from colqwen_lab.analysis.render import mib
from colqwen_lab.analysis.speed import SAME_PERCENT
from colqwen_lab.analysis.table import Pair
from colqwen_lab.hardware import usable
from colqwen_lab.records import GIB
from colqwen_lab.report_script import published_report


def claims(pair: Pair, rows: pd.DataFrame, budgets: Sequence[Budget]) -> pd.DataFrame:
    """Each claim of the report, what its rows say, and whether it follows from them.

    `rows` and `budgets` are a comparison's.
    """
    rows = rows.dropna(subset="percent").set_index("batch_size")
    table = [
        (claim["claim"], *_decide(claim, pair, rows, budgets))
        for claim in published_report()["claims"]
    ]
    return pd.DataFrame(table, columns=["claim", "rows_say", "follows"])


def _decide(
    claim: dict[str, Any], pair: Pair, rows: pd.DataFrame, budgets: Sequence[Budget]
) -> tuple[str, bool]:
    percents, savings = rows["percent"], rows["saving_percent"]
    fits = card_fits(pair, [claim.get("card_gb", 8)]).set_index("side")
    by_budget = " ".join(row.sentence for row in budget_sentences(budgets, "base", "awq"))
    ends = [budget.need_bytes for budget in budgets[1:]] + [math.inf]
    steps = list(zip(budgets, ends, strict=True))
    match claim:
        case {"saving_percent": percent}:
            says = ", ".join(f"{saving:.1f} % at batch {b}" for b, saving in savings.items())
            # "About 60 %" holds where the saving rounds to it at the nearest ten.
            return says, bool((savings.round(-1) == percent).all())
        case {"percent": percent, "batch_size": batch, "tolerance": tolerance}:
            return f"{percents[batch]:+.1f} %", abs(percents[batch] - percent) <= tolerance
        case {"compared": batches}:
            omitted = percents.drop(batches)
            listed = ", ".join(f"batch {b} ({percent:+.1f} %)" for b, percent in omitted.items())
            return f"not compared: {listed or 'none'}", omitted.empty
        case {"side": side, "largest_batch": batch}:
            row = fits.loc[side]
            if row["verdict"] != "fits":
                return f"{row['verdict']}: {row['note']}", batch is None
            figures = f"{row['items_per_s']:g} items/s, peak {mib(row['peak_bytes'])}"
            return f"fits up to batch {row['batch_size']:g}: {figures}", row["batch_size"] == batch
        case {"gain": gain, "divides": (awq, base)}:
            ratio, divided = fits["ratio"]["awq"], f"the claim divides {awq} by {base}"
            if pd.isna(ratio):
                return f"no ratio, base does not fit; {divided}", False
            says = f"{ratio:.3f} at the largest batches that fit; {divided}"
            return says, abs(100 * (ratio / gain - 1)) < SAME_PERCENT
        case {"awq_is_best_gb": (low, high)}:
            low, high = usable(low * GIB), usable(high * GIB)
            within = {step.outcome for step, end in steps if step.need_bytes <= high and end > low}
            return by_budget, budgets[0].need_bytes <= low and within <= {"only awq", "faster"}
        case {"base_is_best_gb": least}:
            within = {step.outcome for step, end in steps if end > usable(least * GIB)}
            return by_budget, within == {"slower"}
    says = f"{percents.iloc[0]:+.1f} % at batch {percents.index[0]}, the smallest"
    return says, rows["verdict"].iloc[0] == "slower"
