"""Where weights come from: the hub, a folder, seeded random values, or the trained `tiny` in the package.

A source gives the network's configuration, the names, shapes and types of its tensors, and then the tensors one by
one, straight onto the device: there is never a second copy of a checkpoint in memory. Only safetensors and JSON are
read; nothing from a checkpoint is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.model.config import SIZES, Repository, Variant, scheme_parts
from colqwen_lab.model.inputs import TINY, TINY_TOKENIZER, read_tokenizer
from colqwen_lab.model.network import UNUSED_TENSORS, ColQwen3, ColQwen3Config

WEIGHTS = ("auto", "hub", "random")
CHECKPOINT_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "*_config.json",
]
# Qwen's tokenizer has 11 MB; the other JSON of a checkpoint is small, and a parser takes seventy times its bytes.
TOKENIZER_BYTES = 64 * 2**20
JSON_BYTES = 2**20
# The types of a checkpoint that are read: whether they are floating-point.
FLOATING = {"BF16": True, "F16": True, "F32": True, "I32": False, "I64": False}


class Checkpoint(ABC):
    """The weights of one variant. `label` is what a record says of them.

    `quantization` is the checkpoint's quantization_config; None for 16-bit weights.
    """

    label: str
    config: ColQwen3Config
    tokenizer: Tokenizer | None
    quantization: dict[str, Any] | None

    @property
    def size(self) -> str:
        """The size that this configuration is; `custom` for another."""
        names = ("hidden_size", "num_hidden_layers", "vocab_size")
        found = [getattr(self.config.text_config, name) for name in names]
        known = {
            size: [parts["text_config"][name] for name in names] for size, parts in SIZES.items()
        }
        return next((size for size, parts in known.items() if parts == found), "custom")

    @abstractmethod
    def check(self, expected: dict[str, Tensor]) -> None:
        """Raise MissingRequirement, listing them, if the tensors here are not just `expected` (name to meta tensor)."""

    @abstractmethod
    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        """The tensor `name` on `device`, of the shape and type of `like`."""


@dataclass
class RandomCheckpoint(Checkpoint):
    """Random weights of any size and scheme, drawn on `device`; each tensor's values hang on `seed` and its name.

    Speed and memory do not depend on the values.
    """

    label: str
    config: ColQwen3Config
    scheme: str | None
    device: torch.device
    seed: int = 0
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        self.quantization = None
        if self.scheme:
            bits, group_size = scheme_parts(self.scheme)
            packing = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
            self.quantization = {
                "bits": bits,
                "group_size": group_size,
                "sym": True,
                "data_type": "int",
            } | packing

    def check(self, expected: dict[str, Tensor]) -> None:
        """Nothing to check: every tensor is drawn as the network asks for it."""

    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        """Weights are normal with deviation 0.02, as is a dequantised weight; norms are one, biases zero.

        Codes are uniform over all their values and scales of either sign, as AutoRound makes them: with one sign alone
        weights have a mean, and every token of a deep network ends in the same direction.
        """
        bits = scheme_parts(self.scheme)[0] if self.scheme else 0
        if name.endswith(".qzeros"):
            return torch.full(like.shape, _zero_word(bits), dtype=like.dtype, device=device)
        if name.endswith(".bias"):
            return torch.zeros(like.shape, dtype=like.dtype, device=device)
        if "norm" in name.split(".")[-2]:
            return torch.ones(like.shape, dtype=like.dtype, device=device)
        generator = torch.Generator(self.device).manual_seed(self.seed + zlib.crc32(name.encode()))
        values = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        if name.endswith(".qweight"):
            values.random_(-(2**31), 2**31 - 1, generator=generator)
        elif name.endswith(".scales"):
            values.random_(2, generator=generator).mul_(2).sub_(1).mul_(
                0.02 / math.sqrt((4**bits + 2) / 12)
            )
        else:
            values.normal_(std=0.02, generator=generator)
        return values.to(device)


def _zero_word(bits: int, stored_less: int = 1) -> int:
    """A word of packed zero points of symmetric codes, 2^(bits-1), stored less one as the GPTQ packing does."""
    word = 0
    for shift in range(0, 32 - 32 % bits, bits):
        word |= (2 ** (bits - 1) - stored_less) << shift
    return word - 2**32 if word >= 2**31 else word


class FolderCheckpoint(Checkpoint):
    """A checkpoint folder in the hub's layout: config.json, one or several safetensors files, tokenizer.json."""

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder = folder
        raw = self._json("config.json")
        if raw.get("model_type") != ColQwen3Config.model_type:
            raise MissingRequirement(
                f"{folder}/config.json: model_type is {raw.get('model_type')!r:.100}, not 'colqwen3'"
            )
        self.quantization = raw.pop("quantization_config", None)
        if not isinstance(self.quantization, dict | None):
            raise MissingRequirement(f"{folder}/config.json: quantization_config is not an object")
        # `auto_map` names code in the repository; it is never read.
        known = {
            key: value
            for key, value in raw.items()
            if key not in ("auto_map", "dtype", "torch_dtype")
        }
        try:
            self.config = ColQwen3Config(**known)
        except Exception as error:  # transformers validates with several error types
            raise MissingRequirement(
                f"{folder}/config.json is not the configuration of a ColQwen3: {error!s:.200}"
            ) from None
        self.files = self._index()
        self._check_dimensions()
        tokenizer = folder / "tokenizer.json"
        self.tokenizer = (
            read_tokenizer(self._own(tokenizer, TOKENIZER_BYTES)) if tokenizer.exists() else None
        )
        self.label = label or f"folder:{folder.resolve().name}#{self.digest}"

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which opens the files again."""
        return FolderCheckpoint, (self.folder, self.label)

    def _own(self, path: Path, most_bytes: int | None = None) -> Path:
        """`path`, if it lies in this folder, or as a link of the hub's cache among its blobs, and is not too large."""
        home = Path(os.path.realpath(self.folder))
        homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
        if Path(os.path.realpath(path)).parent not in homes:
            raise MissingRequirement(f"{path} points outside its folder")
        if path.exists() and not path.is_file():
            raise MissingRequirement(f"{path} is not a file")
        if most_bytes and path.exists() and path.stat().st_size > most_bytes:
            raise MissingRequirement(
                f"{path} has {path.stat().st_size} bytes; valid: up to {most_bytes}"
            )
        return path

    def _json(self, name: str) -> dict[str, Any]:
        try:
            document = json.loads(
                self._own(self.folder / name, JSON_BYTES).read_text(encoding="utf-8")
            )
        except FileNotFoundError:
            raise MissingRequirement(
                f"{self.folder} is not a checkpoint folder: it has no {name}"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise MissingRequirement(
                f"{self.folder / name} cannot be read: {error!s:.200}"
            ) from None
        if not isinstance(document, dict):
            raise MissingRequirement(f"{self.folder / name} is not a JSON object")
        return document

    def _index(self) -> dict[str, Any]:
        """Each tensor's open safetensors file, its name checked against the index and the folder."""
        index = self.folder / "model.safetensors.index.json"
        weight_map = (
            self._json(index.name).get("weight_map")
            if index.exists()
            else {"": "model.safetensors"}
        )
        if not isinstance(weight_map, dict):
            raise MissingRequirement(f"{index} has no weight_map")
        names = set(map(str, weight_map.values()))
        outside = sorted(
            name
            for name in names
            if Path(name).name != name or not name.isprintable() or len(name) > 200
        )
        if outside:
            raise MissingRequirement(
                f"{index} points outside its folder, or at what names no file: {outside[0]!r:.200}"
            )
        self.paths = [self.folder / name for name in sorted(names)]
        files: dict[str, Any] = {}
        for path in self.paths:
            self._own(path)
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise MissingRequirement(
                    f"{path} is missing, truncated or not safetensors: {error!s:.200}"
                ) from None
            files |= dict.fromkeys(file.keys(), file)
        return files

    def _check_dimensions(self) -> None:
        """Before memory is reserved: the network that the configuration describes fits into the files.

        Checked on a network of one layer a tower, on the meta device. Weights have two bits or more.
        """
        where = self.folder / "config.json"
        try:
            config: Any = deepcopy(self.config)
            layers = (config.text_config.num_hidden_layers, config.vision_config.depth)
            config.text_config.num_hidden_layers = config.vision_config.depth = 1
            tapped = config.vision_config.deepstack_visual_indexes
            fits = (
                min(layers) > 0
                and sum(layers) <= len(self.files)
                and len(set(tapped)) == len(tapped) <= layers[1]
            )
            with torch.device("meta"):
                least = (
                    sum(tensor.numel() for tensor in ColQwen3(config).parameters()) // 4
                    if fits
                    else 0
                )
        except Exception as error:  # torch, transformers and Python each say it in their own way
            raise MissingRequirement(
                f"{where} is not the configuration of a ColQwen3: {error!s:.200}"
            ) from None
        held = sum(path.stat().st_size for path in self.paths)
        if not fits or least > held:
            raise MissingRequirement(
                f"{where} describes a network that its files do not hold: {layers[0]} + {layers[1]} "
                f"layers, at least {least} bytes; {len(self.files)} tensors, {held} bytes"
            )

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits of each file's size, header and sixteen samples of 4 kB: what tells two folders apart."""
        state = hashlib.sha256()
        for path in self.paths:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                state.update(size.to_bytes(8, "little") + file.read(header))
                for part in range(16):
                    file.seek(size * part // 16)
                    state.update(file.read(4096))
        return state.hexdigest()[:12]

    @property
    def unused(self) -> list[str]:
        """Tensors of the checkpoint that the network never calls."""
        return sorted(UNUSED_TENSORS & self.files.keys())

    def check(self, expected: dict[str, Tensor]) -> None:
        unneeded = {
            name
            for name in self.files
            if name in UNUSED_TENSORS or self._is_plain_group_index(name)
        }
        problems = [f"missing {name}" for name in expected if name not in self.files]
        problems += [
            f"unexpected {name}"
            for name in self.files
            if name not in expected and name not in unneeded
        ]
        for name in (name for name in expected if name in self.files):
            view, like = self.files[name].get_slice(name), expected[name]
            kind = view.get_dtype()
            if list(view.get_shape()) != list(like.shape):
                problems.append(f"{name} has shape {view.get_shape()}, not {list(like.shape)}")
            elif kind not in FLOATING:
                problems.append(f"{name} is {kind}; valid: {', '.join(FLOATING)}")
            elif FLOATING[kind] != like.is_floating_point():
                problems.append(f"{name} is {kind}, not {like.dtype}")
        odd = [] if problems else self._odd_zeros(expected)
        problems += [f"{name} holds zero points, but the codes are symmetric" for name in odd]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            listed = "; ".join(f"{problem:.300}" for problem in problems[:5])
            raise MissingRequirement(f"{self.folder} does not fit the network: {listed}{more}")

    def _odd_zeros(self, expected: dict[str, Tensor]) -> list[str]:
        """Packed zero points other than the middle one in a checkpoint that says it is symmetric.

        Kernels for symmetric codes do not read them, so such a checkpoint would load and be wrong.
        """
        asked = self.quantization or {}
        bits = asked.get("bits")
        if bits not in (2, 4, 8) or not asked.get("sym", not asked.get("zero_point", False)):
            return []
        middles = {_zero_word(bits), _zero_word(bits, stored_less=0)}
        names = [name for name in expected if name.endswith(".qzeros") and name in self.files]
        return [
            name
            for name in names
            if not set(self.files[name].get_tensor(name).unique().tolist()) <= middles
        ]

    def _is_plain_group_index(self, name: str) -> bool:
        """Whether this is a GPTQ group index in its plain order, which says nothing; a re-ordered one matters."""
        group = (self.quantization or {}).get("group_size")
        if not name.endswith(".g_idx") or not isinstance(group, int) or group < 1:
            return False
        index = self.files[name].get_tensor(name)
        return index.ndim == 1 and torch.equal(index.long(), torch.arange(len(index)) // group)

    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        return self.files[name].get_tensor(name).to(device=device, dtype=like.dtype)


def hub_folder(repository: Repository) -> tuple[Path, str]:
    """`(folder, commit)` of a hub repository: the commit its revision is at now, or without a network the cached one.

    Raises:
        MissingRequirement: no network and not in the hub's cache, or no such repository or revision.
    """
    find: dict[str, Any] = {"repo_id": repository.name, "allow_patterns": CHECKPOINT_FILES}
    try:
        commit = HfApi().model_info(repository.name, revision=repository.revision, timeout=20).sha
        folder = snapshot_download(**find, revision=commit)
    except Exception as error:  # the hub's library raises those of whichever HTTP client it uses
        try:
            folder = snapshot_download(**find, revision=repository.revision, local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            pin = "" if repository.revision == "main" else f" --revision {repository.revision}"
            raise MissingRequirement(
                f"cannot get {repository.name} from the hub ({type(error).__name__}); where there is a network: "
                f"`hf download {repository.name}{pin}`; or `--weights random` runs the same network for speed and "
                "memory"
            ) from None
    return Path(folder), Path(folder).name


def default_checkpoint(
    variant: Variant, size: str, weights: str, device: torch.device, seed: int = 0
) -> Checkpoint:
    """The source of `variant` at `size`: `weights` is hub, random, a folder, or auto (tiny: its default; else hub).

    Quantised variants of `tiny` have no hub repository; `quantize.cached_checkpoint` makes their folder.

    Raises:
        MissingRequirement: there are no such weights here.
    """
    if variant.folder:
        return FolderCheckpoint(variant.folder)
    if weights == "auto" and size == "tiny" and variant.scheme is None and "any" not in variant.hub:
        trained = FolderCheckpoint(TINY)
        trained.label = f"tiny default (trained, #{trained.digest})"
        return trained
    if weights == "random":
        return RandomCheckpoint(
            label=f"random {size} (seed {seed})",
            config=ColQwen3Config.of_size(size),
            scheme=variant.scheme,
            device=device,
            seed=seed,
            tokenizer=read_tokenizer(TINY_TOKENIZER) if size == "tiny" else None,
        )
    if weights not in WEIGHTS:
        return FolderCheckpoint(Path(weights))
    repository = variant.hub.get(size) or variant.hub.get("any")
    if repository is None:
        raise MissingRequirement(
            f"no hub repository is known for {variant.name} at size {size}; use `--weights random`, a folder, or make "
            "one with `colqwen-lab quantize`"
        )
    folder, commit = hub_folder(repository)
    return FolderCheckpoint(folder, label=f"hub:{repository.name}@{commit}")
