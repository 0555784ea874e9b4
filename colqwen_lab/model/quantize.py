"""AutoRound on the text tower: from a 16-bit source to a complete quantised checkpoint.

Vision tower and head stay as they are, bit for bit, and every tensor of the source is accounted for in the result.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from colqwen_lab.errors import BadInput, MissingRequirement, one_of
from colqwen_lab.model import inputs, loading
from colqwen_lab.model.checkpoint import Checkpoint, FolderCheckpoint, default_checkpoint
from colqwen_lab.model.config import VARIANTS, Variant, scheme_parts
from colqwen_lab.model.inputs import PAD, pad_id
from colqwen_lab.model.network import is_text_linear
from colqwen_lab.records import sync
from colqwen_lab.settings import cache_folder, in_use, writable_folder

FORMATS = ("auto_round", "auto_gptq", "auto_awq")
RECORD = "colqwen_lab.json"


@dataclass(frozen=True)
class Recipe:
    """How to quantise: AutoRound's parameters. `iters` 0 is plain rounding."""

    scheme: str = "W4A16"
    iters: int = 50
    samples: int = 64
    seqlen: int = 64
    format: str = "auto_round"

    def __post_init__(self) -> None:
        scheme_parts(self.scheme)
        one_of("format", self.format, FORMATS)
        if self.format == "auto_awq" and scheme_parts(self.scheme)[0] != 4:
            raise BadInput(
                f"format auto_awq holds 4 bits, not {self.scheme}; valid: auto_round, auto_gptq, or W4A16"
            )
        for name, least in (("iters", 0), ("samples", 1), ("seqlen", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}; valid: {least} or more")


def quantize(
    source: Checkpoint,
    folder: Path,
    recipe: Recipe | None = None,
    device: torch.device | None = None,
    calibration: Sequence[str] | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Quantise the 16-bit `source` into `folder`; the record of it, also written there as `colqwen_lab.json`.

    The record holds the recipe, the versions, bytes before and after, and each layer's relative weight error
    (Frobenius norm of the difference over that of the original).

    Args:
        source: 16-bit weights of any size.
        folder: a folder that does not exist yet, or is empty; or with `replace` one that was made here.
        recipe: AutoRound's parameters.
        device: where to run; the CPU by default.
        calibration: texts; those in the package by default.
        replace: make a folder that holds a record of this function again.

    Raises:
        BadInput: the folder is in use, now or by the end, or the texts are too few for samples x seqlen tokens.
        MissingRequirement: the source is quantised already, the result would be incomplete, or it cannot be written.
    """
    recipe, device = recipe or Recipe(), device or torch.device("cpu")
    if source.quantization is not None:
        raise MissingRequirement(
            f"{source.label} is quantised already; quantise the 16-bit weights"
        )
    _check_free(folder, replace)
    writable_folder(folder.parent)
    loaded = loading.load(source, device)
    samples = _samples(loaded, recipe, calibration)
    before = {
        name: tensor.to("cpu", copy=True) for name, tensor in loaded.model.state_dict().items()
    }
    started = time.perf_counter()
    try:
        with (
            FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work,
        ):
            made = _run_auto_round(loaded, recipe, samples, Path(work))
            _give_types_back(made, before)
            if source.tokenizer is not None:
                source.tokenizer.save(str(made / "tokenizer.json"), pretty=False)
            elapsed = time.perf_counter() - started
            errors = _account_for(before, FolderCheckpoint(made), device)
            record = {
                "source": source.label,
                "recipe": asdict(recipe),
                "auto_round": version("auto-round"),
                "torch": torch.__version__,
                "elapsed_s": round(elapsed, 3),
                "source_bytes": sum(tensor.nbytes for tensor in before.values()),
                "result_bytes": sum(path.stat().st_size for path in made.glob("*.safetensors")),
                "relative_error": {name: round(error, 6) for name, error in errors.items()},
            }
            (made / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            for path in (*made.rglob("*"), made):
                sync(path)
            _check_free(folder, replace)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(made, folder)
            sync(folder.parent)
    except Timeout:
        raise BadInput(
            f"another quantisation writes to {folder}; wait for it or name another folder"
        ) from None
    except (OSError, SafetensorError) as error:
        left = "nothing is left there, and the same command starts again"
        raise MissingRequirement(f"cannot write {folder}: {error}; {left}") from None
    return record


def _check_free(folder: Path, replace: bool) -> None:
    """Raise BadInput unless `folder` is not there, or empty, or with `replace` made here."""
    if in_use(folder) and not (replace and os.path.isfile(folder / RECORD)):
        raise BadInput(f"{folder} is not empty; name a new folder")


def calibration_file(path: str) -> list[str]:
    """The texts of a file, one a line. Raises BadInput if it cannot be read or holds none."""
    try:
        lines = [
            line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise BadInput(f"calibration texts {path} cannot be read: {error}") from None
    if not lines:
        raise BadInput(f"calibration texts {path} holds no text; valid: one a line")
    return lines


def _samples(
    loaded: loading.Loaded, recipe: Recipe, calibration: Sequence[str] | None
) -> list[torch.Tensor]:
    """`recipe.samples` windows of token ids, each [1, seqlen], cut from the texts laid end to end."""
    need = recipe.samples * recipe.seqlen
    if loaded.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = loaded.model.config.text_config.vocab_size
        stream = torch.randint(vocabulary, (need,), generator=generator)
    else:
        ids = loaded.tokenizer.encode_batch(
            list(calibration or inputs.calibration_texts()), add_special_tokens=False
        )
        pad = pad_id(loaded.tokenizer)
        stream = torch.tensor([token for encoding in ids for token in (*encoding.ids, pad)])
    if len(stream) < need:
        raise BadInput(
            f"samples x seqlen is {recipe.samples} x {recipe.seqlen} tokens but the calibration texts hold "
            f"{len(stream)}; valid: a product up to that, or more texts"
        )
    return list(stream[:need].view(recipe.samples, 1, recipe.seqlen))


def _run_auto_round(
    loaded: loading.Loaded, recipe: Recipe, samples: list[torch.Tensor], work: Path
) -> Path:
    """The folder under `work` that AutoRound wrote."""
    from auto_round import AutoRound
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # AutoRound wants a tokenizer and, for a network with a vision tower, a processor; it uses neither on token ids.
    stand_in = Tokenizer(models.BPE(vocab={PAD: 0}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=loaded.tokenizer or stand_in, pad_token=PAD
    )
    # AutoRound takes the last linear, our head, for a language-model head, and leaves it out where that is tied.
    tied, loaded.model.config.tie_word_embeddings = loaded.model.config.tie_word_embeddings, False
    # A CPU without BF16 tunes in float32, and AutoRound would then do otherwise on another CPU: here all do.
    on_cpu = loaded.device.type == "cpu"
    if on_cpu:
        loaded.model.float()
    # AutoRound collects garbage after every layer; what is alive already need not be walked each time.
    gc.freeze()
    try:
        with loading.quiet():
            AutoRound(
                loaded.model,
                tokenizer=tokenizer,
                processor=tokenizer,
                scheme=recipe.scheme,
                iters=recipe.iters,
                nsamples=len(samples),
                seqlen=recipe.seqlen,
                batch_size=min(8, len(samples)),
                dataset=samples,
                device_map=str(loaded.device),
                enable_torch_compile=False,
                amp=not on_cpu,
            ).quantize_and_save(output_dir=str(work), format=recipe.format)
    except ValueError as error:
        raise MissingRequirement(
            f"AutoRound cannot make {recipe.scheme} as {recipe.format}: {error}"
        ) from None
    finally:
        gc.unfreeze()
    path = next(iter(sorted(work.rglob("config.json"))))
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps(config | {"tie_word_embeddings": tied}, indent=1) + "\n", encoding="utf-8"
    )
    return path.parent


def _give_types_back(folder: Path, before: dict[str, torch.Tensor]) -> None:
    """Save tensors that AutoRound widened to float32 in the type that they had."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        typed = {
            name: tensor.to(before[name].dtype) if name in before else tensor
            for name, tensor in found.items()
        }
        save_file(typed, path, metadata={"format": "pt"})


def _account_for(
    before: dict[str, torch.Tensor], made: FolderCheckpoint, device: torch.device
) -> dict[str, float]:
    """The relative weight error of each quantised linear, after checking that nothing else changed or is missing.

    Raises:
        MissingRequirement: a tensor of the source is neither in the result nor quantised, or an untouched one differs.
    """
    quantized = [name for name in before if is_text_linear(name.removesuffix(".weight"))]
    untouched = [name for name in before if name not in quantized]
    lost = [name for name in untouched if name not in made.files]
    lost += [
        name for name in quantized if name.removesuffix("weight") + "qweight" not in made.files
    ]
    if lost:
        raise MissingRequirement(
            f"AutoRound's checkpoint lacks {len(lost)} tensors of the source: {', '.join(lost[:5])}"
        )
    cpu = torch.device("cpu")
    changed = [
        name
        for name in untouched
        if not torch.equal(made.read(name, before[name], cpu), before[name])
    ]
    if changed:
        raise MissingRequirement(
            f"AutoRound changed {len(changed)} tensors outside the text linears: {', '.join(changed[:5])}"
        )
    model = loading.load(made, device).model
    errors = {}
    for name in quantized:
        layer, original = name.removesuffix(".weight"), before[name].to(device).float()
        difference = (
            dequantized(model.get_submodule(layer), original.shape[1], device).float() - original
        )
        errors[layer] = float(difference.norm() / original.norm())
    return errors


def dequantized(layer: nn.Module, columns: int, device: torch.device) -> torch.Tensor:
    """The weight [out, in] that a quantised linear multiplies by: what its kernel makes of the identity."""
    return layer(torch.eye(columns, dtype=torch.bfloat16, device=device)).T


def cached_checkpoint(
    variant: Variant, size: str, device: torch.device, recipe: Recipe | None = None
) -> Path:
    """The folder of `variant` at `size`, quantised from that size's default weights on first use and kept.

    Two processes that want it at once make it once. The folder's name holds all that the result depends on.
    """
    recipe = recipe or Recipe(scheme=variant.scheme or "W4A16")
    source = default_checkpoint(VARIANTS["base"], size, "auto", device)
    asked = [
        source.label,
        source.config.to_json_string(),
        asdict(recipe),
        inputs.calibration_texts(),
    ]
    state = json.dumps([*asked, version("auto-round"), version("torch"), version("transformers")])
    name = f"{size}-{recipe.scheme}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
    folder = writable_folder(cache_folder()) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / RECORD).exists():
            shutil.rmtree(folder, ignore_errors=True)
            quantize(source, folder, recipe, device)
    return folder


def checkpoint_of(
    variant: Variant, size: str, weights: str, device: torch.device, recipe: Recipe | None = None
) -> Checkpoint:
    """Where `variant` comes from: `weights.default_checkpoint`, or at `tiny`, or with a `recipe`, what is made here."""
    if variant.scheme and weights == "auto" and (recipe or size == "tiny"):
        folder = cached_checkpoint(variant, size, device, recipe)
        return FolderCheckpoint(folder, label=f"made here from the {size} default ({folder.name})")
    return default_checkpoint(variant, size, weights, device)
