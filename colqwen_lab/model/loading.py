"""From a checkpoint to a model on a device, with every tensor checked and real kernels only."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import set_module_tensor_to_device
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoRoundConfig

from colqwen_lab.errors import BadInput, MissingRequirement, one_of
from colqwen_lab.model import network
from colqwen_lab.model.checkpoint import Checkpoint, Json, one_line_errors
from colqwen_lab.model.network import TEXT_LAYERS, UNUSED_HEAD, ColQwen3
from colqwen_lab.options import DTYPES as DTYPE_NAMES

SCHEME_KEYS = ("bits", "group_size", "sym", "packing_format")
FAKE = "auto_round:fake"
DENSE = "torch.nn.Linear"
# These dequantise a weight of any shape. Their GEMM would leave a cuBLAS workspace of this stream.
ANY_SHAPE = ("auto_round:torch", "auto_round:tritonv2", DENSE)
PARTS = {
    "vlm.model.visual": "vision encoder",
    "embedding_proj_layer": "head",
    TEXT_LAYERS: "language model",
}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class Loaded:
    """A model on a device; `engaged` and `kept_16bit` count linears by kernel and by part."""

    model: ColQwen3
    tokenizer: Tokenizer | None
    weights: str
    device: torch.device
    requested_kernel: str
    engaged: dict[str, int]
    kept_16bit: dict[str, int]
    unused: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters and buffers, each storage once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum({key: size for _, key, size in map(storage_of, tensors)}.values())


def storage_of(tensor: Tensor) -> tuple[Any, int, int]:
    """`(object, key, bytes)` of the storage of a tensor; oneDNN's own layouts have none."""
    if tensor.is_mkldnn:
        return tensor, id(tensor), tensor.nbytes
    storage = tensor.untyped_storage()
    return storage, storage._cdata, storage.nbytes()


def _auto_round() -> tuple[Any, Any]:
    """AutoRound's modules of kernels and of conversion; 16-bit weights run without this import."""
    from auto_round.inference import backend, convert_model

    return backend, convert_model


def kernel_states(device: torch.device) -> Iterator[tuple[str, str]]:
    """(kernel, state) of each kernel for W4A16, group 128, on `device`: ready, or what it needs."""
    backend, _ = _auto_round()
    scheme = {"bits": 4, "group_size": 128, "sym": True, "data_type": "int", "act_bits": 16}
    for name, info in sorted(backend.BackendInfos.items(), key=lambda item: -item[1].priority):
        packings = [packing for packing in info.packing_format if packing != FAKE]
        layers = [(name, device.type, scheme, packing, 2560, 2560) for packing in packings]
        check = backend.check_compatible
        if name != FAKE and any(check(*layer, check_requirements=False) for layer in layers):
            needs = ", ".join(need for need in info.requirements or () if isinstance(need, str))
            ready = any(check(*layer) for layer in layers)
            state = "ready" if ready else f"needs {needs or 'humming-kernels and a CUDA GPU'}"
            yield name, f"{state}; packing {', '.join(packings)}; priority {info.priority}"


@contextmanager
def quiet() -> Iterator[None]:
    """Hides AutoRound's log; its `sys.exit` becomes a MissingRequirement with its last words."""
    logger, log = logging.getLogger("autoround"), io.StringIO()
    handler, handlers = logging.StreamHandler(log), logger.handlers
    handler.setLevel(logging.WARNING)
    logger.handlers = [handler]
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    except SystemExit:
        last_words = "; ".join(log.getvalue().splitlines()[-2:]) or "it gave no reason"
        raise MissingRequirement(f"AutoRound stopped: {last_words}") from None
    finally:
        logger.handlers = handlers


def skeleton(
    config: network.ColQwen3Config,
    quantization: Json | None,
    device: torch.device,
    kernel: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    without: Sequence[str] = (),
) -> tuple[ColQwen3, list[str]]:
    """`(network, kernels)`: the network on the meta device with its quantised layers' modules.

    AutoRound chooses a kernel for each shape, none of those in `without`. Raises BadInput without
    such a kernel on this device, MissingRequirement if none fits.
    """
    model = network.empty_network(deepcopy(config), dtype)
    if quantization is None:
        if kernel not in ("auto", "torch"):
            raise BadInput(f"kernel must be auto or torch for 16-bit weights, got {kernel!r}")
        return model, []
    backend, conversion = _auto_round()
    infos = backend.BackendInfos.items()
    here = {name: info.alias or () for name, info in infos if device.type in info.device}
    aliases = sorted(set().union(*here.values()))
    if kernel not in ("auto", *aliases, *here) or kernel == FAKE:
        valid = ", ".join(aliases)
        raise BadInput(f"kernel must be auto, {valid} on {device.type}, got {kernel!r}")
    # AutoRound trusts a checkpoint's values, and fails on wrong ones in many ways.
    scheme = ", ".join(f"{key} {quantization.get(key)!r:.40}" for key in SCHEME_KEYS)
    where = f"{device.type} (`colqwen-lab doctor` lists kernels, packings and packages)"
    with one_line_errors(f"kernel {kernel} cannot load {scheme} on {where}"):
        values = {"block_name_to_quantize": TEXT_LAYERS} | quantization | {"backend": kernel}
        model.config.quantization_config = AutoRoundConfig.from_dict(values)
        others = {name: info for name, info in infos if name not in without}
        with quiet(), torch.device("meta"), patch.dict(backend.BackendInfos, others, clear=True):
            model, kernels = conversion.convert_hf_model(model, target_device=device.type)
        if not kernels:
            raise ValueError(f"block_name_to_quantize matches no layer, use {TEXT_LAYERS}")
        if FAKE in kernels:
            packing = model.config.quantization_config.packing_format
            raise ValueError(f"no installed kernel runs packing {packing} with these shapes")
    return model.requires_grad_(False), kernels


def fill(model: ColQwen3, checkpoint: Checkpoint, device: torch.device) -> None:
    """Put every tensor of a checkpoint on `device`, one at a time. Raises as `check` does."""
    expected = model.state_dict()
    checkpoint.check(expected)
    if device.type == "cuda":
        # One block for all weights, as in transformers: each would else fill segments of 2 MiB.
        size = sum(like.nbytes for like in expected.values())
        torch.empty(size, dtype=torch.uint8, device=device)
    for name, like in expected.items():
        value = checkpoint.read(name, like, device)
        set_module_tensor_to_device(model, name, device, value=value, dtype=like.dtype)


def load(
    checkpoint: Checkpoint,
    device: torch.device,
    kernel: str = "auto",
    dtype: str = "bfloat16",
    without: tuple[str, ...] = (),
) -> Loaded:
    """The complete model of a checkpoint on `device`, with a real kernel in every layer.

    Kernel `auto` is the best that multiplies every shape, and none of those in `without`. Raises
    BadInput for an unknown kernel or dtype, MissingRequirement where tensors or packing do not fit.
    """
    torch_dtype = DTYPES[one_of("dtype", dtype, DTYPES)]
    model, kernels = skeleton(
        checkpoint.config, checkpoint.quantization, device, kernel, torch_dtype, without
    )
    fill(model, checkpoint, device)
    nn.Module.to(model, device)  # the rotary tables, which no checkpoint holds
    if kernels:
        # Some kernels, repacking weights, cast the whole model to FP16: restore the rotary tables.
        buffers = [(name, table) for name, table in model.named_buffers() if "inv_freq" in name]
        rotary = {name: table.clone() for name, table in buffers}
        with quiet():
            _auto_round()[1].post_init(model, kernels)
            unfit = _unfit(model, kernels, device)
        if unfit and kernel == "auto":
            del model
            return load(checkpoint, device, kernel, dtype, (*without, unfit[0]))
        if unfit:
            raise MissingRequirement(f"{unfit[1]}; use kernel auto")
        for name, table in rotary.items():
            set_module_tensor_to_device(model, name, device, value=table, dtype=table.dtype)
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    kept = Counter(
        part for name in dense for start, part in PARTS.items() if name.startswith(start)
    )
    source = (checkpoint.tokenizer, checkpoint.label, device, kernel)
    counts = (kernels_used(model, kernels), dict(kept))
    return Loaded(model.eval().requires_grad_(False), *source, *counts, checkpoint.unused)


def hold_unused_head(loaded: Loaded, checkpoint: Checkpoint, held: bool) -> int:
    """The bytes of the untied language-model head, now in memory; 0 if tied, or not to be `held`.

    Nothing calls it. A checkpoint without it gets the memory, as in the publisher's code.
    """
    parts = loaded.model.vlm
    if "lm_head" in parts:
        del parts["lm_head"]
    if not held or (shape := network.unused_head_shape(loaded.model.config)) is None:
        return 0
    like = torch.empty(shape, dtype=loaded.model.dtype, device="meta")
    if UNUSED_HEAD in checkpoint.unused:
        weight = checkpoint.read(UNUSED_HEAD, like, loaded.device)
    else:
        weight = torch.empty_like(like, device=loaded.device)
    parts["lm_head"] = nn.Module()
    parts["lm_head"].weight = nn.Parameter(weight, requires_grad=False)
    return weight.nbytes


def _kernel_names(model: ColQwen3, kernels: list[str]) -> dict[type, str]:
    """The kernel of each class of linear."""
    if not kernels:
        return {nn.Linear: DENSE}
    backend, config = _auto_round()[0], model.config.quantization_config
    scheme = {"bits": config.bits, "group_size": config.group_size, "sym": config.sym}
    importing = backend.dynamic_import_inference_linear
    packed = {importing(name, scheme, config.packing_format): name for name in kernels}
    return {nn.Linear: DENSE} | packed


@torch.no_grad()
def _unfit(model: ColQwen3, kernels: list[str], device: torch.device) -> tuple[str, str] | None:
    """A kernel that cannot multiply a linear of its shape, and the reason.

    Some choose and compile their code at the first forward, and fail there at odd shapes.
    """
    names, tried = _kernel_names(model, kernels), set[Any]()
    for name, layer in model.named_modules():
        kernel = names.get(type(layer), DENSE)
        if kernel.startswith(ANY_SHAPE) or not network.is_text_linear(name):
            continue
        ins = getattr(layer, "infeatures", None) or layer.in_features
        shape = kernel, ins, getattr(layer, "outfeatures", None) or layer.out_features
        if shape not in tried:
            tried.add(shape)
            try:
                layer(torch.zeros(1, ins, dtype=model.dtype, device=device))
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # libraries raise many types
                why = f"{type(error).__name__} {error!s:.200}".strip()
                return kernel, f"kernel {kernel} cannot multiply {shape[1]} x {shape[2]}: {why}"
    return None


def kernels_used(model: ColQwen3, kernels: list[str]) -> dict[str, int]:
    """The number of text linears on each kernel, by their class. Raises on a fake kernel."""
    names, modules = _kernel_names(model, kernels), model.named_modules()
    layers = [type(module) for name, module in modules if network.is_text_linear(name)]
    used = Counter(names.get(layer, f"{layer.__module__}.{layer.__qualname__}") for layer in layers)
    if fake := [kernel for kernel in used if "fake" in kernel.lower()]:
        raise MissingRequirement(f"{used[fake[0]]} linears have AutoRound's fake kernel {fake[0]}")
    return dict(used)
