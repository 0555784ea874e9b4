"""4-bit weights on a GPU: the GEMMs of humming-kernels, and the small-M GEMM for Hopper (w4.cu).

Both read the same codes and scales, so every M can use its fastest kernel on one copy of the
weights. humming's compiler builds and caches both. At a large M a weight is dequantised and
multiplied by cuBLAS.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import cuda.bindings.driver as driver
import torch
from humming.jit.runtime import KernelRuntime
from humming.kernel.humming import HummingKernel
from humming.layer import HummingLayer
from humming.schema.autoround import AutoRoundWeightSchema
from humming.tune import get_heuristics_config
from torch import Tensor
from torch.nn.functional import linear

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.runtime.linears import (
    DEQUANTISE,
    MIN_DEQUANTISE_M,
    SMALL_M,
    FusedLinear,
    gptq,
    is_small_m,
    zero_offset,
)
from colqwen_lab.runtime.triton_kernels import dequantised

SOURCE = (Path(__file__).parent / "w4.cu").read_text(encoding="utf-8")
# Up to this M humming's GEMM waits for the weights; above it, tiles that M fills are worth timing.
MEMORY_BOUND_M = 64
MAX_TILE_M = 192
# With more tiles than this along M, wide tiles are the fastest.
FEW_TILES = 4
# A larger M needs more registers for the sums than a warp has.
MAX_SMALL_M = 40
SHARED_BYTES = 227 * 1024
# Thread blocks of a small-M GEMM: enough for 132 multiprocessors, few enough to run at once.
MIN_BLOCKS, MAX_BLOCKS = 64, 800
# Steps of 16 inputs that a warp reads ahead, and the most steps of a warp: they are unrolled.
READ_AHEAD, MAX_STEPS = 4, 40


class Humming(FusedLinear):
    """W4A16, and W4A8 with FP8 or INT8 activations, compiled for this GPU at first use."""

    tunable = True

    def __init__(self, linears: Sequence[Any], activations: str | None = None) -> None:
        super().__init__(linears)
        first = linears[0]
        self.kernel = f"humming (W{first.bits}A{f'8 {activations}' if activations else 16})"
        qweight, qzeros, scales = gptq(linears)
        packing = "auto_round:auto_gptq" if zero_offset(first) else "auto_round:gptqmodel"
        schema = AutoRoundWeightSchema(
            bits=first.bits, group_size=first.group_size, sym=first.sym, packing_format=packing
        )
        self.layer = HummingLayer(
            shape_n=qweight.shape[1],
            shape_k=first.infeatures,
            weight_config=schema,
            input_config={"dtype": activations} if activations else None,
            pad_n_to_multiple=64,
            pad_k_to_multiple=32,
            torch_dtype=torch.bfloat16,
        ).to(qweight.device)
        self.layer.load_from_tensors(
            {"qweight": qweight, "qzeros": qzeros, "scales": scales.to(torch.bfloat16)}
        )
        self.layer.transform()
        try:  # at every M: on Hopper humming has no config for a width of 64
            if not activations:
                get_heuristics_config(self.layer.humming_config, device=qweight.device)
        except Exception as error:  # humming raises several types
            shape = f"{self.in_features} x {self.out_features}"
            why = f"{type(error).__name__} {error}".strip()
            raise MissingRequirement(f"kernel humming cannot multiply {shape}: {why}") from None
        # The small-M GEMM reads unsigned symmetric codes, groups of 128 and full tiles, on Hopper.
        scheme = self.layer.humming_config
        symmetric = str(scheme.b_dtype) == "uint4" and first.sym and first.group_size == 128
        full = qweight.shape[1] % 128 == 0 and first.infeatures % 128 == 0
        hopper = torch.cuda.get_device_capability(qweight.device)[0] == 9
        self.has_small_m = symmetric and full and hopper and not activations
        self.dequantises = symmetric and full and not activations
        self.identity = f"{version('humming-kernels')} {scheme.to_str()} {self.has_small_m}"

    def kernel_configs(self, m: int) -> list[str]:
        scheme, device = self.layer.humming_config, torch.cuda.current_device()
        own = get_heuristics_config(scheme, m, device=device)
        changes = [{}, *_variations(m)]
        configs = [json.dumps({**own, **change}, sort_keys=True) for change in changes]
        if self.has_small_m:
            configs += small_m_configs(self.in_features, self.out_features, m, self.gated)
        if self.dequantises and m >= MIN_DEQUANTISE_M:
            configs.append(DEQUANTISE)
        return list(dict.fromkeys(configs))

    def compiles(self, config: str) -> bool:
        device = self.layer.weight.device
        try:
            with torch.cuda.device(device):
                if is_small_m(config):
                    small_m(config)
                elif config != DEQUANTISE:
                    scheme = self.layer.humming_config.to_str()
                    HummingKernel.prepare_kernels(scheme, None, config, device.index)
        except Exception:  # humming raises several types
            return False
        return True

    def forward(self, x: Tensor) -> Tensor:
        x, config = x.contiguous(), self.configs.get(len(x), "")
        if is_small_m(config):
            return small_m(config)(x, self.layer.weight, self.layer.weight_scale)
        if config == DEQUANTISE:
            sizes = self.out_features, self.in_features
            return linear(x, dequantised(self.layer.weight, self.layer.weight_scale, *sizes))
        return self.layer(x, tuning_config=config or None)


def _variations(m: int) -> Iterator[dict[str, Any]]:
    """Variations of humming's own config to time at M."""
    # A forward reads each weight once; data that it reads again stays in the cache.
    evict = {"evict_weights_first": True}
    yield evict
    if m <= MEMORY_BOUND_M:
        yield evict | {"num_stages": 6}
        yield evict | {"num_ctas_per_sm": 3}
        height = -(-m // 16) * 16
        yield {  # `mma` of single warps, which load for themselves
            **{"block_shape": (height, 64, 128), "warp_shape": (height, 32, 64)},
            **{"num_stages": 4, "num_ctas_per_sm": 2, "mma_type": "mma"},
            **{"use_stream_k": True, "use_tma": False, "use_warp_spec": False},
        }
        return
    fewest = -(-m // MAX_TILE_M)
    for tiles in range(fewest, fewest + 3):
        height = -(-m // tiles // 8) * 8
        for width, blocks in ((256, 1), (128, 2))[: 2 if fewest <= FEW_TILES else 1]:
            shapes = {"block_shape": (height, width, 64), "warp_shape": (height, 32, 64)}
            stages = {"multi_cast_size_a": 1, "num_stages": 4, "num_ctas_per_sm": blocks}
            yield evict | shapes | stages


@dataclasses.dataclass(kw_only=True)
class SmallM(KernelRuntime):
    """The small-M GEMM: x [M, ins] times weights [outs, ins] is [M, outs].

    With `gated`, SiLU of one half times the other, [M, outs / 2].

    A cluster of `split` blocks of `warps` warps computes 64 outputs (with `gated`, 64 of each
    half). A warp reads `ahead` steps of 16 inputs ahead. Registers allow `at_once` blocks on a
    multiprocessor. The fields stand in the order of the kernel's template parameters.
    """

    name: ClassVar[str] = "small_m"
    ins: int
    outs: int
    tiles: int
    warps: int
    split: int
    ahead: int
    gated: bool
    at_once: int

    def init_kernel(self) -> None:
        self.code = SOURCE
        sizes = [str(int(value)) for value in dataclasses.asdict(self).values()]
        self.kernel_expr = f"small_m<{', '.join(sizes)}>"
        self.prepare()

    def __call__(self, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        m, outs = len(x), self.outs // (1 + self.gated)
        out = x.new_empty(m, outs)
        kernel, shared = self.load_cubin(), shared_bytes(m, **dataclasses.asdict(self))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver.cuFuncSetAttribute(kernel, limit, shared)
        blocks, threads = outs // 64 * self.split, 32 * self.warps
        stream = torch.cuda.current_stream().cuda_stream
        values = (*(tensor.data_ptr() for tensor in (codes, scales, x, out)), m)
        arguments = values, (*[ctypes.c_void_p] * 4, ctypes.c_int)
        (result,) = driver.cuLaunchKernel(
            kernel, blocks, 1, 1, threads, 1, 1, shared, stream, arguments, 0
        )
        if result != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{result}: {self.kernel_expr} with {shared} bytes of shared memory")
        return out


def small_m(config: str) -> SmallM:
    """The kernel of a config of `small_m_configs`, compiled."""
    return SmallM(**json.loads(config)[SMALL_M])


def shared_bytes(m: int, ins: int, warps: int, split: int, gated: bool, **others: Any) -> int:
    """Shared memory of a block of `small_m`, as the kernel lays it out."""
    steps, halves = ins // 16 // warps // split, 1 + gated
    same = math.gcd(steps, 8)
    groups = steps // 8 if same == 8 else (steps + 7 - same) // 8 + 1
    share = max(m * (steps * 32 + 16), halves * m * 68 * 4)
    gathered = -(-m // split) * split * halves * 256 if split > 1 else 0
    return warps * (128 + halves * groups * 128 + -(-share // 128) * 128) + gathered


def small_m_configs(ins: int, outs: int, m: int, gated: bool) -> Iterator[str]:
    """Kernel configs (JSON texts) of the small-M GEMM for this shape; none above MAX_SMALL_M."""
    tiles = -(-m // 8)
    for warps, split in product((2, 4, 8), (1, 2, 4, 8)):
        steps, rest = divmod(ins // 16, warps * split)
        blocks = outs // 64 // (1 + gated) * split
        at_once = (12 if gated else 16) // warps if tiles < 4 else 1
        kernel: dict[str, Any] = {
            **{"ins": ins, "outs": outs, "tiles": tiles, "warps": warps, "split": split},
            **{"ahead": READ_AHEAD, "gated": gated, "at_once": at_once},
        }
        even = not rest and READ_AHEAD <= steps <= MAX_STEPS and MIN_BLOCKS <= blocks <= MAX_BLOCKS
        if m <= MAX_SMALL_M and even and shared_bytes(m, **kernel) <= SHARED_BYTES:
            yield json.dumps({SMALL_M: kernel})
