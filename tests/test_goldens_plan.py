"""Predictions equal those on file, to the byte.

The default run covers size tiny and a handful of others; `-m exhaustive` covers every row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colqwen_lab.options import PlanOptions
from colqwen_lab.predict.plan import plan, predictions
from colqwen_lab.records import MIB, read_cells

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
SETUP = ("model", "size", "workload", "execution", "protocol", "kernel")
PLANS: list[dict[str, Any]] = json.loads((GOLDENS / "plan.json").read_text())
PREDICTED: dict[str, list[int | None]] = json.loads((GOLDENS / "predicted.json").read_text())
QUICK_4B = ("awq 4b queries eager lean tritonv2",)
# Rows of each file that the default run predicts.
QUICK_ROWS = {
    "fleet/one-machine.jsonl": slice(None),
    "reference/sweep-base-awq-tiny-queries.jsonl": slice(None),
}


def name_of(golden: dict[str, Any]) -> str:
    return " ".join(golden[key] for key in SETUP)


def check_plan(golden: dict[str, Any], cards: bool = True) -> None:
    names = [card[0].removesuffix(" GB") for card in golden["cards"]] if cards else []
    batches = tuple(cell[0] for cell in golden["cells"])
    options = {key: golden[key] for key in SETUP} | {"batch_sizes": batches, "cards": names}
    cells, plans = plan(PlanOptions.of(options))
    for cell, (batch, tokens, weights, peak, reserved, flops, min_bytes) in zip(
        cells, golden["cells"], strict=True
    ):
        assert (cell.batch_size, cell.workload.tokens) == (batch, tokens)
        memory, work = cell.memory, cell.work
        assert memory is not None
        assert work is not None
        assert (memory.weights_bytes, memory.peak_bytes) == (weights, peak)
        assert (memory.reserved_bytes, work.flops, work.min_bytes) == (reserved, flops, min_bytes)
    for card, expected in zip(plans, golden["cards"] if cards else [], strict=True):
        found = [card.card, card.verdict, card.batch_size, card.safe_batch_size, card.peak_bytes]
        assert [*found, card.min_reserved_bytes, card.headroom_bytes] == expected


def check_rows(path: str, rows: slice) -> None:
    """A golden is MiB x 1000, of MiB as tables show them; None was not modelled."""
    cells = [cell for cell in read_cells(ROOT / path) if cell.memory][rows]
    for twin, expected in zip(predictions(cells), PREDICTED[path][rows], strict=True):
        if expected is not None:
            assert twin is not None
            assert twin.memory is not None
            mib = twin.memory.peak_bytes / MIB
            assert int(round(mib, 1 if mib > 100 else 3) * 1000) == expected


@pytest.mark.parametrize("golden", [g for g in PLANS if g["size"] == "tiny"], ids=name_of)
def test_plans_of_tiny(golden: dict[str, Any]) -> None:
    check_plan(golden)


@pytest.mark.parametrize("golden", [g for g in PLANS if name_of(g) in QUICK_4B], ids=name_of)
def test_some_plans_of_4b(golden: dict[str, Any]) -> None:
    check_plan(golden, cards=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("golden", [g for g in PLANS if g["size"] != "tiny"], ids=name_of)
def test_every_plan(golden: dict[str, Any]) -> None:
    check_plan(golden)


@pytest.mark.parametrize("path", QUICK_ROWS)
def test_some_rows(path: str) -> None:
    check_rows(f"outputs/{path}", QUICK_ROWS[path])


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", PREDICTED)
def test_every_row(path: str) -> None:
    check_rows(path, slice(None))
