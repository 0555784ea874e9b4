"""The search under a card's memory, on a fake device whose memory is finite."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.hardware import find_card
from colqwen_lab.measure import cap, worker
from colqwen_lab.measure import sweep as module
from colqwen_lab.measure.cap import MARGIN, largest_running, set_cap
from colqwen_lab.measure.environment import pick_device
from colqwen_lab.measure.sweep import request, sweep
from colqwen_lab.measure.timing import StoppingRule
from colqwen_lab.records import Cell, read_cells
from colqwen_lab.runtime import eager as execution

QUICK = StoppingRule(min_steps=2, max_steps=2, min_s=0, max_s=0, max_warmup=1)


@given(st.integers(0, 5000), st.integers(1, 4096))
def test_search_finds_the_edge_to_its_margin(edge: int, limit: int) -> None:
    tried: list[int] = []

    def runs(batch: int) -> bool:
        tried.append(batch)
        return batch <= edge

    found = largest_running(runs, limit)
    most = min(edge, limit)
    assert found <= most
    assert found >= most * (1 - MARGIN)
    assert found == most or found > 1
    assert max(Counter(tried).values()) == 1
    assert len(tried) <= 26


def test_a_cap_needs_a_gpu() -> None:
    with pytest.raises(
        MissingRequirement, match="there is none here; `colqwen-lab plan` predicts it"
    ):
        set_cap(find_card("8"), torch.device("cpu"))


def test_a_cap_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cap, "others_on", lambda device, own: 2)
    with pytest.raises(MissingRequirement, match="other processes are on this GPU"):
        set_cap(find_card("8"), torch.device("cuda", 0))


def test_a_gpu_is_named_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to cap `cuda` without a number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert pick_device() == torch.device("cuda:0")


def run(path: Path, model: str = "base", card: str = "8") -> list[Cell]:
    options: dict[str, Any] = {
        "weights": "random",
        "card": find_card(card),
        "output": path,
        "patience": QUICK,
        "isolated": False,
    }
    return sweep(request(model, "1", **options), progress=lambda line: None)


@pytest.fixture
def finite(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A device that holds `edge` queries, and a cap of that card."""
    device = {"edge": 11}

    def forward(model: Any, inputs: Any, use_cache: bool) -> Any:
        if inputs["input_ids"].shape[0] > device["edge"]:
            raise torch.OutOfMemoryError("out of the card's memory")
        return execution.eager(model, inputs, use_cache)

    monkeypatch.setitem(execution.EXECUTIONS, "eager", forward)
    monkeypatch.setattr(worker, "set_cap", lambda card, device: (card.usable_bytes - 500, 500))
    return device


def test_finds_verifies_and_records_the_largest_batch(
    tmp_path: Path, finite: dict[str, int]
) -> None:
    (cell,) = cells = run(tmp_path / "rows.jsonl")
    assert (cell.status, cell.batch_size) == ("ok", 10)
    assert cell.card is not None
    assert cell.card.tried[11] == "ok"
    assert cell.card.tried[12] == "oom"
    assert cell.card.verified_runs == 3
    assert (cell.card.name, cell.card.outside_bytes) == ("8 GB", 500)
    assert read_cells(tmp_path / "rows.jsonl") == cells == run(tmp_path / "rows.jsonl")


def test_cards_and_plain_cells_are_different_rows(tmp_path: Path, finite: dict[str, int]) -> None:
    path = tmp_path / "rows.jsonl"
    run(path)
    finite["edge"] = 40
    assert run(path, card="12")[0].batch_size == 38
    plain = sweep(
        request("base", "10", weights="random", output=path, patience=QUICK, isolated=False),
        progress=lambda line: None,
    )
    assert [cell.card and cell.card.name for cell in read_cells(path)] == ["8 GB", "12 GB", None]
    assert plain[0].card is None


def test_not_even_one(tmp_path: Path, finite: dict[str, int]) -> None:
    finite["edge"] = 0
    (cell,) = run(tmp_path / "rows.jsonl")
    assert (cell.status, cell.batch_size) == ("oom", 1)
    assert cell.card is not None
    assert cell.card.verified_runs == 0


def test_a_defect_is_no_edge_of_memory(
    tmp_path: Path, finite: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(model: Any, inputs: Any, use_cache: bool) -> Any:
        if inputs["input_ids"].shape[0] > 4:
            raise ValueError("a shape that does not fit")
        return execution.eager(model, inputs, use_cache)

    monkeypatch.setitem(execution.EXECUTIONS, "eager", forward)
    (cell,) = run(tmp_path / "rows.jsonl")
    assert (cell.status, cell.items_per_s) == ("failed", None)
    assert "a shape that does not fit" in (cell.reason or "")


def test_steps_down_until_all_pass(
    tmp_path: Path, finite: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = module.largest_running

    def then_less(runs: Any) -> int:
        found = really(runs)
        finite["edge"] = 7
        return found

    monkeypatch.setattr(module, "largest_running", then_less)
    (cell,) = run(tmp_path / "rows.jsonl")
    assert (cell.status, cell.batch_size) == ("ok", 7)
    assert cell.card is not None
    assert cell.card.verified_runs == 3
    assert cell.card.tried[10] == "ok", "what the search saw stays"
