"""Fused linears: linears that share an input, multiplied as one GEMM, [M, in] to [M, out].

Each class keeps the weights in the layout of its kernel. A tunable kernel has several kernel
configs; `tune.py` times them and chooses one for each M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from colqwen_lab.model.packing import unpacked

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
SMALL_M = "small_m"  # the key of a kernel config of the small-M GEMM
# Below this M, to write and read the dequantised weight costs more than a faster GEMM saves.
MIN_DEQUANTISE_M = 1024
DEQUANTISE = '{"dequantise": true}'  # the kernel config: dequantise the weight, then cuBLAS


@cache
def compiled(function: Callable[..., Any], on_gpu: bool) -> Callable[..., Any]:
    """`function`, fused by torch.compile on a GPU; it recompiles for a new width, not for a new M.

    A dynamic width would cost a division an element, and prevents vectorised loads.
    """
    if not on_gpu:
        return function
    fused = torch.compile(function, dynamic=False)

    def call(*args: Any) -> Any:
        for value in args:
            if isinstance(value, Tensor) and value.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(value, list(range(value.ndim - 1)))
        return fused(*args)

    return call


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(codes, scale [M, 1])`: x [M, in] in FP8, each row scaled by its largest value."""
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / FP8_MAX).clamp(min=1e-12)
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def features_of(linear: Any) -> tuple[int, int]:
    """`(in, out)` of a linear of PyTorch or AutoRound."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return linear.infeatures, linear.outfeatures


def is_small_m(config: str) -> bool:
    """Whether a kernel config is one of the small-M GEMM."""
    return config.startswith(f'{{"{SMALL_M}"')


class FusedLinear(nn.Module):
    """`linears` multiplied as one GEMM. `kernel` is the kernel's name in records.

    `sizes` are the outputs of each. `configs` is the kernel config by M; at another M the kernel
    makes its own choice.
    """

    kernel = "torch.nn.Linear"
    tunable = False  # has several kernel configs
    accepts_gate_up = False  # also takes [M, 2 x in], gate beside up, and applies SiLU-and-mul
    gated = False  # SiLU-and-mul follows; a kernel config may apply it: [M, out / 2]
    identity = ""  # all that decides how fast a kernel config is, beside M and `gated`

    def __init__(self, linears: Sequence[Any]) -> None:
        super().__init__()
        self.in_features = features_of(linears[0])[0]
        self.sizes = [features_of(linear)[1] for linear in linears]
        self.out_features = sum(self.sizes)
        self.configs: dict[int, str] = {}

    def kernel_at(self, m: int) -> str:
        """The kernel's name in records at M."""
        config = self.configs.get(m, "")
        if is_small_m(config):
            return "small-M GEMM (W4A16)"
        return "dequantise, then torch.nn.Linear" if config == DEQUANTISE else self.kernel

    def kernel_configs(self, m: int) -> list[str]:
        """The kernel configs to time at M, the kernel's own choice first."""
        raise NotImplementedError

    def compiles(self, config: str) -> bool:
        """Compile a kernel config; False if this shape or GPU does not support it."""
        raise NotImplementedError


class Dense(FusedLinear):
    """16-bit weights in one storage; the linears keep views of it."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__(linears)
        if len(linears) == 1:
            self.weight = linears[0].weight
            return
        fused = torch.cat([linear.weight for linear in linears])
        self.weight = nn.Parameter(fused, requires_grad=False)
        for linear, part in zip(linears, self.weight.split(self.sizes), strict=True):
            linear.weight = nn.Parameter(part, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Prepacked(FusedLinear):
    """16-bit weights in oneDNN's blocked layout, into which `nn.Linear` repacks at every call."""

    kernel = "mkldnn._linear_pointwise"

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__(linears)
        fused = torch.cat([linear.weight.detach() for linear in linears])
        self.register_buffer("blocked", torch.ops.mkldnn._reorder_linear_weight(fused))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.blocked, None, "none", [], "")


class Fp8(FusedLinear):
    """FP8 weights, a scale an output channel; FP8 activations, a scale a token: `_scaled_mm`."""

    kernel = "torch._scaled_mm (FP8 x FP8)"
    accepts_gate_up = True
    weight: Tensor
    scale: Tensor

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__(linears)
        weight, scale = zip(*(fp8_rows(linear.weight) for linear in linears), strict=True)
        self.register_buffer("weight", torch.cat(weight))
        self.register_buffer("scale", torch.cat(scale).t())

    def forward(self, x: Tensor) -> Tensor:
        if self.accepts_gate_up:
            from colqwen_lab.runtime.triton_kernels import fp8_rows_fused

            codes, scale = fp8_rows_fused(x, self.in_features)
        else:
            codes, scale = compiled(fp8_rows, True)(x)
        options: Any = {"out_dtype": x.dtype, "use_fast_accum": True}
        return torch._scaled_mm(codes, self.weight.t(), scale, self.scale, **options)


class AsLoaded(FusedLinear):
    """AutoRound's own modules, one after the other; `load_fast` sets `kernel` to their names."""

    kernel = "modules"

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__(linears)
        self.modules_ = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        results = [module(x) for module in self.modules_]
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def gptq(linears: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """`(qweight, qzeros, scales)` of linears in the GPTQ layout, joined along their outputs."""
    names = ("qweight", "qzeros", "scales")
    qweight, qzeros, scales = (torch.cat([getattr(one, n) for one in linears], 1) for n in names)
    return qweight, qzeros, scales


def zero_offset(module: Any) -> int:
    """1 where zero points are stored minus 1 (GPTQ); AutoRound's class names end in `_zp` there."""
    return int(type(module).__module__.endswith("_zp"))


class Int4Cpu(FusedLinear):
    """torch's int4 GEMM for CPUs: dequantised in registers, (code - 8) * scale + zero."""

    kernel = "torch._weight_int4pack_mm_for_cpu"

    def __init__(self, linears: Sequence[Any]) -> None:
        super().__init__(linears)
        qweight, qzeros, scales = gptq(linears)
        self.group_size = linears[0].group_size
        codes = unpacked(qweight, 4, 0).t().contiguous().to(torch.int32)
        zeros = unpacked(qzeros, 4, 1).to(scales.dtype) + zero_offset(linears[0])
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.register_buffer("qweight", packed)
        both = torch.stack([scales, (8 - zeros) * scales], dim=-1)
        self.register_buffer("scales", both.to(torch.bfloat16).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        packed = (self.qweight, self.group_size, self.scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), *packed).to(x.dtype)
