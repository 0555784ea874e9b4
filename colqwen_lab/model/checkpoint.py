"""Where weights come from: the hub, a folder, seeded random values, or the packaged `tiny`.

A checkpoint gives the configuration, then one tensor at a time straight onto the device, so memory
never holds a second copy. Only safetensors and JSON are read; no code of a checkpoint runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from colqwen_lab.errors import LabError, MissingRequirement
from colqwen_lab.model.config import SIZES, Repository, Variant, scheme_parts
from colqwen_lab.model.inputs import TINY, TINY_TOKENIZER, read_tokenizer
from colqwen_lab.model.network import UNUSED_HEAD, ColQwen3, ColQwen3Config
from colqwen_lab.options import WEIGHTS

CHECKPOINT_FILES = ["*.safetensors", "*.safetensors.index.json", "tokenizer.json", "*config.json"]
# Qwen's tokenizer has 11 MB. A JSON parser takes seventy times a file's bytes.
TOKENIZER_BYTES, JSON_BYTES = 64 * 2**20, 2**20
# The types that are read, by whether the network's tensor is floating-point.
DTYPES = {True: ("BF16", "F16", "F32"), False: ("I32", "I64")}
Json = dict[str, Any]
Tensors = dict[str, Tensor]


class Checkpoint:
    """The weights of one variant."""

    label: str  # their name in records
    config: ColQwen3Config
    tokenizer: Tokenizer | None
    quantization: Json | None  # the quantization_config, None for 16-bit weights
    unused: tuple[str, ...] = ()  # tensors that the network never calls

    @property
    def size(self) -> str:
        """The name of the configuration's size, else `custom`."""
        keys = ("hidden_size", "num_hidden_layers", "vocab_size")
        own = {key: getattr(self.config.text_config, key) for key in keys}
        matching = (size for size in SIZES if own.items() <= SIZES[size]["text_config"].items())
        return next(matching, "custom")

    def check(self, expected: Tensors) -> None:
        """Raise MissingRequirement with a list unless the tensors are exactly `expected`."""

    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        """The tensor `name` on `device`, of the shape and type of `like`."""
        raise NotImplementedError


class RandomCheckpoint(Checkpoint):
    """Random weights, generated on `device`; a tensor's values depend on `seed` and its name."""

    def __init__(self, size: str, scheme: str | None, device: torch.device, seed: int) -> None:
        self.device, self.seed, self.label = device, seed, f"random {size} (seed {seed})"
        self.config, self.quantization = ColQwen3Config.of_size(size), None
        self.tokenizer = read_tokenizer(TINY_TOKENIZER) if size == "tiny" else None
        if scheme:
            bits, group_size = scheme_parts(scheme)
            codes = {"bits": bits, "group_size": group_size, "sym": True, "data_type": "int"}
            packing = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
            self.quantization = codes | packing

    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        """Normal weights of deviation 0.02, norms of one, biases of zero."""
        layer, kind = name.split(".")[-2:]
        bits = (self.quantization or {}).get("bits", 0)
        generator = torch.Generator(self.device).manual_seed(self.seed + zlib.crc32(name.encode()))
        values = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        if kind == "bias":
            values.zero_()
        elif "norm" in layer:
            values.fill_(1)
        elif kind == "qzeros":
            values.fill_(_zero_word(bits))
        elif kind == "qweight":
            values.random_(-(2**31), 2**31 - 1, generator=generator)
        elif kind == "scales":
            # Scales have either sign, so that dequantised weights have mean zero and deviation
            # 0.02. A mean would turn every token of a deep network in the same direction.
            deviation = math.sqrt((4**bits + 2) / 12)
            values.random_(2, generator=generator).mul_(2).sub_(1).mul_(0.02 / deviation)
        else:
            values.normal_(std=0.02, generator=generator)
        return values.to(device)


def _zero_word(bits: int, stored_less: int = 1) -> int:
    """An int32 of packed zero points 2^(bits-1), which the GPTQ packing stores less one."""
    zero = 2 ** (bits - 1) - stored_less
    word = sum(zero << shift for shift in range(0, 32 - 32 % bits, bits))
    return word - 2**32 if word >= 2**31 else word


def is_symmetric(quantization: Json) -> bool:
    """Whether codes are symmetric: AutoRound writes `sym`, AutoAWQ the opposite `zero_point`."""
    return bool(quantization.get("sym", not quantization.get("zero_point", False)))


@contextmanager
def one_line_errors(message: str) -> Iterator[None]:
    """Turns an error of a library inside into a MissingRequirement that starts with `message`."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:  # torch, transformers and the parsers raise many types
        raise MissingRequirement(f"{message}: {error!s:.200}") from None


class FolderCheckpoint(Checkpoint):
    """A folder in the hub's layout: config.json, safetensors files, tokenizer.json."""

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder, config = folder, folder / "config.json"
        values = self._json(config)
        with one_line_errors(f"{config} is not the configuration of a ColQwen3"):
            if (model_type := values.get("model_type")) != ColQwen3Config.model_type:
                raise ValueError(f"model_type must be 'colqwen3', got {model_type!r:.100}")
            self.quantization = values.pop("quantization_config", None)
            if not isinstance(self.quantization, dict | None):
                raise ValueError("quantization_config must be an object")
            # `auto_map` names code of the repository.
            for key in ("auto_map", "dtype", "torch_dtype"):
                values.pop(key, None)
            self.files = self._open()
            self.config = ColQwen3Config(**values)
            self._check_dimensions()
        self.unused = (UNUSED_HEAD,) if UNUSED_HEAD in self.files else ()
        tokenizer = self._own(folder / "tokenizer.json", TOKENIZER_BYTES)
        self.tokenizer = read_tokenizer(tokenizer) if tokenizer.exists() else None
        self.label = label or f"folder:{folder.resolve().name}#{self.digest}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files again."""
        return FolderCheckpoint, (self.folder, self.label)

    def _own(self, path: Path, most_bytes: float = math.inf) -> Path:
        """`path`, if it is a small enough file here or, by a link, among the hub's blobs."""
        home = Path(os.path.realpath(self.folder))
        homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
        if Path(os.path.realpath(path)).parent not in homes:
            raise MissingRequirement(f"{path} points outside its folder")
        if path.exists():
            if not path.is_file():
                raise MissingRequirement(f"{path} is not a file")
            if (size := path.stat().st_size) > most_bytes:
                raise MissingRequirement(f"{path} must have at most {most_bytes} bytes, got {size}")
        return path

    def _json(self, path: Path) -> Json:
        if not self._own(path, JSON_BYTES).exists():
            raise MissingRequirement(
                f"{self.folder} is not a checkpoint folder: it has no {path.name}"
            )
        with one_line_errors(f"{path} cannot be read"):
            document = json.loads(path.read_bytes())
            if not isinstance(document, dict):
                raise ValueError("it must be a JSON object")
        return document

    def _open(self) -> Json:
        """The open safetensors file of each tensor."""
        index, names = self.folder / "model.safetensors.index.json", ["model.safetensors"]
        if index.exists():
            with one_line_errors(f"{index} has no weight_map"):
                names = sorted({str(name) for name in self._json(index)["weight_map"].values()})
        self.paths = [self.folder / name for name in names]
        files: Json = {}
        for path in self.paths:
            with one_line_errors(f"{path!s:.150} is missing, truncated or not safetensors"):
                file = safe_open(self._own(path), framework="pt")
            files |= dict.fromkeys(file.keys(), file)
        return files

    def _check_dimensions(self) -> None:
        """Raise ValueError, before any allocation, if the files are too small for the network."""
        config: Any = deepcopy(self.config)
        layers, blocks = config.text_config.num_hidden_layers, config.vision_config.depth
        tapped = config.vision_config.deepstack_visual_indexes
        # One layer of each kind is built, on the meta device.
        config.text_config.num_hidden_layers = config.vision_config.depth = 1
        tensors, held = len(self.files), sum(path.stat().st_size for path in self.paths)
        plausible = min(layers, blocks) > 0 and layers + blocks <= tensors
        if plausible and len(set(tapped)) == len(tapped) <= blocks:
            with torch.device("meta"):
                weights = sum(tensor.numel() for tensor in ColQwen3(config).parameters())
            if weights // 4 <= held:  # a weight has at least two bits
                return
        network = f"a network of {layers} + {blocks} layers of these dimensions"
        raise ValueError(f"its files ({tensors} tensors, {held} bytes) do not hold {network}")

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits of each file's size, header and sixteen samples of 4 kB."""
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

    def check(self, expected: Tensors) -> None:
        problems = [f"missing {name}" for name in expected if name not in self.files]
        for name in self.files:
            problems += self._problems(name, expected.get(name))
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            listed = "; ".join(f"{problem:.300}" for problem in problems[:5])
            raise MissingRequirement(f"{self.folder} does not fit the network: {listed}{more}")

    def _problems(self, name: str, like: Tensor | None) -> Iterator[str]:
        file, quantization = self.files[name], self.quantization or {}
        bits, group = quantization.get("bits"), quantization.get("group_size")
        shape, dtype = (view := file.get_slice(name)).get_shape(), view.get_dtype()
        if like is None:
            known = name in self.unused
            if name.endswith(".g_idx") and isinstance(group, int) and group > 0:
                # A GPTQ group index in its plain order holds no information.
                index = file.get_tensor(name).long()
                known = index.ndim == 1 and index.equal(torch.arange(len(index)) // group)
            if not known:
                yield f"unexpected {name}"
        elif shape != list(like.shape):
            yield f"{name} must have shape {list(like.shape)}, got {shape}"
        elif dtype not in (valid := DTYPES[like.is_floating_point()]):
            yield f"{name} must be one of {', '.join(valid)}, got {dtype}"
        elif name.endswith(".qzeros") and bits in (2, 4, 8) and is_symmetric(quantization):
            # Kernels for symmetric codes do not read zero points, and would run with the middle.
            words = set(file.get_tensor(name).unique().tolist())
            if not words <= {_zero_word(bits), _zero_word(bits, stored_less=0)}:
                yield f"{name} holds zero points, but the codes are symmetric"

    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        return self.files[name].get_tensor(name).to(device, like.dtype)


def hub_folder(repository: Repository) -> Path:
    """The local folder, named by the commit, of a hub repository; without a network its cache."""
    name, revision = repository
    reason = ""
    for cached in (False, True):
        try:
            options: Json = {"revision": revision, "local_files_only": cached}
            return Path(snapshot_download(name, allow_patterns=CHECKPOINT_FILES, **options))
        except Exception as error:  # the types depend on the HTTP client
            reason = reason or type(error).__name__
    pin = "" if revision == "main" else f" --revision {revision}"
    raise MissingRequirement(
        f"cannot get {name} from the hub ({reason}); run `hf download {name}{pin}` with a network, "
        "or use `--weights random` to measure speed and memory"
    )


def default_checkpoint(
    variant: Variant, size: str, weights: str, device: torch.device, seed: int = 0
) -> Checkpoint:
    """The checkpoint of `variant` at `size`; `weights` is hub, random, a folder or auto.

    `auto` is the packaged checkpoint for 16-bit `tiny`, else the hub; for a quantised `tiny` see
    `quantize.cached_checkpoint`. Raises MissingRequirement without such weights.
    """
    if variant.folder:
        return FolderCheckpoint(variant.folder)
    if weights == "auto" and size == "tiny" and variant.scheme is None and "any" not in variant.hub:
        packaged = FolderCheckpoint(TINY)
        packaged.label = f"tiny default (trained, #{packaged.digest})"
        return packaged
    if weights == "random":
        return RandomCheckpoint(size, variant.scheme, device, seed)
    if weights not in WEIGHTS:
        return FolderCheckpoint(Path(weights))
    repository = variant.hub.get(size) or variant.hub.get("any")
    if repository is None:
        raise MissingRequirement(
            f"no hub repository is known for {variant.name} at size {size}; use `--weights "
            "random`, a folder, or `colqwen-lab quantize`"
        )
    folder = hub_folder(repository)
    return FolderCheckpoint(folder, label=f"hub:{repository.name}@{folder.name}")
