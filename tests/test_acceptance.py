"""The acceptance run's table, and the checkpoint that it makes; the steps run on a GPU by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.model.checkpoint import RandomCheckpoint
from colqwen_lab.model.inputs import PAD, queries

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "acceptance.py"


@pytest.fixture(scope="module")
def acceptance() -> Any:
    spec = importlib.util.spec_from_file_location("acceptance", SCRIPT)
    assert spec
    assert spec.loader
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["acceptance"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_step_that_fails_is_a_row_and_the_next_one_runs(acceptance: Any, tmp_path: Path) -> None:
    run = acceptance.Run(tmp_path, tmp_path / "scratch", "tiny", cuda=True)
    python = [sys.executable, "-c"]

    def hangs(command: Any) -> str:
        command.end = command.end - 11.5
        return str(command(*python, "import time; print('x', flush=True); time.sleep(60)"))

    def says(command: Any) -> str:
        return str(command(*python, "print('one | two')")).strip()

    (tmp_path / "scratch").mkdir()
    run.step("fails", 20, lambda command: command(*python, "raise SystemExit('a last line')"))
    run.step("hangs", 12, hangs)
    run.step("works", 20, says)
    run.start -= acceptance.BUDGET_S
    run.step("late", 20, says)
    document = json.loads((tmp_path / "acceptance.json").read_text())
    assert {row["step"]: row["verdict"] for row in document["steps"]} == {
        "fails": "failed",
        "hangs": "failed",
        "works": "held",
        "late": "failed",
    }
    held = [row["held"] for row in document["steps"]]
    assert held[0] == "RuntimeError: exit code 1; last line: a last line"
    assert "time limit" in held[1]
    assert "not run: the time of all steps is over" in held[3]
    assert document["result"].startswith("1 of 4 steps held")
    assert r"| works | one \| two | " in (tmp_path / "acceptance.md").read_text()


def test_the_folder_is_in_the_published_layout(acceptance: Any, tmp_path: Path) -> None:
    facts = acceptance.made_folder(tmp_path / "base", "tiny")
    assert (facts["tensors"], facts["shards"]) == (123, 2)
    names = sorted(path.name for path in (tmp_path / "base").iterdir())
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = "model.safetensors.index.json"
    assert names == sorted(["config.json", *shards, index, "tokenizer.json"])
    assert "28 linears on torch.nn.Linear" in acceptance.loaded([str(tmp_path / "base")])
    (tmp_path / "base" / shards[0]).unlink()
    with pytest.raises(MissingRequirement):
        acceptance.loaded([str(tmp_path / "base")])


def test_qwen_s_special_tokens_are_at_their_places(acceptance: Any, tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint("4b", None, torch.device("cpu"), 0)
    acceptance.write_tokenizer(tmp_path / "tokenizer.json", checkpoint)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config: Any = checkpoint.config
    assert tokenizer.token_to_id(PAD) == 151643
    assert tokenizer.token_to_id("<|image_pad|>") == config.image_token_id == 151655
    assert tokenizer.token_to_id("<|vision_start|>") == config.vision_start_token_id == 151652
    assert tokenizer.token_to_id("<|video_pad|>") == config.video_token_id == 151656
    # The report's queries have about as many tokens as with Qwen's own words.
    lengths = [len(tokenizer.encode(text).ids) for text in queries("report", 64)]
    assert 6 <= min(lengths) <= max(lengths) <= 10
