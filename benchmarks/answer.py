"""Write the README's answer from committed records:  python benchmarks/answer.py"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pandas as pd

from colqwen_lab.analysis import ablation, render
from colqwen_lab.analysis.compare import Comparison, compare
from colqwen_lab.analysis.speed import batches
from colqwen_lab.analysis.table import Results, rate

ROOT = Path(__file__).parents[1]
RUN = ROOT / "outputs" / "h100" / "configurations.jsonl"
README, FIGURE = ROOT / "README.md", ROOT / "docs" / "answer.png"
CARDS_GB = (8, 12)
BLOCK = re.compile(r"(?<=<!-- answer -->\n).*?(?=<!-- end of answer -->)", re.DOTALL)


def answer() -> str:
    """What each card holds, how fast, and which model to take: Markdown."""
    best = Results.load(RUN).select(execution="fast", kernel="auto")
    comparison = compare(best, best, CARDS_GB)
    rated = {series.variant: series.rated for series in comparison.pair}
    rows = []
    for card in comparison.cards.itertuples():
        cells = rated[card.side]
        row = {"card": f"{card.card_gb:g} GB", "model": card.side}
        row |= {"fits": "yes" if card.verdict == "fits" else "no"}
        row |= {"largest batch tried": card.batch_size, "its peak MiB": card.peak_bytes / 2**20}
        row |= {"queries/s there": card.items_per_s}
        fits = row["fits"] == "yes"
        row |= {"at batch 1": rate(cells[1]) if fits else None}
        fastest = card.best_batch_size
        row |= {
            "highest, at its batch": f"{rate(cells[fastest]):,.0f} at {fastest:g}" if fits else "-"
        }
        rows.append(row)
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_shown(value) for value in row.values()] for row in rows]
    table = [f"| {' | '.join(line)} |" for line in lines]
    cards = [_advice(comparison, card_gb) for card_gb in CARDS_GB]
    return "\n".join([*table, "", *cards, ""])


def _advice(comparison: Comparison, card_gb: float) -> str:
    """Which model to take on a card, in a sentence or two."""
    rows = comparison.cards
    rows = rows[(rows["card_gb"] == card_gb) & (rows["verdict"] == "fits")]
    if len(rows) < 2:
        side = next(iter(rows["side"]), "neither")
        return f"- {card_gb:g} GB: take {side}, the only one that fits."
    speeds = [s for s in comparison.speeds if s.batch_size <= rows["batch_size"].min()]
    take = []
    for verdict, side in (("faster", "awq"), ("slower", "base")):
        if group := [s for s in speeds if s.verdict == verdict]:
            share = render.span([abs(s.percent) for s in group])
            at = batches(s.batch_size for s in group)
            take.append(f"{side} at {at} (awq is {share} % {verdict})")
    rest = batches(s.batch_size for s in speeds if s.verdict not in ("faster", "slower"))
    saved = render.span(comparison.rows["saving_percent"])
    return (
        f"- {card_gb:g} GB: take {', and '.join(take)}. Speed does not decide at {rest}; awq takes "
        f"{saved} % less memory."
    )


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value
    return render.shown(value) if pd.isna(value) else f"{value:,.0f}"


def digest() -> str:
    """What the figure depends on: the records."""
    return hashlib.sha256(RUN.read_bytes()).hexdigest()[:16]


def main() -> None:
    """Write both."""
    README.write_text(BLOCK.sub(lambda _: answer(), README.read_text("utf-8")), "utf-8")
    figure = ablation.speed_plot(Results.load(RUN))
    figure.savefig(FIGURE, dpi=110, metadata={"records": digest()})


if __name__ == "__main__":
    main()
