from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import auto_round
import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model import loading, quantize
from colqwen_lab.model.checkpoint import FolderCheckpoint, default_checkpoint
from colqwen_lab.model.config import VARIANTS, resolve_variant, scheme_parts
from colqwen_lab.model.loading import Loaded
from colqwen_lab.model.quantize import RECORD, Recipe

CPU = torch.device("cpu")


def base() -> Any:
    return default_checkpoint(VARIANTS["base"], "tiny", "auto", CPU)


@pytest.mark.parametrize("format", ["auto_round", "auto_gptq", "auto_awq"])
def test_every_tensor_of_the_source_is_accounted_for(
    format: str, base_folder: Path, packed: Callable[[str], Path]
) -> None:
    before = load_file(base_folder / "model.safetensors")
    after = load_file(packed(format) / "model.safetensors")
    untouched = [name for name in before if "language_model.layers" not in name or "norm" in name]
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    linears = {name.removesuffix(".weight") for name in before if name not in untouched}
    assert len(linears) == 28
    assert {name.removesuffix(".qweight") for name in after if name.endswith("qweight")} == linears
    config = json.loads((packed(format) / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert (packed(format) / "tokenizer.json").exists()


def test_record_says_what_was_done(packed: Callable[[str], Path]) -> None:
    record = json.loads((packed("auto_round") / RECORD).read_text())
    errors = record["relative_error"]
    assert len(errors) == 28
    assert next(iter(errors)).endswith("layers.0.self_attn.q_proj")
    # Normal weights at 4 bits in groups of 128: at most 0.111. Source: the project's facts.
    assert 0.08 < sum(errors.values()) / 28 < 0.12
    assert record["result_bytes"] < record["source_bytes"]
    assert record["recipe"]["scheme"] == "W4A16"


def test_weight_errors_ask_no_kernel_that_this_shape_may_not_have(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, kernels = loading.load, []
    folders = [packed(format) for format in ("auto_round", "auto_awq")]

    def noting(*args: Any, **options: Any) -> Loaded:
        loaded = load(*args, **options)
        kernels.append(loaded.engaged)
        return loaded

    monkeypatch.setattr(loading, "load", noting)
    before = load(base(), CPU).model.state_dict()
    for folder in folders:
        errors = quantize._weight_errors(before, FolderCheckpoint(folder), CPU)
        assert 0.08 < min(errors.values()) < max(errors.values()) < 0.13
    assert kernels == [{"auto_round:torch_zp": 28}, {"auto_round:torch": 28}]


@pytest.mark.gpu
@pytest.mark.parametrize("iters", [0, 1])
def test_tiny_is_quantised_and_runs_on_a_gpu(iters: int, tmp_path: Path) -> None:
    """With a kernel for its shapes, which AutoRound's first choice may not have."""
    cuda, recipe = torch.device("cuda", 0), Recipe(iters=iters, samples=2, seqlen=16)
    record = quantize.quantize(base(), tmp_path / "made", recipe, cuda)
    assert len(record["relative_error"]) == 28
    assert 0.08 < sum(record["relative_error"].values()) / 28 < 0.12
    checkpoint = FolderCheckpoint(tmp_path / "made")
    ids = torch.arange(20, device=cuda)[None]
    vectors = [loading.load(checkpoint, cuda, kernel).model(ids) for kernel in ("auto", "torch")]
    same = torch.cosine_similarity(*(one.embeddings.float() for one in vectors), dim=-1)
    assert same.min() > 0.999


def test_fewer_bits_err_more(tmp_path: Path, packed: Callable[[str], Path]) -> None:
    quantize.quantize(base(), tmp_path / "w8", Recipe("W8A16", iters=0, samples=2, seqlen=16))
    errors = [
        json.loads((f / RECORD).read_text())["relative_error"]
        for f in (tmp_path / "w8", packed("auto_round"))
    ]
    assert all(errors[0][name] < errors[1][name] / 8 for name in errors[0])


def test_a_lost_or_changed_tensor_is_an_error(
    tmp_path: Path, packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(drop: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        def run(loaded: Any, _: Any, samples: Any, work: Path) -> Path:
            tensors = load_file(packed("auto_round") / "model.safetensors")
            drop(tensors)
            save_file(tensors, work / "model.safetensors")
            (work / "config.json").write_text((packed("auto_round") / "config.json").read_text())
            return work

        monkeypatch.setattr(quantize, "_run_auto_round", run)
        quantize.quantize(base(), tmp_path / "made", Recipe(samples=2, seqlen=8))

    with pytest.raises(MissingRequirement, match=r"missing embedding_proj_layer\.bias$"):
        losing(lambda tensors: tensors.pop("embedding_proj_layer.bias"))
    with pytest.raises(
        MissingRequirement, match=r"changed or skipped 1 tensors: embedding_proj_layer\.bias"
    ):
        losing(lambda tensors: tensors["embedding_proj_layer.bias"].add_(1))
    with pytest.raises(MissingRequirement, match=r"missing .*q_proj\.qweight$"):
        losing(
            lambda tensors: tensors.pop(
                "vlm.model.language_model.layers.0.self_attn.q_proj.qweight"
            )
        )
    assert not list(tmp_path.iterdir())


def test_autoround_s_sys_exit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Stopping:
        def __init__(self, model: Any, **options: Any) -> None:
            assert {sample.device for sample in options["dataset"]} == {model.device}

        def quantize_and_save(self, **_: Any) -> None:
            logger = logging.getLogger("autoround")
            logger.warning("calibration forward failed: tensors on two devices")
            logger.error("no data has been cached")
            sys.exit(-1)

    monkeypatch.setattr(auto_round, "AutoRound", Stopping)
    handlers = logging.getLogger("autoround").handlers
    expected = "^AutoRound stopped: calibration forward failed: tensors on two devices; no data has"
    with pytest.raises(MissingRequirement, match=expected):
        quantize.quantize(base(), tmp_path / "made", Recipe(samples=2, seqlen=8))
    assert not list(tmp_path.iterdir())
    assert logging.getLogger("autoround").handlers is handlers
    assert capfd.readouterr().err == ""


def test_calibration_samples_lie_on_the_model_s_device(tiny: Loaded) -> None:
    samples = quantize._samples(
        replace(tiny, device=torch.device("meta")), Recipe(samples=2, seqlen=8), None
    )
    assert [(sample.shape, sample.device.type) for sample in samples] == [((1, 8), "meta")] * 2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"scheme": "W9A16"}, "scheme.*'W9A16'.*W2A16"),
        ({"iters": -1}, "iters must be 0 or more, got -1"),
        ({"samples": 0}, "samples must be 1 or more, got 0"),
        ({"scheme": "W6A16"}, "scheme.*'W6A16'"),
        (
            {"scheme": "W8A16", "format": "auto_awq"},
            "scheme must have 4 bits for format auto_awq, got W8A16",
        ),
        ({"format": "gguf"}, "format.*auto_round, auto_gptq, auto_awq"),
    ],
)
def test_bad_recipe(values: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Recipe(**values)


def test_bad_request(tmp_path: Path, packed: Callable[[str], Path]) -> None:
    with pytest.raises(
        BadInput, match=r"samples x seqlen must be at most .* tokens .*got 10000 x 64"
    ):
        quantize.quantize(base(), tmp_path / "new", Recipe(samples=10_000, seqlen=64))
    with pytest.raises(MissingRequirement, match="is quantised already"):
        quantize.quantize(FolderCheckpoint(packed("auto_round")), tmp_path / "new", Recipe())
    with pytest.raises(BadInput, match="is not empty"):
        quantize.quantize(base(), packed("auto_round"), Recipe())
    with pytest.raises(BadInput, match="cannot be read"):
        quantize.calibration_file(str(tmp_path / "none.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(BadInput, match="must hold one text a line, got none"):
        quantize.calibration_file(str(empty))
    empty.write_bytes("\ufeffa text\r\n\r\nanother\r\n".encode())
    assert quantize.calibration_file(str(empty)) == ["a text", "another"]


@pytest.mark.parametrize("replace", [False, True])
def test_what_came_into_the_folder_meanwhile_stays(
    tmp_path: Path, packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()

    def run(loaded: Any, _: Any, samples: Any, work: Path) -> Path:
        (folder / "mine.txt").write_text("my notes")
        return Path(shutil.copytree(packed("auto_round"), work / "done"))

    monkeypatch.setattr(quantize, "_run_auto_round", run)
    with pytest.raises(BadInput, match="is not empty; name a new folder"):
        quantize.quantize(base(), folder, Recipe(samples=2, seqlen=8), replace=replace)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_second_run_into_the_same_folder_is_an_error(
    tmp_path: Path, packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = tmp_path / "made", Recipe(samples=2, seqlen=8)

    def run(loaded: Any, _: Any, samples: Any, work: Path) -> Path:
        with pytest.raises(
            BadInput, match=r"made is in use by another quantize; wait, or name another"
        ):
            quantize.quantize(base(), folder, recipe, replace=True)
        return Path(shutil.copytree(packed("auto_round"), work / "done"))

    monkeypatch.setattr(quantize, "_run_auto_round", run)
    quantize.quantize(base(), folder, recipe)
    assert (folder / RECORD).exists()
    quantize.quantize(base(), folder, recipe, replace=True)
    with pytest.raises(BadInput, match="is not empty; name a new folder"):
        quantize.quantize(base(), folder, recipe)


def test_all_of_it_is_on_disk_before_it_has_its_name(
    tmp_path: Path, packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []  # inodes, and 0 as it gets its name
    folder, checkpoint, sync, rename = tmp_path / "made", packed("auto_round"), os.fsync, os.replace
    monkeypatch.setattr(
        quantize, "_run_auto_round", lambda *args: shutil.copytree(checkpoint, args[-1] / "done")
    )
    monkeypatch.setattr(
        os, "fsync", lambda opened: done.append(os.fstat(opened).st_ino) or sync(opened)
    )
    monkeypatch.setattr(os, "replace", lambda *names: done.append(0) or rename(*names))
    quantize.quantize(base(), folder, Recipe(samples=2, seqlen=8))
    named = done.index(0)
    assert {path.stat().st_ino for path in (folder, *folder.iterdir())} == set(done[:named])
    assert done[named + 1 :] == [tmp_path.stat().st_ino]


def test_cached_checkpoint_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLQWEN_LAB_CACHE", str(tmp_path))
    folders_made, together = [], threading.Barrier(4)

    def slow(source: Any, folder: Path, recipe: Recipe, device: torch.device) -> None:
        folders_made.append(folder)
        time.sleep(0.2)
        folder.mkdir()
        (folder / RECORD).write_text("{}")

    def request(_: int) -> Path:
        together.wait()
        return quantize.cached_checkpoint(VARIANTS["awq"], "tiny", CPU)

    monkeypatch.setattr(quantize, "quantize", slow)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(request, range(4)))
    assert len(folders_made) == len(folders) == 1
    assert quantize.cached_checkpoint(resolve_variant("W8A16"), "tiny", CPU) not in folders


def test_the_cache_of_another_user_is_read_and_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setenv("COLQWEN_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(quantize, "locked", deny)
    says = r"cannot lock .*tiny-W4A16-\w+: Permission denied; set COLQWEN_LAB_CACHE to a folder"
    with pytest.raises(BadInput, match=says) as error:
        quantize.cached_checkpoint(VARIANTS["awq"], "tiny", CPU)
    (name,) = re.findall(r"tiny-W4A16-\w+", str(error.value))
    (tmp_path / name).mkdir()
    (tmp_path / name / RECORD).write_text("{}")
    assert quantize.cached_checkpoint(VARIANTS["awq"], "tiny", CPU) == tmp_path / name


def test_half_made_checkpoint_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLQWEN_LAB_CACHE", str(tmp_path))

    def killed(source: Any, folder: Path, recipe: Recipe, device: torch.device) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "quantize", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize.cached_checkpoint(VARIANTS["awq"], "tiny", CPU)


def test_variants() -> None:
    assert scheme_parts("W4A16") == (4, 128)
    assert scheme_parts("W2A16G32") == (2, 32)
    assert resolve_variant("w8a16").scheme == "W8A16"
    assert resolve_variant("owner/name").hub["any"].name == "owner/name"
    with pytest.raises(BadInput, match=r"model must be base, awq, a scheme .*, got 'nope'"):
        resolve_variant("nope")


def test_a_full_disk_leaves_nothing_and_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantize, "_run_auto_round", full)
    with pytest.raises(
        MissingRequirement,
        match=r"cannot write .*No space left on device.*run the same command again",
    ):
        quantize.quantize(base(), tmp_path / "made", Recipe())
    assert not list(tmp_path.iterdir())
