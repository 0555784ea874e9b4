"""From a source to a model on a device, strictly: every tensor accounted for, every kernel read off its layer."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from tokenizers import Tokenizer
from torch import Tensor, nn

from colqwen_lab.errors import BadInput, LabError, MissingRequirement, one_of
from colqwen_lab.model.checkpoint import Checkpoint
from colqwen_lab.model.network import (
    TEXT_LAYERS,
    ColQwen3,
    ColQwen3Config,
    empty_network,
    is_text_linear,
)

# What AutoRound takes as regular expressions of a checkpoint; one with groups or many stars could run for ever.
PATTERNS = ("extra_config", "dynamic", "modules_to_not_convert", "modules_in_block_to_quantize")
LAYER_NAME = re.compile(r"(?:[-+]:)?\^?(?:\.\*)?(?:[\w.-]|\\\.)*(?:\.\*)?\$?")
MOST_NAMES = 2000
FAKE = "auto_round:fake"
DENSE = "torch.nn.Linear"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Loaded:
    """A model on a device, with what it is made of. `engaged` maps each kernel to its number of text linears."""

    model: ColQwen3
    tokenizer: Tokenizer | None
    weights: str
    device: torch.device
    requested_backend: str
    engaged: dict[str, int]
    kept_16bit: dict[str, int]
    left_out: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters and buffers, each storage once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum({key: size for _, key, size in map(storage_of, tensors)}.values())


def storage_of(tensor: Tensor) -> tuple[Any, int, int]:
    """`(object, key, bytes)` of what holds a tensor's values; what oneDNN has laid out its own way holds itself."""
    if tensor.is_mkldnn:
        return tensor, id(tensor), tensor.nbytes
    storage = tensor.untyped_storage()
    return storage, storage._cdata, storage.nbytes()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """AutoRound logs every step and draws progress bars; errors still pass, as exceptions."""
    logger = logging.getLogger("autoround")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def skeleton(
    config: ColQwen3Config,
    quantization: dict[str, Any] | None,
    device: torch.device,
    backend: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[ColQwen3, list[str]]:
    """`(network, backends)`: the network on the meta device with the real modules of its quantised layers.

    Raises:
        BadInput: `backend` is no backend of this device.
        MissingRequirement: no installed kernel multiplies these packed weights here; names those that would.
    """
    model = empty_network(deepcopy(config), dtype)
    if quantization is None:
        if backend not in ("auto", "torch"):
            raise BadInput(
                f"backend {backend!r} multiplies packed weights; valid for 16-bit weights: auto, torch"
            )
        return model, []
    from auto_round.inference.convert_model import convert_hf_model

    try:
        asked = _auto_round_config(quantization, backend)
        model.config.quantization_config = asked
        _require_kernel(model, asked, device)
        with quiet(), torch.device("meta"):
            model, used = convert_hf_model(model, target_device=device.type)
    except LabError:
        raise
    except (
        Exception
    ) as error:  # AutoRound trusts what a checkpoint says, and fails on the rest in many ways
        why = f"{type(error).__name__}: {error}"
        raise MissingRequirement(
            f"this quantisation cannot be loaded: {why:.300}; valid packings: auto-round, gptq, awq"
        ) from None
    return model.requires_grad_(False), used


def _auto_round_config(quantization: dict[str, Any], backend: str) -> Any:
    """A checkpoint's quantisation as AutoRound takes it: packings auto-round, gptq and awq go the same way."""
    from transformers import AutoRoundConfig

    if quantization.get("checkpoint_format") == "gptq_v2" or quantization.get("desc_act"):
        raise MissingRequirement(
            "this quantisation cannot be loaded: gptq_v2 or desc_act; valid packings: auto-round, gptq, awq"
        )
    for key in PATTERNS:
        names = list(_names(quantization.get(key)))
        odd = [name for name in names if not LAYER_NAME.fullmatch(name)]
        if odd or len(names) > MOST_NAMES:
            what = f"{odd[0]!r:.100}" if odd else f"{len(names)} names"
            raise MissingRequirement(
                f"this quantisation cannot be loaded: {key} holds {what}; valid: up to {MOST_NAMES} layers"
            )
    given = {name: value for name, value in quantization.items() if value is not None}
    # AutoAWQ says zero_point where AutoRound says sym; without either AutoRound would take symmetric for granted.
    symmetric = {"sym": not given["zero_point"]} if "zero_point" in given else {}
    asked = {"block_name_to_quantize": TEXT_LAYERS, **symmetric, **given, "backend": backend}
    return AutoRoundConfig.from_dict(asked)


def _names(value: Any) -> Iterator[str]:
    """All names in `value`: a name, a list of names or of lists, or an object by name. Raises TypeError."""
    if isinstance(value, str):
        yield value
    elif value is not None:
        for one in value:
            yield from _names(one)


def _packing(config: Any) -> str:
    gptq, awq = "auto_round:auto_gptq", "auto_round:auto_awq"
    aliases = {"auto": gptq, "auto_round:gptq": gptq, "auto_round:awq": awq}
    return aliases.get(config.packing_format, config.packing_format)


def _require_kernel(model: ColQwen3, config: Any, device: torch.device) -> None:
    """Before AutoRound chooses, see that a real kernel can serve every layer; AutoRound itself would exit or fake."""
    from auto_round.inference.backend import BackendInfos, check_compatible
    from auto_round.inference.convert_model import get_layer_config

    packing = _packing(config)
    here = {
        name: info
        for name, info in BackendInfos.items()
        if device.type in info.device and name != FAKE
    }
    asked = {
        name: info
        for name, info in here.items()
        if config.backend in ("auto", name) or config.backend in info.alias
    }
    if not asked:
        aliases = sorted({alias for info in here.values() for alias in info.alias or ()})
        raise BadInput(
            f"unknown backend {config.backend!r} on {device.type}; valid: auto, {', '.join(aliases)}"
        )
    shapes = {}
    for name, scheme in get_layer_config(model, config).items():
        layer = model.get_submodule(name)
        if scheme["bits"] <= 8 and isinstance(layer, nn.Linear):
            shapes[(layer.in_features, layer.out_features, str(dict(scheme.items())))] = dict(
                scheme.items()
            )
    if not shapes:
        raise MissingRequirement(
            f"the checkpoint's block_name_to_quantize matches no layer; the text layers are {TEXT_LAYERS}"
        )
    for (rows, columns, _), scheme in shapes.items():
        layer_and_packing = (device.type, scheme, packing, rows, columns)
        if any(check_compatible(name, *layer_and_packing) for name in asked):
            continue
        can = [name for name in here if check_compatible(name, *layer_and_packing)]
        could = [
            n
            for n in here
            if n not in can and check_compatible(n, *layer_and_packing, check_requirements=False)
        ]
        needs = {
            name: [need for need in here[name].requirements or () if isinstance(need, str)]
            for name in could
        }
        raise MissingRequirement(
            f"backend {config.backend} has no installed kernel for {scheme['bits']}-bit weights of group "
            f"{scheme['group_size']} in packing {packing} ({rows} x {columns}) on {device.type}; installed ones that "
            f"can: {', '.join(can) or 'none'}; with more packages: "
            + ("; ".join(f"{name} ({', '.join(need)})" for name, need in needs.items()) or "none")
        )


def fill(model: ColQwen3, source: Checkpoint, device: torch.device) -> None:
    """Put every tensor of `source` on `device`, one after the other: the host holds one at a time.

    Raises:
        MissingRequirement: a tensor is missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    source.check(expected)
    if device.type == "cuda":
        # One request for all, given back at once, as transformers does: weights then lie side by side, not each in a
        # segment rounded to 2 MiB.
        torch.empty(
            sum(like.nbytes for like in expected.values()), dtype=torch.uint8, device=device
        )
    for name, like in expected.items():
        set_module_tensor_to_device(
            model, name, device, value=source.read(name, like, device), dtype=like.dtype
        )


def load(
    source: Checkpoint, device: torch.device, backend: str = "auto", dtype: str = "bfloat16"
) -> Loaded:
    """The model of `source` on `device`, complete and with a real kernel in every layer.

    Raises:
        BadInput: an unknown backend or dtype.
        MissingRequirement: a tensor is missing, unexpected or of another shape; no kernel can serve the packing.
    """
    wanted = DTYPES[one_of("dtype", dtype, DTYPES)]
    model, backends = skeleton(source.config, source.quantization, device, backend, wanted)
    fill(model, source, device)
    for module in model.modules():
        for key in module._non_persistent_buffers_set:
            module.register_buffer(key, module.get_buffer(key).to(device), persistent=False)
    if backends:
        _finish_kernels(model, backends)
    return Loaded(
        model=model.eval().requires_grad_(False),
        tokenizer=source.tokenizer,
        weights=source.label,
        device=device,
        requested_backend=backend,
        engaged=engaged_kernels(model, backends),
        kept_16bit=_kept_16bit(model),
        left_out=tuple(getattr(source, "unused", ())),
    )


def _finish_kernels(model: ColQwen3, backends: list[str]) -> None:
    """Let the kernels repack their weights; some force the model to FP16, which must not touch the rotary tables."""
    from auto_round.inference.convert_model import post_init

    rotary = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    with quiet():
        post_init(model, backends)
    for name, buffer in rotary.items():
        set_module_tensor_to_device(model, name, buffer.device, value=buffer, dtype=buffer.dtype)


def engaged_kernels(model: ColQwen3, backends: list[str]) -> dict[str, int]:
    """How many text linears each kernel multiplies, read off the modules' own classes.

    Raises:
        MissingRequirement: a layer runs on AutoRound's fake backend.
    """
    names = {nn.Linear: DENSE}
    if backends:
        from auto_round.inference.backend import dynamic_import_inference_linear

        config = model.config.quantization_config
        scheme = {"bits": config.bits, "group_size": config.group_size, "sym": config.sym}
        for backend in backends:
            names[
                dynamic_import_inference_linear(backend, scheme, packing_format=_packing(config))
            ] = backend
    engaged: Counter[str] = Counter()
    for name, module in model.named_modules():
        if is_text_linear(name):
            kernel = names.get(
                type(module), f"{type(module).__module__}.{type(module).__qualname__}"
            )
            if "fake" in kernel.lower():
                raise MissingRequirement(
                    f"{name} runs on AutoRound's fake backend ({kernel}); no figure is made with it"
                )
            engaged[kernel] += 1
    return dict(engaged)


def _kept_16bit(model: ColQwen3) -> dict[str, int]:
    """How many linears stayed at 16 bits, by the part of the network."""
    parts = {
        "vlm.model.visual": "vision tower",
        "embedding_proj_layer": "head",
        TEXT_LAYERS: "text tower",
    }
    kept: Counter[str] = Counter()
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            kept[
                next((part for prefix, part in parts.items() if name.startswith(prefix)), "other")
            ] += 1
    return dict(kept)
