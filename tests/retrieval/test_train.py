"""A short training, and the default weights against their record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random

import pytest
import torch

from colqwen_lab.errors import BadInput
from colqwen_lab.model import synthetic
from colqwen_lab.model.checkpoint import FolderCheckpoint, default_checkpoint
from colqwen_lab.model.config import SIZES, VARIANTS
from colqwen_lab.model.inputs import TINY
from colqwen_lab.model.loading import Loaded, load
from colqwen_lab.model.quantize import RECORD
from colqwen_lab.retrieval import train

CPU = torch.device("cpu")
SHIPPED = json.loads((TINY / RECORD).read_text())


def test_the_loss_is_the_share_of_relevant_pages() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -torch.inf, -torch.inf]])
    answers = torch.tensor([[True, True, False, False], [True, False, False, False]])
    assert train.contrastive_loss(scores, answers).item() == pytest.approx(
        (math.log(2) + math.log(4 / 3)) / 2
    )


def test_batches_hold_alike_training_pages() -> None:
    batch = [synthetic.facts(number) for number in train._batch(Random(0), 8)]
    assert len(batch) == train.BATCH
    for start in range(0, train.BATCH, 8):
        assert len({(facts.kind, facts.colour) for facts in batch[start : start + 8]}) == 1
        assert len(set(batch[start : start + 8])) == 8


@pytest.mark.exhaustive
def test_a_short_training_learns_and_depends_on_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[float] = []
    splits: set[str] = set()
    facts = synthetic._facts
    monkeypatch.setattr(
        train, "_batch", lambda random, _: draws.append(random.random()) or list(range(6))
    )
    monkeypatch.setattr(synthetic, "_facts", lambda split: splits.add(split) or facts(split))
    lines: list[str] = []
    record = train.train_tiny(tmp_path / "new", 1, ((64, 20, 1),), lines.append)
    assert lines == [f"step 20 of 20: loss {record['loss']['last 25']:.3f}"]
    again = train.fresh(1)
    splits.clear()
    losses = train.fit(again, 1, ((64, 20, 1),), lines.append)
    assert splits == {"train"}
    expected = Random(1)
    assert draws == 2 * [expected.random() for _ in range(20)]
    assert losses[0] == pytest.approx(record["loss"]["first"], abs=1e-4)
    assert losses[-1] < losses[0] / 4
    saved = load(FolderCheckpoint(tmp_path / "new"), CPU).model.state_dict()
    assert all(
        torch.equal(saved[name], tensor.bfloat16())
        for name, tensor in again.model.state_dict().items()
    )
    with pytest.raises(BadInput, match="seed must be 0 to 18446744073709551615, got -1"):
        train.train_tiny(tmp_path / "another", -1)
    with pytest.raises(BadInput, match="got 18446744073709551616"):
        train.train_tiny(tmp_path / "another", 2**64)
    assert not (tmp_path / "another").exists()
    with pytest.raises(BadInput, match="is not empty"):
        train.train_tiny(tmp_path / "new")


def test_the_default_weights_match_their_record(tiny: Loaded) -> None:
    source = default_checkpoint(VARIANTS["base"], "tiny", "auto", CPU)
    assert source.label == f"tiny default (trained, #{SHIPPED['digest']})"
    for part in ("text_config", "vision_config"):
        assert SIZES["tiny"][part].items() <= getattr(source.config, part).to_dict().items()
    assert sum(path.stat().st_size for path in TINY.glob("*.safetensors")) <= 3_000_000
    assert SHIPPED["stages"] == [list(stage) for stage in train.STAGES]
    ndcg, control = train.held_out(tiny)
    assert ndcg == pytest.approx(SHIPPED["ndcg_at_5"], abs=0.01)
    assert ndcg >= 0.8
    assert 0 < control < 0.1
    assert control == pytest.approx(SHIPPED["shuffled_control"], abs=0.01)
