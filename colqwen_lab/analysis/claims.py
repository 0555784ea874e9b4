"""The report's claims against its rows, by the functions that compare any two series."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from colqwen_lab.analysis.budget import card_fits, stretches
from colqwen_lab.analysis.render import mib, span
from colqwen_lab.analysis.speed import SAME_PERCENT
from colqwen_lab.analysis.table import Pair
from colqwen_lab.hardware import usable
from colqwen_lab.records import GIB, published_report


class Claim(NamedTuple):
    """A claim of the report, what its rows say, and whether the claim follows from them."""

    claim: str
    rows_say: str
    follows: bool


def claims(pair: Pair, rows: pd.DataFrame, budgets: pd.DataFrame) -> pd.DataFrame:
    """Every claim of the report that rows can decide; `rows` and `budgets` are a comparison's."""
    report = published_report()["claims"]
    shared = rows.dropna(subset="percent").set_index("batch_size")
    decided = [
        _saving(report["memory_saving"], shared["saving_percent"]),
        *_speeds(report["overhead_percent"], shared["percent"]),
        *(claim for card in report["cards"] for claim in _card(pair, card)),
        *_use(report, shared, stretches(budgets)),
    ]
    return pd.DataFrame(decided, columns=list(Claim._fields))


def _saving(claim: str, savings: pd.Series[float]) -> Claim:
    """Holds where every saving rounds to the claimed one at the nearest ten, as "about" says."""
    holds = savings.round(-1) == int(re.findall(r"\d+", claim)[0])
    share = f"{span(savings[holds], 1)} % at {holds.sum()} of {len(savings)} batch sizes"
    parts = [share] if holds.any() else []
    parts += [f"{percent:.1f} % at batch {batch}" for batch, percent in savings[~holds].items()]
    return Claim(claim, ", ".join(parts), bool(holds.all()))


def _speeds(claimed: dict[str, float], percents: pd.Series[float]) -> Iterator[Claim]:
    for batch, percent in claimed.items():
        measured = percents[int(batch)]
        follows = abs(measured - percent) <= (0.5 if isinstance(percent, int) else 0.05)
        yield Claim(f"overhead {percent:+} % at batch {batch}", f"{measured:+.1f} %", follows)
    omitted = percents.drop([int(batch) for batch in claimed])
    listed = ", ".join(f"batch {batch} ({percent:+.1f} %)" for batch, percent in omitted.items())
    claim = f"the same batch is compared at {', '.join(claimed)}"
    yield Claim(claim, f"not compared: {listed or 'none'}", omitted.empty)


def _card(pair: Pair, claimed: dict[str, Any]) -> Iterator[Claim]:
    fits = card_fits(pair, [claimed["card_gb"]])
    card = f"{claimed['card_gb']:g} GB"
    for row in fits.itertuples():
        side = claimed[row.side]
        says = f"{row.verdict}: {row.note}"
        claim = f"{card}: {row.label} at batch {side['batch_size']} does not fit"
        follows = row.verdict != "fits"
        if side["fits"]:
            figures = f"{row.items_per_s:g} items/s, peak {mib(row.peak_bytes)}"
            says = f"{row.verdict} up to batch {row.batch_size:g}: {figures}"
            batch, items = side["batch_size"], side["items_per_s"]
            claim = f"{card}: {row.label} at most at batch {batch}, {items} items/s"
            follows = not follows and row.batch_size == batch
        yield Claim(claim, says, follows)
    number = float(re.findall(r"[\d.]+", claimed["result"])[0])
    gain = number if "x" in claimed["result"].split()[0] else 1 + number / 100
    ours, theirs = (claimed[side]["items_per_s"] for side in fits["side"])
    (base, awq), ratio = fits["items_per_s"], fits["ratio"].iloc[0]
    says = "no ratio, base does not fit"
    if pd.notna(ratio):
        says = f"{awq:g} / {base:g} = {ratio:.3f} at the largest batches that fit"
    divided = f"the claim divides {theirs} by {ours} = {theirs / ours:.2f}"
    follows = pd.notna(ratio) and abs(100 * (ratio / gain - 1)) < SAME_PERCENT
    yield Claim(f"{card}: {claimed['result']}", f"{says}; {divided}", bool(follows))


def _use(report: dict[str, Any], rows: pd.DataFrame, budgets: pd.DataFrame) -> Iterator[Claim]:
    """The recommendations that name a budget, or that the smallest batch decides."""
    by_budget = "; ".join(
        f"{row.outcome if 'only' in row.outcome else 'awq ' + row.outcome} from "
        f"{row.start_bytes / GIB:.1f} GiB"
        + (f" ({span(row.percents, 1, '+')} %)" if row.percents else "")
        for row in budgets.itertuples()
    )
    ends = budgets["end_bytes"].fillna(float("inf"))
    for text in report["use_quantized_when"]:
        if match := re.search(r"(\d+)-(\d+) GB", text):
            low, high = (usable(int(end) * GIB) for end in match.groups())
            within = budgets[(budgets["start_bytes"] <= high) & (ends > low)]
            best = within["outcome"].isin(["only awq", "faster"]).all()
            follows = bool(best and budgets["start_bytes"].iloc[0] <= low)
            yield Claim(f"use the quantised model when {text}", by_budget, follows)
    for text in report["use_base_when"]:
        if match := re.search(r"(\d+) GB and more", text):
            within = budgets[ends > usable(int(match[1]) * GIB)]
            follows = bool((within["outcome"] == "slower").all())
            yield Claim(f"use BASE when {text}", by_budget, follows)
        elif "small" in text or "latency" in text:
            says = f"{rows['percent'].iloc[0]:+.1f} % at batch {rows.index[0]}, the smallest"
            yield Claim(f"use BASE when {text}", says, rows["verdict"].iloc[0] == "slower")
