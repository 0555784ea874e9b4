"""Codes in words of 32 bits: the GPTQ layout, along the input, and AWQ's, along the output in an order of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.model.checkpoint import Checkpoint

# Which of eight neighbouring outputs each nibble of an AWQ word holds, lowest first. Source: AutoAWQ's packing.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The codes of `words`, lowest first, along `dim`: uint8, 32 / bits times as long there."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    shifts = shifts.view(-1, *[1] * (words.ndim - dim - 1))
    return (
        ((words.unsqueeze(dim + 1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(dim, dim + 1)
    )


def packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Words of 32 bits that hold `codes` along `dim`, lowest first: int32."""
    each = 32 // bits
    parts = codes.unflatten(dim, (-1, each)).to(torch.int32).unbind(dim + 1)
    words = torch.zeros_like(parts[0])
    for place, part in enumerate(parts):
        words |= part << (bits * place)
    return words


def _in_order(codes: Tensor) -> Tensor:
    """AWQ codes [rows, outputs] with their outputs in order."""
    return codes.unflatten(1, (-1, 8))[..., [AWQ_ORDER.index(place) for place in range(8)]].flatten(
        1
    )


class Repacked(Checkpoint):
    """An AWQ-packed checkpoint, read as GPTQ-packed: the same codes, zero points and scales."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.label, self.config, self.tokenizer = (
            source,
            source.label,
            source.config,
            source.tokenizer,
        )
        self.unused = getattr(source, "unused", ())
        if (source.quantization or {}).get("bits") != 4:
            raise MissingRequirement(
                "the awq packing holds 4 bits; valid for other bits: the packings auto-round and gptq"
            )
        asked = source.quantization or {}
        symmetric = asked.get("sym", not asked.get("zero_point", False))
        kept = {
            name: asked[name]
            for name in ("bits", "group_size", "block_name_to_quantize")
            if asked.get(name)
        }
        # AutoRound's name for zero points stored as they are.
        packing = {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}
        self.quantization = kept | packing | {"sym": symmetric}

    def check(self, expected: dict[str, Tensor]) -> None:
        self.source.check({name: _awq_like(name, like) for name, like in expected.items()})

    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        found = self.source.read(name, _awq_like(name, like), device)
        if name.endswith(".qweight"):
            return packed(_in_order(unpacked(found, 4, 1)), 4, 0)
        return packed(_in_order(unpacked(found, 4, 1)), 4, 1) if name.endswith(".qzeros") else found


def _awq_like(name: str, like: Tensor) -> Tensor:
    if not name.endswith(".qweight"):
        return like
    words, outputs = like.shape
    return torch.empty((8 * words, outputs // 8), dtype=like.dtype, device="meta")


def gptq_packed(source: Checkpoint) -> Checkpoint:
    """`source`, if its codes are packed as GPTQ does, else a reader that makes them so."""
    asked = source.quantization or {}
    return (
        Repacked(source)
        if "awq" in f"{asked.get('packing_format')} {asked.get('quant_method')}"
        else source
    )
