"""Checkpoint folders in the published layout, made once a session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen_lab.model import loading, quantize
from colqwen_lab.model.checkpoint import FolderCheckpoint, default_checkpoint
from colqwen_lab.model.config import VARIANTS
from colqwen_lab.model.inputs import TINY_TOKENIZER
from colqwen_lab.records import Backend, Environment
from colqwen_lab.retrieval.record import NAMES, Cosines, Fidelity

CPU = torch.device("cpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU, for tests with the marker gpu."""
    return torch.device("cuda")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny default as a 16-bit checkpoint, its configuration written the way the hub's is."""
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    folder.mkdir()
    model = loading.load(default_checkpoint(VARIANTS["base"], "tiny", "auto", CPU), CPU).model
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
    )
    config = model.config.to_dict() | {
        "auto_map": {"AutoModel": "modeling_colqwen3.ColQwen3"},
        "architectures": ["ColQwen3"],
        "dtype": "bfloat16",
    }
    rotary = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rotary.pop("rope_theta")
    config["text_config"]["rope_scaling"] = rotary
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(TINY_TOKENIZER, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """W4A16 checkpoints of the tiny default, plainly rounded, by AutoRound format; made once."""
    root = tmp_path_factory.mktemp("packed")

    def of_format(format: str) -> Path:
        folder = root / format
        if not folder.exists():
            source = default_checkpoint(VARIANTS["base"], "tiny", "auto", CPU)
            quantize.quantize(
                source, folder, quantize.Recipe(iters=0, samples=4, seqlen=16, format=format)
            )
        return folder

    return of_format


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint folder with its tensors or its configuration changed."""

    def edit(
        folder: Path,
        tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None,
        config: Callable[[dict[str, Any]], Any] | None = None,
    ) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(folder, copy)
        if tensors:
            values = load_file(copy / "model.safetensors")
            tensors(values)
            save_file(values, copy / "model.safetensors")
        if config:
            values = json.loads((copy / "config.json").read_text())
            config(values)
            (copy / "config.json").write_text(json.dumps(values))
        return copy

    return edit


@pytest.fixture(scope="session")
def tiny() -> loading.Loaded:
    return loading.load(default_checkpoint(VARIANTS["base"], "tiny", "auto", CPU), CPU)


@pytest.fixture(scope="session")
def tiny_awq(packed: Callable[[str], Path]) -> loading.Loaded:
    return loading.load(FolderCheckpoint(packed("auto_round")), CPU, kernel="torch")


@pytest.fixture(scope="session")
def record() -> Callable[..., Fidelity]:
    """Makes fidelity records of a variant from the nDCG@5 of each query."""
    same = Cosines(tokens=3, least=0.9, q01=0.9, q05=0.9, q25=0.95, median=0.97, mean=0.96)

    def of(variant: str, ndcg: list[float], **changed: Any) -> Fidelity:
        count = len(ndcg)
        values = dict.fromkeys(NAMES, [1.0] * count)
        given: dict[str, Any] = {
            "variant": variant,
            "size": "tiny",
            "weights": f"{variant} weights",
            "data": "drawn",
            "pages": 5,
            "visual_tokens": 88,
            "backend": Backend(requested="auto", engaged={"kernel": 28}),
            "weights_bytes": 1000,
            "query_cosine": same,
            "page_cosine": same,
            "page_batch": 8,
            "page_step_s": [0.1] * 8,
            "query_ids": [f"q{number}" for number in range(count)],
            "values": values | {"nDCG@5": ndcg, "score error": [0.0] * count},
            "top": [["p1", "p0"]] * count,
            "environment": Environment(cpu="a CPU"),
        }
        return Fidelity(**given | changed)

    return of
