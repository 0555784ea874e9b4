"""The four GEMMs of each decoder layer in execution `fast`, and the functions between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from colqwen_lab.runtime.graphs import side_stream
from colqwen_lab.runtime.linears import Unnormed

KINDS = ("qkv", "o", "gate_up", "down")
# GEMMs followed by residual-add and RMSNorm: (layers further on, the GEMM that takes the norm).
CONSUMERS = {"o": (0, "gate_up"), "down": (1, "qkv")}


@dataclass(frozen=True)
class Paths:
    """The special paths of execution `fast`. `benchmarks/ablation.py` turns each off to time it.

    small_m: the lab's small-M GEMM for 4-bit weights.
    split_norms: residual-add and RMSNorm split across two small-M GEMMs.
    dequantise_then_gemm: 4-bit weights dequantised one layer ahead, for a cuBLAS GEMM.
    search: kernel configs beside the kernel's own choice are timed.
    short_attention: the lab's attention kernel for short queries.
    fused_fp8: the lab's FP8 quantise kernel, with SiLU-and-mul.
    """

    small_m: bool = True
    split_norms: bool = True
    dequantise_then_gemm: bool = True
    search: bool = True
    short_attention: bool = True
    fused_fp8: bool = True


ALL_PATHS = Paths()


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_normed(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(x + delta, its RMSNorm)`."""
    total = x + delta
    return total, normed(total, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SiLU of the first half times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


class Gemms:
    """The GEMMs of one forward. Those of `kinds` run in cuBLAS on weights dequantised ahead.

    Each of these kinds has one 16-bit buffer. After its GEMM in one layer, the weight of the next
    layer is written there, on a stream of lower priority that fills the gaps between GEMMs.

    `configs` is the kernel config of each tunable kind.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        kinds: Sequence[str],
        small: Callable[..., Any],
        configs: dict[str, str] | None = None,
        split_norms: bool = True,
    ) -> None:
        self.layers, self.configs = layers, configs or {}
        self.split_norms = split_norms and not kinds
        self.silu_and_mul, self.add_then_norm = small(silu_and_mul), small(add_normed)
        like = layers[0].norms[0]
        linears = {kind: getattr(layers[0], kind) for kind in kinds}
        self.weights = {
            kind: like.new_empty(linear.out_features, linear.in_features)
            for kind, linear in linears.items()
        }
        self.ready = {kind: self._prefetch(0, kind) for kind in kinds}

    def __call__(self, index: int, kind: str, x: Tensor | Unnormed) -> Tensor:
        """The GEMM `kind` of layer `index` on x [M, in]."""
        if kind not in self.weights:
            linear, config = getattr(self.layers[index], kind), self.configs.get(kind)
            return linear(x, config) if config else linear(x)
        if self.ready[kind]:
            torch.cuda.current_stream().wait_event(self.ready[kind])
        result = functional.linear(x, self.weights[kind])  # type: ignore[arg-type]
        last = index + 1 == len(self.layers)
        self.ready[kind] = None if last else self._prefetch(index + 1, kind)
        return result

    def mlp_input(self, index: int, x: Tensor | Unnormed) -> Tensor:
        """The input of `down`. SiLU-and-mul may run in the `gate_up` GEMM, or in `down` itself."""
        gate_up, down = self(index, "gate_up", x), self.layers[index].down
        if down.accepts_gate_up or gate_up.shape[-1] == down.in_features:
            return gate_up
        return self.silu_and_mul(gate_up)

    def splits_norm(self, index: int, kind: str) -> bool:
        """Whether a GEMM can do its part of an RMSNorm that is split across two GEMMs."""
        if not self.split_norms or index == len(self.layers):
            return False
        return bool(getattr(self.layers[index], kind).small_m(self.configs.get(kind)))

    def add_normed(
        self, index: int, kind: str, x: Tensor, residual: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor | Unnormed]:
        """`(residual + GEMM, its RMSNorm)`; the norm is split if both GEMMs around it can."""
        layers_on, consumer = CONSUMERS[kind]
        layer = self.layers[index]
        if self.splits_norm(index, kind) and self.splits_norm(index + layers_on, consumer):
            linear = getattr(layer, kind)
            return linear.add_normed(x, residual, weight, layer.eps, self.configs[kind])
        return self.add_then_norm(residual, self(index, kind, x), weight, layer.eps)

    def _prefetch(self, index: int, kind: str) -> Any:
        stream = side_stream(torch.cuda.current_device(), priority=0)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            getattr(self.layers[index], kind).dequantise(self.weights[kind])
        return stream.record_event()
