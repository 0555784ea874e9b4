"""Codes packed in 32-bit words: GPTQ packs along the input, AWQ along the output."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.model.checkpoint import Checkpoint, Json, Tensors
from colqwen_lab.model.scheme import AWQ

# Where an AWQ word holds each of eight neighbouring outputs. Source: AutoAWQ's packing.
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The codes of `words` along `dim`, lowest bits first: uint8, 32 / bits times as long."""
    shifts, most = range(0, 32, bits), 2**bits - 1
    codes = [(words >> shift & most).to(torch.uint8) for shift in shifts]
    return torch.stack(codes, dim + 1).flatten(dim, dim + 1)


def packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    """The int32 words that hold `codes` along `dim`, lowest bits first."""
    parts = codes.unflatten(dim, (-1, 32 // bits)).to(torch.int32).unbind(dim + 1)
    return reduce(torch.bitwise_or, (part << bits * place for place, part in enumerate(parts)))


class Repacked(Checkpoint):
    """An AWQ-packed checkpoint, read as GPTQ-packed: the same codes, zero points and scales."""

    def __init__(self, checkpoint: Checkpoint, quantization: Json) -> None:
        self.checkpoint, self.label, self.unused = checkpoint, checkpoint.label, checkpoint.unused
        self.config, self.tokenizer = checkpoint.config, checkpoint.tokenizer
        if (bits := quantization["bits"]) != 4:
            raise MissingRequirement(
                f"the awq packing must hold 4 bits, got {bits}; "
                "quantise into the packing auto_round or auto_gptq"
            )
        self.quantization = quantization | {"packing_format": "auto_round:gptqmodel"}

    def check(self, expected: Tensors) -> None:
        self.checkpoint.check({name: _awq_like(name, like) for name, like in expected.items()})

    def read(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        words = self.checkpoint.read(name, _awq_like(name, like), device)
        if not name.endswith((".qweight", ".qzeros")):
            return words
        codes = unpacked(words, 4, 1).unflatten(1, (-1, 8))[..., AWQ_PLACES].flatten(1)
        return packed(codes, 4, 0 if name.endswith(".qweight") else 1)


def _awq_like(name: str, like: Tensor) -> Tensor:
    if not name.endswith(".qweight"):
        return like
    words, outputs = like.shape
    return like.new_empty((8 * words, outputs // 8))


def gptq_packed(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in the GPTQ packing: itself, or repacked on reading if it is AWQ-packed."""
    scheme = checkpoint.quantization
    awq = scheme and scheme["packing_format"] == AWQ
    return Repacked(checkpoint, scheme) if scheme and awq else checkpoint
