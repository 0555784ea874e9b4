"""Predicted pages against what the tracker measures here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import colqwen_lab as lab
from colqwen_lab.errors import BadInput
from colqwen_lab.measure.memory import measure
from colqwen_lab.model.loading import Loaded
from colqwen_lab.predict.pages import page_predictor
from colqwen_lab.predict.plan import predictions
from colqwen_lab.predict.predictor import HOST, Predictor
from colqwen_lab.records import MIB, Memory, read_cells
from colqwen_lab.runtime.batches import Pages
from colqwen_lab.runtime.eager import Steps

H100 = Path(__file__).parents[2] / "outputs" / "h100" / "pages.jsonl"


@pytest.mark.parametrize("variant", ["base", "awq"])
@pytest.mark.parametrize("protocol", ["lean", "published"])
def test_agrees_with_the_tracker_here(
    variant: str, protocol: str, tiny: Loaded, tiny_awq: Loaded
) -> None:
    loaded = tiny if variant == "base" else tiny_awq
    pages = Pages("192x256", visual_tokens=64)
    for batch in (1, 8):
        made = pages.batches(loaded.model.config, loaded.tokenizer, batch, 0, torch.device("cpu"))
        tracked = measure(
            loaded, made.inputs[:1], Steps(loaded.model, made.inputs[:1], "eager", protocol)
        )
        cell = page_predictor(variant, "tiny", kernel="torch").cell(
            batch, protocol, HOST, made.workload.tokens
        )
        assert cell.memory is not None
        assert cell.memory.peak_bytes == pytest.approx(tracked.peak_bytes, rel=0.01)
        assert sum((cell.memory.breakdown or {}).values()) == cell.memory.peak_bytes
        assert cell.workload.index_bytes == made.workload.index_bytes


def test_beyond_the_largest_run_figures_lie_on_a_line() -> None:
    made = page_predictor("base", "tiny", kernel="torch")
    line, run = made.cell(48, tokens=81), Predictor.cell(made, 48, tokens=81)
    assert line.memory is not None
    assert run.memory is not None
    assert line.memory.peak_bytes == pytest.approx(run.memory.peak_bytes, rel=0.01)
    assert line.work == run.work
    assert sum((line.memory.breakdown or {}).values()) == pytest.approx(
        line.memory.peak_bytes, abs=10
    )


def test_an_a4_page_of_the_4b() -> None:
    """Its 1,271 tokens through 7.267 GFLOP of text linears each, and 5,040 patches through the vision tower's 306 M."""
    made = lab.plan("awq", 1, size="4b", workload="pages", cards="").to_dict()
    cell = made["cells"][0]
    assert cell["tokens"] == 1271
    assert page_predictor("awq", "4b").cell(1).workload.pages == Pages().label
    assert cell["flops"] > 1271 * 7.267e9 + 2 * 5040 * 300e6
    assert cell["ledger"]["vision tower"] == pytest.approx(584.111 * MIB, rel=0.001)


@pytest.mark.parametrize(("variant", "within"), [("base", 0.001), ("awq", 0.004)])
def test_peaks_that_an_h100_measured(variant: str, within: float) -> None:
    """Nothing is fitted to them; at every batch some 10 MiB of awq are in no prediction. The other rows agree too."""
    chosen = {(1280, 2), (256, 16)}
    every = [cell for cell in read_cells(H100) if cell.variant == variant]
    rows = [cell for cell in every if (cell.workload.visual_tokens, cell.batch_size) in chosen]
    assert len(rows) == 2
    for cell, twin in zip(rows, predictions(rows), strict=True):
        assert cell.memory is not None
        assert twin is not None
        assert twin.memory is not None
        assert twin.memory.peak_bytes == pytest.approx(cell.memory.peak_bytes, rel=within)


def test_bad_input() -> None:
    for given in (
        {"workload": "page"},
        {"visual_tokens": 0, "workload": "pages"},
        {"tokens": 5, "workload": "pages"},
    ):
        with pytest.raises(BadInput, match="valid"):
            lab.plan("base", 1, size="tiny", **given)  # type: ignore[arg-type]
    with pytest.raises(
        BadInput, match="visual_tokens are of workload pages, not queries; valid: workload pages"
    ):
        lab.plan("base", 1, size="tiny", visual_tokens=256)


def test_a_measured_cell_of_pages_beside_its_prediction() -> None:
    made = page_predictor("base", "tiny", kernel="torch").cell(2, target=HOST, tokens=81)
    assert made.memory is not None
    seen = made.model_copy(
        update={
            "origin": "measured",
            "backend": made.backend.model_copy(update={"engaged": {"torch.nn.Linear": 28}}),
            "memory": Memory(peak_bytes=made.memory.peak_bytes, method="tracked"),
            "workload": made.workload.model_copy(update={"pages": "drawn, 64 x 64 pixels"}),
        }
    )
    (twin,) = predictions([seen])
    assert twin is not None
    assert twin.memory is not None
    assert twin.memory.peak_bytes == made.memory.peak_bytes
    assert twin.settings() == seen.settings()
    sizes = seen.model_copy(
        update={"workload": seen.workload.model_copy(update={"padded_share": 0.2})}
    )
    assert predictions([sizes]) == [None]
