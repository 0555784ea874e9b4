"""The report's claims held against its own rows, by the same functions that compare any two series."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colqwen_lab.analysis.compare import SAME_PERCENT, Card, CardFit, on_card, span, walk
from colqwen_lab.analysis.results import mib
from colqwen_lab.hardware import usable
from colqwen_lab.records import GIB, published_report

if TYPE_CHECKING:
    from colqwen_lab.analysis.compare import Comparison


@dataclass(frozen=True)
class Claim:
    """What the report claims, what its rows say, and whether the one follows from the other."""

    claim: str
    rows_say: str
    follows: bool


def claims(comparison: Comparison) -> tuple[Claim, ...]:
    """Every claim of the report that its rows can decide, held against `comparison` of those rows."""
    said = published_report()["claims"]
    return (
        _saving(comparison, said["memory_saving"]),
        *_overheads(comparison, said["overhead_percent"]),
        *(found for card in said["cards"] for found in _card(comparison, card)),
        *_use(comparison, said),
    )


def _saving(comparison: Comparison, claim: str) -> Claim:
    """Holds where the saving is the claimed one when rounded, as "about" is, to the nearest ten."""
    about = int(re.findall(r"\d+", claim)[0])
    rows = {row.batch_size: row.saving_percent for row in comparison.memory}
    elsewhere = [
        f"{percent:.1f} % at batch {batch}"
        for batch, percent in rows.items()
        if round(percent, -1) != about
    ]
    holding = [percent for percent in rows.values() if round(percent, -1) == about]
    parts = [f"{span(holding)} % at {len(holding)} of {len(rows)} batch sizes"] if holding else []
    return Claim(claim, ", ".join(parts + elsewhere), not elsewhere)


def _overheads(comparison: Comparison, claimed: dict[str, float]) -> Iterator[Claim]:
    rows = {str(row.batch_size): row.overhead_percent for row in comparison.overhead}
    for batch, percent in claimed.items():
        off = abs(rows[batch] - percent)
        digits = 0 if isinstance(percent, int) else 1
        yield Claim(
            f"overhead {percent:+} % at batch {batch}",
            f"{rows[batch]:+.1f} %",
            off <= 0.5 * 10**-digits,
        )
    left_out = {batch: percent for batch, percent in rows.items() if batch not in claimed}
    which = ", ".join(f"batch {batch} ({percent:+.1f} %)" for batch, percent in left_out.items())
    yield Claim(
        f"the same batch is compared at {', '.join(claimed)}",
        f"left out: {which or 'none'}",
        not left_out,
    )


def _card(comparison: Comparison, claimed: dict[str, Any]) -> Iterator[Claim]:
    card = on_card(comparison.base, comparison.awq, claimed["card_gb"])
    for series, fit in ((comparison.base, card.base), (comparison.awq, card.awq)):
        yield _largest(f"{card.card_gb:g} GB: {series.label}", claimed[fit.variant], fit)
    yield _result(card, claimed)


def _largest(who: str, claimed: dict[str, Any], fit: CardFit) -> Claim:
    batch, fits = claimed["batch_size"], fit.verdict == "fits"
    if not claimed["fits"]:
        return Claim(f"{who} at batch {batch} does not fit", f"{fit.verdict}: {fit.note}", not fits)
    says = fit.note
    if fit.batch_size and fit.peak_bytes and fit.items_per_s:
        says = f"{fit.verdict} up to batch {fit.batch_size}: {fit.items_per_s:g} items/s, peak {mib(fit.peak_bytes)}"
    return Claim(
        f"{who} at most at batch {batch}, {claimed['items_per_s']} items/s",
        says,
        fits and fit.batch_size == batch,
    )


def _result(card: Card, claimed: dict[str, Any]) -> Claim:
    """The claimed gain: `4.7x`, or `34 % higher`, against the rates at the largest batches that fit."""
    number = float(re.findall(r"[\d.]+", claimed["result"])[0])
    gain = number if "x" in claimed["result"].split()[0] else 1 + number / 100
    ours, theirs = (claimed[name]["items_per_s"] for name in ("base", "awq"))
    says = "no ratio, base does not fit"
    if card.ratio and card.base.items_per_s and card.awq.items_per_s:
        says = f"{card.awq.items_per_s:g} / {card.base.items_per_s:g} = {card.ratio:.3f} at the largest batches that fit"
    follows = card.ratio is not None and abs(100 * (card.ratio / gain - 1)) < SAME_PERCENT
    made = f"the claim divides {theirs} by {ours} = {theirs / ours:.2f}"
    return Claim(f"{card.card_gb:g} GB: {claimed['result']}", f"{says}; {made}", follows)


def _use(comparison: Comparison, said: dict[str, Any]) -> Iterator[Claim]:
    """The recommendations that name a budget, or that the smallest batch decides."""
    stretches = list(walk(comparison.base, comparison.awq))
    by_budget = "; ".join(
        f"{stretch.regime} from {stretch.start_bytes / GIB:.1f} GiB"
        + (f" ({span(stretch.percents, '+')} %)" if stretch.percents else "")
        for stretch in stretches
    )
    for text in said["use_quantized_when"]:
        if ends := re.search(r"(\d+)-(\d+) GB", text):
            low, high = (usable(int(end) * GIB) for end in ends.groups())
            within = [
                s
                for s in stretches
                if s.start_bytes <= high and (s.end_bytes is None or s.end_bytes > low)
            ]
            holds = stretches[0].start_bytes <= low and all(
                s.regime in ("only awq", "awq faster") for s in within
            )
            yield Claim(f"use the quantised model when {text}", by_budget, holds)
    row = comparison.overhead[0]
    for text in said["use_base_when"]:
        if start := re.search(r"(\d+) GB and more", text):
            within = [
                s
                for s in stretches
                if s.end_bytes is None or s.end_bytes > usable(int(start[1]) * GIB)
            ]
            yield Claim(
                f"use BASE when {text}", by_budget, all(s.regime == "base faster" for s in within)
            )
        elif "small" in text or "latency" in text:
            says = f"{row.overhead_percent:+.1f} % at batch {row.batch_size}, the smallest"
            yield Claim(f"use BASE when {text}", says, row.verdict == "slower")
