"""Peak memory, and the largest batch under the memory of a smaller card."""

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
from colqwen_lab.measure import memory, worker
from colqwen_lab.measure import sweep as module
from colqwen_lab.measure.memory import MARGIN, VERIFIED_RUNS, batch_search, measure, set_cap
from colqwen_lab.model.loading import Loaded
from colqwen_lab.records import Cell, Memory, read_cells
from colqwen_lab.runtime import eager as execution
from colqwen_lab.runtime.batches import query_batches
from colqwen_lab.runtime.eager import Steps
from tests.measure import sweeps


def peak(loaded: Loaded, batch: int, protocol: str = "lean") -> Memory:
    batches = query_batches(
        loaded.model.config, loaded.tokenizer, batch, "report", 64, torch.device("cpu")
    )
    return measure(loaded, batches.inputs[-1], Steps(loaded.model, "eager", protocol))


@pytest.mark.parametrize("protocol", ["lean", "published"])
def test_is_exact_and_repeatable(tiny: Loaded, protocol: str) -> None:
    assert len({peak(tiny, 8, protocol).peak_bytes for _ in range(3)}) == 1


def test_grows_with_the_batch_and_with_the_published_protocol(tiny: Loaded) -> None:
    peaks = [peak(tiny, batch).peak_bytes for batch in (1, 8, 64)]
    assert peaks == sorted(peaks)
    lean, published = peak(tiny, 64), peak(tiny, 64, "published")
    text = tiny.model.config.text_config
    a_cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * 64 * 19
    # Two KV caches live at the peak of the published protocol: the last step's and this one's.
    assert published.peak_bytes - lean.peak_bytes >= 1.9 * a_cache


def test_quantised_weights_take_less(tiny: Loaded, tiny_awq: Loaded) -> None:
    assert peak(tiny_awq, 1).resident_bytes < peak(tiny, 1).resident_bytes
    saved = tiny.weights_bytes - tiny_awq.weights_bytes
    linears = 589_824  # parameters of the 28 text linears at tiny
    packed = linears // 2 + linears // 128 * 2.5
    assert saved == pytest.approx(2 * linears - packed, rel=0.001)


# ---------------------------------------------------------------- a smaller card


@given(st.integers(0, 5000), st.integers(1, 4096))
def test_search_finds_the_edge_to_its_margin(edge: int, limit: int) -> None:
    outcomes: list[tuple[int, str]] = []
    for batch in batch_search(outcomes, limit):
        outcomes.append((batch, "ok" if batch <= edge else "oom"))
    found, most = outcomes[-1][0], min(edge, limit)
    if most == 0:
        assert outcomes == [(1, "oom")]
        return
    assert outcomes[-VERIFIED_RUNS:] == [(found, "ok")] * VERIFIED_RUNS
    assert (1 - 2 * MARGIN) * most - 1 <= found <= max(1, most * (1 - MARGIN))
    tried = [batch for batch, _ in outcomes[:-VERIFIED_RUNS]]
    assert max(Counter(tried).values()) == 1
    assert len(tried) <= 26


def test_a_cap_needs_a_gpu() -> None:
    message = "there is none here; `colqwen-lab plan` predicts it"
    with pytest.raises(MissingRequirement, match=message):
        set_cap(find_card("8"), torch.device("cpu"))


def test_a_cap_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "others_on", lambda device, own: 2)
    with pytest.raises(MissingRequirement, match="other processes are on this GPU"):
        set_cap(find_card("8"), torch.device("cuda", 0))


def run(path: Path, batches: str = "1", **options: Any) -> list[Cell]:
    return sweeps.run(path, "base", batches, **{"card": "8"} | options)


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
    lines: list[str] = []
    (cell,) = cells = run(tmp_path / "rows.jsonl", progress=lines.append)
    assert lines[0] == "searching the largest batch of base eager/lean/auto on 8 GB"
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
    plain = run(path, "10", card="")
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
    really = module.batch_search

    def then_less(outcomes: list[tuple[int, str]]) -> Any:
        for batch in really(outcomes):
            if (10, "ok") in outcomes or ((11, "ok") in outcomes and batch == 10):
                finite["edge"] = 7
            yield batch

    monkeypatch.setattr(module, "batch_search", then_less)
    (cell,) = run(tmp_path / "rows.jsonl")
    assert (cell.status, cell.batch_size) == ("ok", 7)
    assert cell.card is not None
    assert cell.card.verified_runs == 3
    assert cell.card.tried[10] == "ok", "what the search saw stays"
