"""Models of the kernels: the buffers that each one needs beside its weights, on fake tensors.

A model is derived from the source of its kernel. Everything here that depends on how `runtime`
multiplies stands in this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from colqwen_lab.errors import one_of
from colqwen_lab.model.network import ColQwen3, ColQwen3Output
from colqwen_lab.records import Cell, Quantization
from colqwen_lab.runtime.fast import KINDS, SHORT_TOKENS, Fast, attended, bucket, heads_of
from colqwen_lab.runtime.linears import (
    FP8,
    AsLoaded,
    Dense,
    Fp8,
    FusedLinear,
    Int4Cpu,
    features_of,
    gptq,
)
from colqwen_lab.runtime.tracking import MemoryTracker

BUFFERS = "kernel buffers"
# Earlier runs could dequantise a weight, then multiply it; their records name the GEMMs.
PREFETCHED = "dequantised ahead"
# The kernel model of a recorded kernel, by a part of its name; "" is 16-bit weights.
RECORDED = {
    "torch.nn.Linear": "",
    "_linear_pointwise": "",
    "tritonv2": "tritonv2",
    "auto_round:torch": "torch",
    "marlin": "fused",
    "humming": "fused",
    "exllama": "fused",
    "small-M GEMM": "fused",
    "few_rows": "fused",
    PREFETCHED: "fused",
    "_scaled_mm": "fp8",
    "_weight_int4pack_mm_for_cpu": "int4",
}


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], weight.shape[1])


def _dequantise_then_matmul(layer: Any, x: Tensor) -> Tensor:
    """AutoRound's Triton fallback: a whole weight [in, out] in the input's type.

    Source: triton_utils_zp/dequant.py.
    """
    return _matmul(x, x.new_empty(features_of(layer)))


def _fused_matmul(layer: Any, x: Tensor) -> Tensor:
    """A fused kernel dequantises in registers: the weight takes no memory."""
    return _matmul(x, x.new_empty(1).expand(features_of(layer)))


class FusedGemm(FusedLinear):
    """Fused linears for a kernel such as humming: codes and scales, no buffer but the result.

    Codes of 8-bit activations are not counted: they are at most a quarter of the activations that
    stand in their place at the peak of the MLP.
    """

    kernel = "fused"

    def __init__(self, fused: Sequence[Any]) -> None:
        super().__init__(fused)
        names = "qweight", "qzeros", "scales"
        for name, tensor in zip(names, gptq(fused), strict=True):
            if name != "qzeros" or not fused[0].sym:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return _matmul(x, x.new_empty(1).expand(self.in_features, self.out_features))


class Fp8Gemm(Fp8):
    """The FP8 weights of `runtime`; the GEMM takes FP8 codes of its input and their scales."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : self.in_features]
        buffers = torch.empty_like(x, dtype=FP8), x.new_empty((len(x), 1), dtype=torch.float32)
        result = _matmul(x, x.new_empty(1).expand(self.in_features, self.out_features))
        del buffers
        return result


class KernelModel(NamedTuple):
    """How a kernel multiplies weights of `bits` bits.

    `gemm` is the class that execution fast multiplies by; `forward` replaces that of AutoRound's
    module (None: it runs as it is); `eager` says whether execution eager has this kernel.
    """

    bits: tuple[int, ...]
    gemm: Callable[[Sequence[Any]], FusedLinear] = AsLoaded
    forward: Callable[[Any, Tensor], Tensor] | None = None
    eager: bool = True


KERNELS = {
    "tritonv2": KernelModel((2, 4, 8, 16), forward=_dequantise_then_matmul),
    "torch": KernelModel((2, 3, 4, 8, 16)),
    "fused": KernelModel((2, 3, 4, 8, 16), FusedGemm, _fused_matmul),
    "int4": KernelModel((4, 16), Int4Cpu, eager=False),
    "fp8": KernelModel((16,), Fp8Gemm, eager=False),
}


def check_kernel(kernel: str, quantization: Quantization | None, execution: str) -> None:
    """Raises BadInput unless `kernel` is modelled for these weights in this execution."""
    bits = quantization.bits if quantization else 16
    fast = execution == "fast"
    valid = [name for name, m in KERNELS.items() if bits in m.bits and (fast or m.eager)]
    one_of(f"kernel of {bits}-bit weights in execution {execution}", kernel, valid)


def recorded_kernel(cell: Cell) -> str | None:
    """The kernel model of a measured or published cell, "" for 16-bit weights; None if unknown."""
    if cell.origin == "published":
        return "tritonv2"  # the report ran AutoRound's Triton fallback
    models = {
        next((model for part, model in RECORDED.items() if part in name), None)
        for name in cell.backend.engaged
    }
    return models.pop() if len(models) == 1 else None


def recorded_prefetch(cell: Cell) -> tuple[str, ...]:
    """The GEMMs that a measured run did as dequantise-then-GEMM."""
    m = cell.batch_size * bucket(cell.workload.tokens or 1)
    chosen = cell.backend.kernel_configs.get(f"{PREFETCHED} x {m}", "").split("+")
    return tuple(kind for kind in KINDS if kind in chosen)


class FakeFast(Fast):
    """Execution fast on fake tensors, which lie on no GPU.

    Compiled functions and the lab's own attention leave only their results. A forward is captured
    once, from the graph's own pool; a replay copies the result. The run before the capture takes
    and frees as much, so it is left out.
    """

    def __init__(
        self, model: ColQwen3, kernel: str, quantized: bool, tracker: MemoryTracker
    ) -> None:
        gemm = KERNELS[kernel].gemm
        super().__init__(model, gemm if kernel == "fp8" and not quantized else Dense, gemm)
        self.tracker, self.on_gpu = tracker, True
        self.start(True, ())

    def start(self, on_gpu: bool, prefetched: tuple[str, ...]) -> None:
        """Forget the last run; the GEMMs in `prefetched` dequantise their weight first."""
        self.on_gpu, self.prefetched = on_gpu, prefetched
        self.captured, self.flops = (0, 0), 0
        self.graph: tuple[Tensor, ...] = ()

    def packed(self) -> list[nn.Module]:
        """The GEMMs whose buffers count apart."""
        return [gemm for gemm in self.linears() if not isinstance(gemm, Dense)]

    def forward(
        self, model: ColQwen3, inputs: dict[str, Tensor], use_cache: bool = False
    ) -> ColQwen3Output:
        if not self.on_gpu:
            return super().forward(model, inputs, use_cache)
        batch, tokens = inputs["input_ids"].shape
        tracker = self.tracker
        if self.graph:
            tracker.flops += self.flops
        else:
            ids = torch.zeros((batch, bucket(tokens)), dtype=torch.int64)
            mask = torch.ones_like(ids)
            flops, first = tracker.flops, len(tracker.labels)
            self.graph = ids, mask, self.embed(ids, mask)
            self.captured, self.flops = (first, len(tracker.labels)), tracker.flops - flops
        return ColQwen3Output(embeddings=self.graph[-1][:, :tokens].clone())

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        like = self.layers[0].norms[0]
        gemms = [getattr(self.layers[0], kind) for kind in self.prefetched]
        weights = [like.new_empty(gemm.out_features, gemm.in_features) for gemm in gemms]
        self.tracker.label(weights, BUFFERS)
        return super().embed(ids, mask)

    def small(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._results_only(function) if self.on_gpu else function

    def attention(self, layer: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.on_gpu:
            return super().attention(layer, qkv, cos, sin)
        if qkv.shape[1] <= SHORT_TOKENS:
            return self._results_only(super().attention)(layer, qkv, cos, sin)
        heads = self.small(heads_of)(qkv, layer.sizes, *layer.head_norms, layer.eps, cos, sin)
        return self._results_only(attended)(*heads)

    def _results_only(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with only its results in memory; a view of an argument stays a view."""

        def call(*args: Any) -> Any:
            self.tracker.hidden = True
            results = function(*args)
            self.tracker.hidden = False
            tensors = [leaf for leaf in tree_iter(args) if isinstance(leaf, Tensor)]
            storages = {tensor.untyped_storage()._cdata for tensor in tensors}
            return tree_map(
                lambda t: t if t.untyped_storage()._cdata in storages else torch.empty_like(t),
                results,
            )

        return call
