from __future__ import annotations

import pytest
import torch

from colqwen_lab.errors import BadInput, Unmet
from colqwen_lab.model.loading import Loaded
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.runtime.workloads import Batches, query_batches

CPU = torch.device("cpu")


def make(tiny: Loaded, batch: int, texts: str = "report", samples: int = 64) -> Batches:
    return query_batches(tiny.model.config, tiny.tokenizer, batch, texts, samples, CPU)


@pytest.mark.parametrize(("batch", "count", "tokens"), [(1, 64, 18), (8, 8, 18), (64, 2, 19), (100, 2, 19)])
def test_report_queries(tiny: Loaded, batch: int, count: int, tokens: int) -> None:
    made = make(tiny, batch)
    assert len(made.inputs) == count
    assert made.workload.tokens == tokens
    assert all(inputs["input_ids"].shape == inputs["attention_mask"].shape for inputs in made.inputs)
    assert all(inputs["input_ids"].shape[0] == batch for inputs in made.inputs)
    masks = torch.cat([inputs["attention_mask"].flatten() for inputs in made.inputs])
    assert made.workload.padded_share == pytest.approx(1 - masks.float().mean().item(), abs=1e-6)
    # 0 to 9 in the first batch of eight: all of one length; padding starts where lengths differ.
    assert made.inputs[0]["attention_mask"].all() == (batch <= 8)


def test_queries_are_distinct(tiny: Loaded) -> None:
    rows = {tuple(row.tolist()) for inputs in make(tiny, 512).inputs for row in inputs["input_ids"]}
    assert len(rows) == 1024


def test_natural_queries_are_padded_more(tiny: Loaded) -> None:
    assert make(tiny, 8, "natural").workload.padded_share > 0.2


def test_samples_reach_the_batches(tiny: Loaded) -> None:
    assert len(make(tiny, 8, samples=16).inputs) == 2
    assert len(make(tiny, 8, samples=800).inputs) == 100


def test_without_a_tokenizer_lengths_are_the_report_s(tiny: Loaded) -> None:
    config = ColQwen3Config.of_size("4b")
    drawn = query_batches(config, None, 100, "report", 64, CPU)
    known = make(tiny, 100)
    assert drawn.workload.tokens == known.workload.tokens
    assert drawn.workload.padded_share == known.workload.padded_share
    assert drawn.workload.texts == "drawn at the report's lengths"
    assert drawn.inputs[0]["input_ids"].max() < config.text_config.vocab_size
    with pytest.raises(Unmet, match="valid without one: report"):
        query_batches(config, None, 8, "natural", 64, CPU)
    with pytest.raises(BadInput, match="unknown texts 'x'"):
        query_batches(config, None, 8, "x", 64, CPU)
