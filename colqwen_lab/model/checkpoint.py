"""Where weights come from: the hub, a folder, seeded random values, or the packaged `tiny`.

A checkpoint gives the configuration, then one tensor at a time straight onto the device, so memory
never holds a second copy. Only safetensors and JSON are read; no code of a checkpoint runs.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from colqwen_lab.errors import BadInput, LabError, MissingRequirement
from colqwen_lab.model.config import (
    FIXED,
    READ,
    SIZES,
    Repository,
    Variant,
    scheme_parts,
)
from colqwen_lab.model.inputs import (
    SPECIAL_TOKENS,
    TINY,
    TINY_TOKENIZER,
    check_tokens,
    parse_tokenizer,
    read_tokenizer,
)
from colqwen_lab.model.network import UNUSED_HEAD, ColQwen3, ColQwen3Config
from colqwen_lab.model.scheme import GPTQ, Json, middle_words, read_scheme
from colqwen_lab.options import WEIGHTS

CHECKPOINT_FILES = ["*.safetensors", "*.safetensors.index.json", "tokenizer.json", "*config.json"]
# Qwen's tokenizer has 11 MB. A JSON parser takes seventy times a file's bytes.
TOKENIZER_BYTES, JSON_BYTES = 24 * 2**20, 2**20
DOCUMENTS = {"config.json": JSON_BYTES, "model.safetensors.index.json": JSON_BYTES}
DOCUMENTS |= {"tokenizer.json": TOKENIZER_BYTES, "quantization_config.json": JSON_BYTES}
# Entries of the language model that do not tell sizes apart.
UNSIZED = {"max_position_embeddings", "rms_norm_eps", "rope_parameters"}
SAMPLES = 1024  # of a file: all of it up to 4 MiB, and some of each linear of a larger one
MOST_LAYERS = 512
# The types that are read, by whether the network's tensor is floating-point.
DTYPES = {True: ("BF16", "F16", "F32"), False: ("I32", "I64")}
Tensors = dict[str, Tensor]
HUB_ERRORS: dict[type[Exception], str] = {
    hub_errors.GatedRepoError: "its owner grants access; ask on its page, then `hf auth login`",
    hub_errors.RepositoryNotFoundError: "there is none of this name, or it is private; check the "
    "name, or run `hf auth login`",
    hub_errors.RevisionNotFoundError: "there is no such revision; name one that its page lists",
}


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
        own = self.config.text_config.to_dict()
        own = {name: own[name] for name in READ["text_config"] - UNSIZED}
        matching = (size for size in SIZES if own.items() <= SIZES[size]["text_config"].items())
        return next(matching, "custom")

    def check_network(self, base: ColQwen3Config) -> None:
        """Raise BadInput with the entries that differ unless the weights run in BASE's network."""
        other: list[str] = []
        for part in READ:
            both = [getattr(config, part).to_dict() for config in (self.config, base)]
            own, theirs = [values.pop("rope_parameters", {}) | values for values in both]
            names = [name for name in own if own[name] != theirs[name]]
            other += [f"{part}.{name} {own[name]!r}, not {theirs[name]!r}" for name in names]
        if other:
            raise BadInput(
                f"{self.label} must have the network of base, got {'; '.join(other)}; name the "
                "16-bit weights that it was made from, or mend its config.json"
            )

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
            codes = dict(zip(("bits", "group_size"), scheme_parts(scheme), strict=True))
            packing = {"sym": True, "quant_method": "auto-round", "packing_format": GPTQ}
            self.quantization = read_scheme(codes | packing)

    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        """Normal weights of deviation 0.02, norms of one, biases of zero."""
        layer, kind = name.split(".")[-2:]
        scheme = self.quantization or {}
        generator = torch.Generator(self.device).manual_seed(self.seed + zlib.crc32(name.encode()))
        values = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        if kind == "bias":
            values.zero_()
        elif "norm" in layer:
            values.fill_(1)
        elif kind == "qzeros":
            words = torch.tensor(middle_words(scheme), dtype=like.dtype)
            values.view(-1, len(words)).copy_(words)
        elif kind == "qweight":
            values.random_(-(2**31), 2**31 - 1, generator=generator)
        elif kind == "scales":
            # Scales have either sign, so that dequantised weights have mean zero and deviation
            # 0.02. A mean would turn every token of a deep network in the same direction.
            deviation = math.sqrt((4 ** scheme["bits"] + 2) / 12)
            values.random_(2, generator=generator).mul_(2).sub_(1).mul_(0.02 / deviation)
        else:
            values.normal_(std=0.02, generator=generator)
        return values.to(device)


@contextmanager
def one_line_errors(message: str) -> Iterator[None]:
    """Turns an error of a library inside into a MissingRequirement that starts with `message`."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:  # torch, transformers and the parsers raise many types
        raise MissingRequirement(f"{message}: {error!s:.200}") from None


def _json(path: Path, document: bytes) -> Json:
    """The object of a JSON file. Raises MissingRequirement, also where a number is not finite."""

    def finite(text: str) -> float:
        if math.isfinite(value := float(text)):
            return value
        raise ValueError(f"numbers must be finite, got {text}")

    with one_line_errors(f"{path} cannot be read"):
        values = json.loads(document, parse_float=finite, parse_constant=finite)
        if not isinstance(values, dict):
            raise ValueError("it must be a JSON object")
    return values


def read_config(values: Json) -> ColQwen3Config:
    """The configuration, of the entries that the network reads. Raises ValueError on wrong ones."""
    kept = {name: value for name, value in values.items() if name in SIZES["tiny"]}
    for part, fixed in FIXED.items():
        own = dict(values.get(part) or {})
        for name, value in fixed.items():
            if own.get(name, value) != value:
                raise ValueError(f"{part}.{name} must be {value!r}, got {own[name]!r:.100}")
        kept[part] = {name: value for name, value in own.items() if name in READ[part]}
    kept["text_config"]["rope_parameters"] = _rotary(values.get("text_config") or {})
    config = ColQwen3Config(**kept)
    text = config.text_config
    for name in SPECIAL_TOKENS.values():
        if not 0 <= getattr(config, name) < text.vocab_size:
            raise ValueError(f"{name} must be below {text.vocab_size}, got {getattr(config, name)}")
    return config


def _rotary(text: Json) -> Json:
    """The rotary parameters, from either of their places. Raises ValueError on other kinds."""
    values = {"rope_theta": text.get("rope_theta")} | (text.get("rope_scaling") or {})
    values |= text.get("rope_parameters") or {}
    theta, sections = values["rope_theta"], values.get("mrope_section")
    kinds = {"rope_type": "default", "mrope_interleaved": True}
    if (
        any(values.get(name, kind) != kind for name, kind in kinds.items())
        or values.get("type", "default") != "default"
        or not (isinstance(theta, int | float) and theta > 0)
        or not (isinstance(sections, list) and [*map(type, sections)] == [int] * 3)
        or min(sections) < 0
        or 2 * sum(sections) != text.get("head_dim", 128)
    ):
        needs = "rope_type default, mrope_interleaved, a positive rope_theta, and an mrope_section"
        raise ValueError(f"text_config must have {needs} that fits head_dim, got {values!r:.100}")
    return kinds | {"rope_theta": theta, "mrope_section": sections}


class FolderCheckpoint(Checkpoint):
    """A folder in the hub's layout: config.json, safetensors files, tokenizer.json."""

    def __init__(self, folder: Path, label: str | None = None, digest: str | None = None) -> None:
        self.folder = folder
        config, index, tokenizer, _ = (folder / name for name in DOCUMENTS)
        documents = self._documents()
        if documents[config] is None:
            raise MissingRequirement(f"{folder} is not a checkpoint folder: it has no config.json")
        values = _json(config, documents[config] or b"")
        with one_line_errors(f"{config} is not the configuration of a ColQwen3"):
            if (model_type := values.get("model_type")) != ColQwen3Config.model_type:
                raise ValueError(f"model_type must be 'colqwen3', got {model_type!r:.100}")
            self.quantization = read_scheme(values.get("quantization_config"))
            self.config = read_config(values)
            self.paths, self.files = self._open(index, documents[index])
            self._check_dimensions()
        self.unused = (UNUSED_HEAD,) if UNUSED_HEAD in self.files else ()
        self.tokenizer = None
        if (document := documents[tokenizer]) is not None:
            self.tokenizer = parse_tokenizer(document, tokenizer)
            check_tokens(self.tokenizer, self.config, tokenizer)
        self.digest = digest or self._digest(documents)
        self.label = label or f"folder:{folder.resolve().name}#{self.digest}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files again; its `check` refuses files that changed since."""
        return FolderCheckpoint, (self.folder, self.label, self.digest)

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

    def _documents(self) -> dict[Path, bytes | None]:
        """The bytes of each JSON file, None where there is no such file."""
        paths = [self._own(self.folder / name, most) for name, most in DOCUMENTS.items()]
        with one_line_errors(f"{self.folder} cannot be read"):
            return {path: path.read_bytes() if path.exists() else None for path in paths}

    def _open(self, index: Path, document: bytes | None) -> tuple[list[Path], Json]:
        """The safetensors files, and the open one of each tensor: the one that the index names."""
        single, places = self.folder / "model.safetensors", None
        names = [single.name]
        if document is not None:
            with one_line_errors(f"{index} has no weight_map"):
                entries = _json(index, document)["weight_map"].items()
                places = {tensor: str(name) for tensor, name in entries}
                names = sorted(set(places.values()))
            if single.name not in names and single.exists():
                raise MissingRequirement(f"{index} does not name {single.name}; remove one of them")
        files: Json = {}
        for name in names:
            path = self.folder / name
            with one_line_errors(f"{path!s:.150} is missing, truncated or not safetensors"):
                file = safe_open(self._own(path), framework="pt")
            own = file.keys()
            files |= {key: file for key in own if places is None or places.get(key) == name}
        return [self.folder / name for name in names], files

    def _check_dimensions(self) -> None:
        """Raise ValueError, before any allocation, if the files are too small for the network."""
        config: Any = deepcopy(self.config)
        layers, blocks = config.text_config.num_hidden_layers, config.vision_config.depth
        tapped = config.vision_config.deepstack_visual_indexes
        # One layer of each kind is built, on the meta device.
        config.text_config.num_hidden_layers = config.vision_config.depth = 1
        tensors, held = len(self.files), sum(path.stat().st_size for path in self.paths)
        plausible = min(layers, blocks) > 0 and layers + blocks <= min(tensors, MOST_LAYERS)
        if plausible and len(set(tapped)) == len(tapped) <= blocks:
            with torch.device("meta"):
                weights = sum(tensor.numel() for tensor in ColQwen3(config).parameters())
            if weights // 4 <= held:  # a weight has at least two bits
                return
        network = f"a network of {layers} + {blocks} layers of these dimensions"
        raise ValueError(f"its files ({tensors} tensors, {held} bytes) do not hold {network}")

    def _digest(self, documents: dict[Path, bytes | None]) -> str:
        """Twelve hex digits of the JSON files, and of 1,024 samples of 4 kB of each other file."""
        *texts, last = documents.values()  # without the last a folder keeps its earlier digest
        texts += [] if last is None else [last]
        state = sha256(b"".join(sha256(text or b"").digest() for text in texts))
        for path in self.paths:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                state.update(size.to_bytes(8, "little") + file.read(header))
                for part in range(SAMPLES):
                    file.seek(size * part // SAMPLES)
                    state.update(file.read(4096))
        return state.hexdigest()[:12]

    def check(self, expected: Tensors) -> None:
        if self._digest(self._documents()) != self.digest:
            raise MissingRequirement(f"{self.folder} changed since it was opened; run again")
        problems = [f"missing {name}" for name in expected if name not in self.files]
        for name in self.files:
            problems += self._problems(name, expected.get(name))
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            listed = "; ".join(f"{problem:.300}" for problem in problems[:5])
            raise MissingRequirement(f"{self.folder} does not fit the network: {listed}{more}")

    def _problems(self, name: str, like: Tensor | None) -> Iterator[str]:
        file, scheme = self.files[name], self.quantization
        shape, dtype = (view := file.get_slice(name)).get_shape(), view.get_dtype()
        if like is None:
            known = name in self.unused
            if name.endswith(".g_idx") and scheme:
                # A GPTQ group index in its plain order holds no information.
                index, group = file.get_tensor(name).long(), scheme["group_size"]
                group = max(len(index), 1) if group == -1 and index.ndim else group
                known = index.ndim == 1 and index.equal(torch.arange(len(index)) // group)
            if not known:
                yield f"unexpected {name}"
        elif shape != list(like.shape):
            yield f"{name} must have shape {list(like.shape)}, got {shape}"
        elif dtype not in (valid := DTYPES[like.is_floating_point()]):
            yield f"{name} must be one of {', '.join(valid)}, got {dtype}"
        elif name.endswith(".qzeros") and scheme and scheme["sym"]:
            # Kernels for symmetric codes do not read zero points, and would run with the middle.
            words = torch.tensor(middle_words(scheme))
            if not (file.get_tensor(name).view(-1, len(words)) == words).all():
                yield f"{name} holds zero points other than the middle, but the codes are symmetric"

    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        value = self.files[name].get_tensor(name).to(device, like.dtype)
        if value.is_floating_point() and value.numel() and not value.is_meta:
            low, high = torch.stack(value.aminmax()).tolist()  # either is NaN if any value is
            if not math.isfinite(low - high):
                got = f"values from {low} to {high} in {like.dtype}"
                raise MissingRequirement(f"{self.folder}: {name} must be finite, got {got}")
        return value


def hub_folder(repository: Repository) -> Path:
    """The local folder, named by the commit, of a hub repository; without a network its cache."""
    name, revision = repository
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=CHECKPOINT_FILES))
    except Exception as error:  # the types depend on the HTTP client
        cause = error.__cause__ or error
        pin = "" if revision == "main" else f" --revision {revision}"
        reason = (
            f"{type(cause).__name__}: {cause!s:.100}; run `hf download {name}{pin}` with a network "
            "(finished files are kept), or use `--weights random` to measure speed and memory"
        )
        known = (why for kind, why in HUB_ERRORS.items() if isinstance(error, kind))
        reason = next(known, reason)
    raise MissingRequirement(f"cannot get {name}, revision {revision}, from the hub: {reason}")


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
