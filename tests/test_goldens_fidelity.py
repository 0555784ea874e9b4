"""The fidelity figures of the committed records equal those of tests/goldens/fidelity.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colqwen_lab.analysis.fidelity import Fidelities
from colqwen_lab.retrieval.record import NAMES

ROOT = Path(__file__).parents[1]
GOLDENS = json.loads((ROOT / "tests" / "goldens" / "fidelity.json").read_text())
VERDICTS = {"same within 0.01": "same", "cannot tell": "inconclusive"}  # old -> new


@pytest.fixture(scope="module")
def committed() -> Fidelities:
    return Fidelities.load(ROOT / "outputs" / "fidelity" / "schemes-tiny.jsonl")


def test_all_records_are_there_and_the_frontier_is_the_same(committed: Fidelities) -> None:
    assert [record.label for record in committed.records] == list(GOLDENS["rows"])
    assert [record.label for record in committed.frontier()] == GOLDENS["frontier"]


@pytest.mark.parametrize("label", GOLDENS["rows"])
def test_every_metric_of_every_variant(committed: Fidelities, label: str) -> None:
    record, golden = committed.pick(label), GOLDENS["rows"][label]
    assert record.weights_bytes == golden["weights_bytes"]
    assert record.pages_per_s is not None
    assert record.pages_per_s.median == pytest.approx(golden["pages_per_s"], rel=1e-12)
    for metric in NAMES:
        loss = committed.loss(record, metric)
        *numbers, verdict = golden[metric]
        figures = [loss.base, loss.variant, loss.difference, loss.low, loss.high]
        assert figures == pytest.approx(numbers, abs=1e-12), metric
        assert loss.verdict == VERDICTS.get(verdict, verdict), metric
