"""What a sweep is to measure: a checkpoint for each model, and each configuration it can run."""

from __future__ import annotations

import platform
from contextlib import suppress
from typing import Any

import torch

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model.checkpoint import Checkpoint
from colqwen_lab.model.config import resolve_size, resolve_variant
from colqwen_lab.model.quantize import checkpoint_of
from colqwen_lab.options import SweepOptions
from colqwen_lab.records import Backend, Cell, Configuration, Environment, Quantization, Workload


def checkpoints_of(options: SweepOptions, device: torch.device) -> dict[str, Checkpoint]:
    """The checkpoint of each variant by name, in the order of the models."""
    variants = {variant.name: variant for variant in map(resolve_variant, options.models)}
    if len(variants) < len(options.models):
        raise BadInput(f"model must be one or more different models, got {options.model!r}")
    size, checkpoints = resolve_size(options.size, device.type == "cuda"), {}
    for name, variant in variants.items():
        named = not variant.folder and "any" not in variant.hub
        if not named and options.weights != "auto":
            raise BadInput("weights go with a named model; a folder or a hub id holds its own")
        checkpoints[name] = one = checkpoint_of(variant, size, options.weights, device)
        if named and bool(variant.scheme) != bool(one.quantization):
            kind = "quantised" if one.quantization else "16-bit"
            raise MissingRequirement(
                f"{one.label} holds {kind} weights, which is not {name}; name it as a model instead"
            )
        if options.size not in ("auto", one.size):
            raise BadInput(
                f"{one.label} is of size {one.size}, not {options.size}; use auto or that size"
            )
    return checkpoints


def configurations_of(
    options: SweepOptions, checkpoints: dict[str, Checkpoint], device: torch.device
) -> list[Configuration]:
    """Every variant in every configuration that its weights can run."""
    packed = {name: one.quantization is not None for name, one in checkpoints.items()}
    configurations = []
    for c in options.configurations(device.type, list(checkpoints)):
        for_packed = c.kernel != "fp8"
        if c.kernel not in ("auto", "torch") and for_packed not in packed.values():
            weights = "packed" if for_packed else "16-bit"
            valid = "torch, or fp8 in execution fast" if for_packed else "w4-fp8, w4-int8"
            raise BadInput(
                f"kernel {c.kernel} multiplies {weights} weights; valid here: auto, {valid}"
            )
        if not c.eight_bit or for_packed == packed[c.variant]:
            kernel = c.kernel if packed[c.variant] or c.eight_bit else "auto"
            dtype = usual_dtype(device) if c.dtype == "auto" else c.dtype
            configurations.append(c.model_copy(update={"kernel": kernel, "dtype": dtype}))
    return list(dict.fromkeys(configurations))


def usual_dtype(device: torch.device) -> str:
    """bfloat16, or float32 on a CPU of x86 without instructions for products of bfloat16."""
    x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    products: Any = torch.cpu
    fast = products._is_avx512_bf16_supported() or products._is_amx_tile_supported()
    return "float32" if x86 and not fast else "bfloat16"


def planned_cell(
    c: Configuration, checkpoint: Checkpoint, work: dict[str, Any], here: Environment
) -> Cell:
    """The cell of a configuration and workload before it is measured."""
    config = checkpoint.quantization or {}
    sym = config.get("sym", not config.get("zero_point", False))  # AutoAWQ names zero_point
    quantization = None
    with suppress(KeyError, ValueError):
        bits, group_size = config["bits"], config["group_size"]
        quantization = Quantization(bits=bits, group_size=group_size, sym=sym)
    return Cell(
        origin="measured",
        variant=c.variant,
        size=checkpoint.size,
        weights=checkpoint.label,
        quantization=quantization,
        workload=Workload(**work),
        execution=c.execution,
        protocol=c.protocol,
        backend=Backend(requested=c.kernel, requested_dtype=c.dtype),
        status="failed",
        environment=here,
    )
