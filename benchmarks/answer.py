"""Write the README's answer from committed records:  python benchmarks/answer.py"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from colqwen_lab.analysis import ablation, render
from colqwen_lab.analysis.compare import compare
from colqwen_lab.analysis.table import Results

ROOT = Path(__file__).parents[1]
RUN = ROOT / "outputs" / "h100" / "configurations.jsonl"
README, FIGURE = ROOT / "README.md", ROOT / "docs" / "answer.png"
CARDS_GB = (8, 12)
BLOCK = re.compile(r"(?<=<!-- answer -->\n).*?(?=<!-- end of answer -->)", re.DOTALL)


def answer() -> str:
    """What each card holds, how fast, and when to use which in the best configuration: Markdown."""
    best = Results.load(RUN).select(execution="fast", kernel="auto")
    comparison = compare(best, best, CARDS_GB)
    rows = [
        {
            "card": f"{card.card_gb:g} GB",
            "model": card.side,
            "fits": "yes" if card.verdict == "fits" else "no",
            "largest measured batch": card.batch_size,
            "queries/s there": card.items_per_s,
            "peak MiB": card.peak_bytes / 2**20,
        }
        for card in comparison.cards.itertuples()
    ]
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_shown(value) for value in row.values()] for row in rows]
    table = [f"| {' | '.join(line)} |" for line in lines]
    sentences = [
        f"- {use.sentence}"
        for use in comparison.recommendations
        if " at batch " in use.sentence or "only" in use.sentence
    ]
    return "\n".join([*table, "", *sentences, ""])


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value
    return render.shown(value) if value != value else f"{value:,.0f}"


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
