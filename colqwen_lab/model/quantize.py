"""AutoRound on the language model: from 16-bit weights to a complete quantised checkpoint.

The vision encoder and the head keep every bit; the result accounts for every tensor.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from colqwen_lab.errors import BadInput, MissingRequirement, one_of
from colqwen_lab.model import loading
from colqwen_lab.model.checkpoint import (
    Checkpoint,
    FolderCheckpoint,
    Json,
    Tensors,
    default_checkpoint,
)
from colqwen_lab.model.config import VARIANTS, Variant, scheme_parts
from colqwen_lab.model.inputs import CALIBRATION_TEXTS, PAD, pad_id
from colqwen_lab.model.network import is_text_linear
from colqwen_lab.model.packing import gptq_packed
from colqwen_lab.options import FORMATS
from colqwen_lab.settings import cache_folder, in_use, locked, regular_file, sync, writable_folder

RECORD = "colqwen_lab.json"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    """AutoRound's parameters; `iters` 0 is plain rounding. Raises BadInput."""

    scheme: str = "W4A16"
    iters: int = 50
    samples: int = 64
    seqlen: int = 64
    format: str = "auto_round"

    def __post_init__(self) -> None:
        bits, _ = scheme_parts(self.scheme)
        one_of("format", self.format, FORMATS)
        if self.format == "auto_awq" and bits != 4:
            raise BadInput(f"scheme must have 4 bits for format auto_awq, got {self.scheme}")
        for name, least in (("iters", 0), ("samples", 1), ("seqlen", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} must be {least} or more, got {getattr(self, name)}")


def quantize(
    checkpoint: Checkpoint,
    folder: Path,
    recipe: Recipe,
    device: torch.device = CPU,
    calibration: Sequence[str] | None = None,
    replace: bool = False,
) -> Json:
    """The record of quantising a 16-bit checkpoint into `folder`, also written there.

    A relative weight error is the Frobenius norm of the difference over that of the original.
    `replace` overwrites a folder that this function wrote. Raises BadInput for a folder in use or
    too few calibration texts, MissingRequirement for quantised weights or an incomplete result.
    """
    if checkpoint.quantization is not None:
        raise MissingRequirement(f"{checkpoint.label} is quantised already; use 16-bit weights")
    _check_free(folder, replace)
    writable_folder(folder.parent)
    loaded = loading.load(checkpoint, device)
    samples = _samples(loaded, recipe, calibration)
    state = loaded.model.state_dict()
    before = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
    started, hidden = time.perf_counter(), f".{folder.name}."
    try:
        with (
            locked(folder.with_name(f".{folder.name}"), partial(_in_use, folder)),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=hidden) as work,
        ):
            result = _run_auto_round(loaded, recipe, samples, Path(work))
            _restore_dtypes(result, before)
            if checkpoint.tokenizer is not None:
                checkpoint.tokenizer.save(str(result / "tokenizer.json"), pretty=False)
            record = {
                "source": checkpoint.label,
                "recipe": asdict(recipe),
                "auto_round": version("auto-round"),
                "torch": torch.__version__,
                "elapsed_s": round(time.perf_counter() - started, 3),
                "source_bytes": sum(tensor.nbytes for tensor in before.values()),
                "result_bytes": sum(path.stat().st_size for path in result.glob("*.safetensors")),
                "relative_error": _weight_errors(before, FolderCheckpoint(result), device),
            }
            (result / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            for path in (*result.rglob("*"), result):
                sync(path)
            _check_free(folder, replace)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(result, folder)
            sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise MissingRequirement(
            f"cannot write {folder}: {error}; nothing is left there, run the same command again"
        ) from None
    return record


def _in_use(folder: Path) -> None:
    raise BadInput(f"{folder} is in use by another quantize; wait, or name another") from None


def _check_free(folder: Path, replace: bool) -> None:
    if in_use(folder) and not (replace and os.path.isfile(folder / RECORD)):
        raise BadInput(f"{folder} is not empty; name a new folder")


def calibration_file(path: str) -> list[str]:
    """The lines of a file of calibration texts. Raises BadInput if there are none."""
    try:
        lines = regular_file(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(f"calibration texts {path} cannot be read: {error}") from None
    if texts := [line for line in lines if line.strip()]:
        return texts
    raise BadInput(f"calibration texts {path} must hold one text a line, got none")


def _samples(
    loaded: loading.Loaded, recipe: Recipe, calibration: Sequence[str] | None
) -> list[Tensor]:
    """Windows of token ids, each [1, seqlen] on the model's device, from the joined texts."""
    need = recipe.samples * recipe.seqlen
    if loaded.tokenizer is None:
        vocabulary = loaded.model.config.text_config.vocab_size
        tokens = torch.randint(vocabulary, (need,), generator=torch.Generator().manual_seed(0))
    else:
        pad, texts = pad_id(loaded.tokenizer), list(calibration or CALIBRATION_TEXTS)
        encodings = loaded.tokenizer.encode_batch(texts, add_special_tokens=False)
        tokens = torch.tensor([token for text in encodings for token in (*text.ids, pad)])
    if len(tokens) < need:
        most = f"{len(tokens)}, the tokens of the calibration texts"
        got = f"{recipe.samples} x {recipe.seqlen}; or give more texts"
        raise BadInput(f"samples x seqlen must be at most {most}, got {got}")
    return list(tokens[:need].view(recipe.samples, 1, recipe.seqlen).to(loaded.device))


def _run_auto_round(
    loaded: loading.Loaded, recipe: Recipe, samples: list[Tensor], work: Path
) -> Path:
    """The folder under `work` that AutoRound wrote."""
    from auto_round import AutoRound

    # AutoRound requires a tokenizer and a processor, and uses neither on token ids.
    words = loaded.tokenizer or Tokenizer(models.BPE(vocab={PAD: 0}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD)
    # AutoRound takes the last linear, our head, for a language-model head, and drops a tied one.
    config, on_cpu = loaded.model.config, loaded.device.type == "cpu"
    tied, config.tie_word_embeddings = config.tie_word_embeddings, False
    # AutoRound tunes in float32 on a CPU without BF16. Tune so on every CPU, for equal results.
    if on_cpu:
        loaded.model.float()
    settings = {"scheme": recipe.scheme, "iters": recipe.iters, "seqlen": recipe.seqlen}
    settings |= {"dataset": samples, "nsamples": len(samples), "batch_size": min(8, len(samples))}
    settings |= {"device_map": str(loaded.device), "enable_torch_compile": False, "amp": not on_cpu}
    # AutoRound collects garbage after every layer: do not walk the objects that are alive now.
    gc.freeze()
    try:
        with loading.quiet():
            rounding = AutoRound(loaded.model, tokenizer=tokenizer, processor=tokenizer, **settings)
            rounding.quantize_and_save(output_dir=str(work), format=recipe.format)
    except ValueError as error:
        result = f"{recipe.scheme} as {recipe.format}"
        raise MissingRequirement(f"AutoRound cannot write {result}: {error}") from None
    finally:
        gc.unfreeze()
    path = min(work.rglob("config.json"))
    values = json.loads(path.read_bytes()) | {"tie_word_embeddings": tied}
    path.write_text(json.dumps(values, indent=1) + "\n")
    return path.parent


def _restore_dtypes(folder: Path, before: Tensors) -> None:
    """Save tensors that AutoRound widened to float32 in their original type."""
    for path in folder.glob("*.safetensors"):
        saved = load_file(path)
        typed = {name: saved[name].to(before.get(name, saved[name]).dtype) for name in saved}
        save_file(typed, path, metadata={"format": "pt"})


def _weight_errors(
    before: Tensors, result: FolderCheckpoint, device: torch.device
) -> dict[str, float]:
    """The relative weight error of each text linear. Raises unless all else is unchanged.

    Kernel torch dequantises weights of any shape, on any device.
    """
    model = loading.load(gptq_packed(result), device, kernel="torch").model
    changed, errors = [], {}
    for name, tensor in before.items():
        layer = name.removesuffix(".weight")
        if name not in result.files:
            original = tensor.to(device).float()
            weight = dequantized(model.get_submodule(layer), original.shape[1], device).float()
            errors[layer] = round(float((weight - original).norm() / original.norm()), 6)
        elif is_text_linear(layer) or not torch.equal(result.read(name, tensor, CPU), tensor):
            changed.append(name)
    if changed:
        names = ", ".join(changed[:5])
        raise MissingRequirement(f"AutoRound changed or skipped {len(changed)} tensors: {names}")
    return errors


def dequantized(layer: nn.Module, columns: int, device: torch.device) -> Tensor:
    """The weight [out, in] of a quantised linear: its kernel's product with the identity."""
    return layer(torch.eye(columns, dtype=torch.bfloat16, device=device)).T


def cached_checkpoint(
    variant: Variant, size: str, device: torch.device, recipe: Recipe | None = None
) -> Path:
    """The cached folder of `variant`, quantised on first use from the default weights of `size`."""
    recipe = recipe or Recipe(variant.scheme or "W4A16")
    base = default_checkpoint(VARIANTS["base"], size, "auto", device)
    versions = [version(package) for package in ("auto-round", "torch", "transformers")]
    # The folder's name depends on all that determines the result.
    inputs = [base.label, base.config.to_json_string(), asdict(recipe), CALIBRATION_TEXTS]
    digest = hashlib.sha256(json.dumps([*inputs, *versions]).encode()).hexdigest()[:12]
    folder = cache_folder() / f"{size}-{recipe.scheme}-{digest}"
    if (folder / RECORD).exists():  # also in a cache of another user
        return folder
    try:
        with locked(writable_folder(folder.parent) / folder.name):
            if not (folder / RECORD).exists():
                shutil.rmtree(folder, ignore_errors=True)
                quantize(base, folder, recipe, device)
    except OSError as error:
        raise BadInput(
            f"cannot lock {folder}: {error.strerror}; set COLQWEN_LAB_CACHE to a folder of your own"
        ) from None
    return folder


def checkpoint_of(
    variant: Variant, size: str, weights: str, device: torch.device, recipe: Recipe | None = None
) -> Checkpoint:
    """The checkpoint of `variant`: made here at `tiny` or with a `recipe`, else the default."""
    if variant.scheme and weights == "auto" and (recipe or size == "tiny"):
        folder = cached_checkpoint(variant, size, device, recipe)
        return FolderCheckpoint(folder, label=f"made here from the {size} default ({folder.name})")
    return default_checkpoint(variant, size, weights, device)
