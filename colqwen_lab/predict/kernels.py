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
from colqwen_lab.model.network import ColQwen3
from colqwen_lab.records import Cell, Quantization
from colqwen_lab.runtime.fast import KINDS, SHORT_TOKENS, Fast, attended, bucket, heads_of
from colqwen_lab.runtime.linears import (
    DEQUANTISE,
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
# A key of earlier records: their runs could dequantise a weight, then multiply it.
PREFETCHED = "dequantised ahead"
HUMMING = ("humming", "small-M GEMM", "few_rows", PREFETCHED, "dequantise, then")
# The kernel model of a recorded kernel, by a part of its name; "" is 16-bit weights.
RECORDED = {
    **dict.fromkeys(HUMMING, "humming"),
    "torch.nn.Linear": "",
    "_linear_pointwise": "",
    "tritonv2": "tritonv2",
    "auto_round:torch": "torch",
    **dict.fromkeys(("marlin", "exllama"), "fused"),
    "_scaled_mm": "fp8",
    "_weight_int4pack_mm_for_cpu": "int4",
}


def _dequantise_then_matmul(layer: Any, x: Tensor) -> Tensor:
    """AutoRound's Triton fallback: a whole weight [in, out] in the input's type.

    Source: triton_utils_zp/dequant.py.
    """
    return x @ x.new_empty(features_of(layer))


def _fused_matmul(layer: Any, x: Tensor) -> Tensor:
    """A fused kernel dequantises in registers: the weight takes no memory."""
    return x @ x.new_empty(1).expand(features_of(layer))


class FusedGemm(FusedLinear):
    """Fused linears for a kernel such as marlin: codes and scales, no buffer but the result.

    Codes of 8-bit activations are not counted: they are at most a quarter of the activations that
    stand in their place at the peak of the MLP.
    """

    def __init__(self, fused: Sequence[Any]) -> None:
        super().__init__(fused)
        self.qweight, self.qzeros, self.scales = map(nn.Buffer, gptq(fused))
        if fused[0].sym:
            del self.qzeros

    def forward(self, x: Tensor) -> Tensor:
        return x @ x.new_empty(1).expand(self.in_features, self.out_features)


def repack(layer: Any, codes: Tensor, zeros: Tensor, scales: Tensor) -> None:
    """Give `layer` humming's layout of packed weights.

    Every tensor on the way is born and ends as in HummingLayer of humming-kernels 0.1.19: a weight
    is unpacked to a word a code, and what is loaded later fills the holes.
    """
    ins, outs = features_of(layer)
    locks = scales.new_empty(2048, dtype=torch.int32)
    _loaded = [torch.empty_like(each) for each in (codes, scales, zeros)]
    _order = scales.new_empty(ins, dtype=torch.int32)
    scales.to(torch.bfloat16)
    words, rows = codes.t().contiguous(), scales.t().contiguous()
    if layer.sym:
        for _ in range(2):
            _has_zeros = (codes.new_empty(outs, ins) == 0).any()
    _padded, rows = words.clone(), rows.clone()
    layer.qweight = nn.Buffer(torch.empty_like(words))
    layer.scales = nn.Buffer(torch.empty_like(rows.t().contiguous()))
    layer.locks = nn.Buffer(locks)
    layer.qzeros = None if layer.sym else nn.Buffer(zeros.clone())


class HummingGemm(FusedGemm):
    """Fused linears for humming, and for the kernels that read its weights.

    With `dequantises`, a weight is dequantised and multiplied by cuBLAS.
    """

    def __init__(self, fused: Sequence[Any]) -> None:
        FusedLinear.__init__(self, fused)
        self.dequantises = False
        self.infeatures, self.outfeatures = self.in_features, self.out_features
        self.sym = fused[0].sym
        repack(self, *gptq(fused))

    def forward(self, x: Tensor) -> Tensor:
        if self.dequantises:
            return x @ x.new_empty(self.out_features, self.in_features).t()
        return super().forward(x)


class Fp8Gemm(Fp8):
    """The FP8 weights of `runtime`; the GEMM takes FP8 codes of its input and their scales."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : self.in_features]
        _buffers = torch.empty_like(x, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)
        return x @ x.new_empty(1).expand(self.in_features, self.out_features)


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
    "humming": KernelModel((2, 3, 4, 8, 16), HummingGemm, _fused_matmul),
    "int4": KernelModel((4, 16), Int4Cpu, eager=False),
    "fp8": KernelModel((16,), Fp8Gemm, eager=False),
}


def check_kernel(kernel: str, quantization: Quantization | None, execution: str) -> None:
    """Raises BadInput unless `kernel` is modelled for these weights in this execution."""
    bits = quantization.bits if quantization else 16
    models = KERNELS.items()
    valid = [name for name, m in models if bits in m.bits and (m.eager or execution == "fast")]
    one_of(f"kernel of {bits}-bit weights in execution {execution}", kernel, valid)


def recorded_kernel(cell: Cell) -> str | None:
    """The key in KERNELS of a cell's kernel; "" for 16-bit weights, None if unknown."""
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


def recorded_dequantised(cell: Cell) -> tuple[str, ...]:
    """The GEMMs before which a measured run of pages dequantised their weight."""
    m = cell.batch_size * (cell.workload.tokens or 1)
    chosen = cell.backend.kernel_configs
    return tuple(kind for kind in KINDS if chosen.get(f"{kind} x {m}") == DEQUANTISE)


class FakeFast(Fast):
    """Execution fast on fake tensors, which lie on no GPU.

    Compiled functions and the lab's own attention leave only their results. A forward is captured
    once, from the graph's own pool; a replay copies the result. The run before the capture takes
    and frees as much, so it is skipped.
    """

    def __init__(self, model: ColQwen3, kernel: str, tracker: MemoryTracker) -> None:
        gemm = KERNELS[kernel].gemm

        def build(linears: Sequence[Any]) -> FusedLinear:
            if len(linears) == 3:  # queries, keys and values: the first GEMM of a layer
                tracker.mark()
            dense = kernel != "fp8" and isinstance(linears[0], nn.Linear)
            return Dense(linears) if dense else gemm(linears)

        super().__init__(model, build, build)
        self.tracker = tracker
        self.start(True, (), ())

    def start(
        self, on_gpu: bool, prefetched: tuple[str, ...], dequantised: tuple[str, ...]
    ) -> None:
        """Forget the last run.

        The GEMMs in `prefetched` dequantise all weights before the forward, those in `dequantised`
        a weight at a time.
        """
        self.on_gpu, self.prefetched = on_gpu, prefetched
        gemms: list[Any] = [(kind, one) for kind in KINDS for one in self.of_kind(kind)]
        for kind, linear in gemms:
            linear.dequantises = kind in dequantised
        self.captured, self.graph = (0, 0), tuple[Tensor, ...]()

    def texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        if not self.on_gpu:
            return super().texts(ids, mask)
        batch, tokens = ids.shape
        if not self.graph:
            ids = torch.zeros(batch, bucket(tokens), dtype=torch.int64)
            mask = torch.ones_like(ids)
            first = len(self.tracker.labels)
            self.graph = ids, mask, self.embed(ids, mask)
            self.captured = first, len(self.tracker.labels)
        return self.graph[-1][:, :tokens].clone()

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        gemms = [getattr(self.layers[0], kind) for kind in self.prefetched]
        like = self.layers[0].norms[0]
        weights = [like.new_empty(gemm.out_features, gemm.in_features) for gemm in gemms]
        self.tracker.label(weights, BUFFERS)
        return super().embed(ids, mask)

    def attention(self, layer: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if qkv.shape[1] <= SHORT_TOKENS:
            return self.small(super().attention)(layer, qkv, cos, sin)
        heads = self.small(heads_of)(qkv, layer.sizes, *layer.head_norms, layer.eps, cos, sin)
        return self.small(attended)(*heads)

    def plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.small(function)

    def small(self, function: Callable[..., Any]) -> Callable[..., Any]:
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

        return call if self.on_gpu else function
