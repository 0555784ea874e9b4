"""4-bit weights on a GPU: the GEMMs of humming-kernels, and the lab's kernels for Hopper (w4.cu).

The lab's kernels read codes and scales in the layout of humming-kernels, so every M can use its
fastest kernel on one copy of the weights. humming's compiler builds and caches all of them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from functools import cache
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

from colqwen_lab.runtime.linears import FusedLinear, Unnormed, gptq, zero_offset

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
DEQUANTISE_BLOCKS = 4096


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
        # The lab's kernels read unsigned symmetric codes, groups of 128 and full tiles, on Hopper.
        full = qweight.shape[1] % 128 == 0 and first.infeatures % 128 == 0
        symmetric = str(self.layer.humming_config.b_dtype) == "uint4" and first.sym
        hopper = torch.cuda.get_device_capability(qweight.device)[0] == 9
        self.dequantises = (
            full and symmetric and first.group_size == 128 and not activations and hopper
        )
        self.identity = f"{self.layer.humming_config.to_str()} {self.dequantises}"

    def kernel_configs(self, m: int) -> list[str]:
        """humming's own config at M, variations of it, and small-M GEMMs."""
        own = get_heuristics_config(
            self.layer.humming_config, m, device=torch.cuda.current_device()
        )
        # A forward reads each weight once; data that it reads again stays in the cache.
        evict = {"evict_weights_first": True}
        changes: list[dict[str, Any]] = [{}, evict]
        if m <= MEMORY_BOUND_M:
            changes += [evict | {"num_stages": 6}, evict | {"num_ctas_per_sm": 3}, _small_tile(m)]
        else:
            fewest = -(-m // MAX_TILE_M)
            for height in (-(-m // tiles // 8) * 8 for tiles in range(fewest, fewest + 3)):
                changes.append(evict | _tile(height, 256, 1))
                changes += [evict | _tile(height, 128, 2)] if fewest <= FEW_TILES else []
        configs = [json.dumps({**own, **change}, sort_keys=True) for change in changes]
        if self.dequantises:
            configs += small_m_configs(self.in_features, self.out_features, m, self.returns_gate_up)
        return list(dict.fromkeys(configs))

    def compiles(self, config: str) -> bool:
        try:
            if not self.small_m(config):
                layer, device = self.layer.humming_config.to_str(), torch.cuda.current_device()
                HummingKernel.prepare_kernels(layer, None, config, device)
        except Exception:  # humming raises several types
            return False
        return True

    def forward(self, x: Tensor | Unnormed, config: str | None = None) -> Tensor:
        if small_m := self.small_m(config):
            return small_m(x, self.layer.weight, self.layer.weight_scale)
        assert isinstance(x, Tensor)
        return self.layer(x.contiguous(), tuning_config=config)

    def add_normed(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, config: str
    ) -> tuple[Tensor, Unnormed]:
        codes, scales = self.layer.weight, self.layer.weight_scale
        return self.small_m(config)(x, codes, scales, (residual, weight, eps))

    def small_m(self, config: str | None) -> Any:
        return small_m_of(config) if config and self.dequantises else None

    def dequantise(self, weight: Tensor) -> None:
        Dequantise()(self.layer.weight, self.layer.weight_scale, weight)


def _tile(height: int, width: int, blocks_per_sm: int) -> dict[str, Any]:
    """A variation of humming's config: the tile of a thread block."""
    shapes = {"block_shape": (height, width, 64), "warp_shape": (height, 32, 64)}
    return shapes | {"multi_cast_size_a": 1, "num_stages": 4, "num_ctas_per_sm": blocks_per_sm}


def _small_tile(m: int) -> dict[str, Any]:
    """A variation of humming's config: `mma` of single warps, which load for themselves."""
    height = -(-m // 16) * 16
    return {
        "block_shape": (height, 64, 128),
        "warp_shape": (height, 32, 64),
        "num_stages": 4,
        "num_ctas_per_sm": 2,
        "mma_type": "mma",
        "use_stream_k": True,
        "use_tma": False,
        "use_warp_spec": False,
    }


def _launch(func: Any, blocks: int, threads: int, shared: int, *values: Any) -> None:
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.cuFuncSetAttribute(func, attribute, shared)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, torch.cuda.current_stream().cuda_stream
    arguments = tuple(zip(*map(_argument, values), strict=True))
    (result,) = driver.cuLaunchKernelEx(config, func, arguments, 0)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(
            f"{result}: {blocks} blocks of {threads} threads, {shared} bytes of shared memory"
        )


def _argument(value: Tensor | float | None) -> tuple[float, Any]:
    if isinstance(value, float):
        return value, ctypes.c_float
    if isinstance(value, int):
        return value, ctypes.c_int
    return (0 if value is None else value.data_ptr()), ctypes.c_void_p


@dataclasses.dataclass(kw_only=True)
class SmallM(KernelRuntime):
    """The small-M GEMM: x [M, ins] times weights [outs, ins] is [M, outs].

    With `gated`, SiLU of one half times the other, [M, outs / 2]. x may be `Unnormed`. With
    `added` (residual [M, outs], norm weight, eps) it is `(residual + GEMM, its Unnormed)`.

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
        sizes = [int(getattr(self, field.name)) for field in dataclasses.fields(self)]
        self.kernel_expr = f"small_m<{', '.join(map(str, sizes))}>"
        self.prepare()

    def __call__(
        self,
        x: Tensor | Unnormed,
        codes: Tensor,
        scales: Tensor,
        added: tuple[Tensor, Tensor, float] | None = None,
    ) -> Any:
        rows, squares, eps = x if isinstance(x, Unnormed) else (x.contiguous(), None, 0.0)
        m, halves = rows.shape[0], 2 if self.gated else 1
        out = rows.new_empty(m, self.outs // halves)
        unnormed: Unnormed | None = None
        norm: tuple[Tensor | None, ...] = (None,) * 4
        if added:
            assert not self.gated
            residual, weight, next_eps = added
            sums = rows.new_empty(m, self.outs // 64, dtype=torch.float32)
            unnormed = Unnormed(torch.empty_like(out), sums, next_eps)
            norm = (residual.contiguous(), weight, unnormed.weighted, unnormed.squares)
        _launch(
            self.load_cubin(),
            self.outs // 64 // halves * self.split,
            32 * self.warps,
            shared_bytes(m, **dataclasses.asdict(self)),
            *(codes, scales, rows, out, m, squares, eps),
            *norm,
        )
        return (out, unnormed) if unnormed else out


@dataclasses.dataclass(kw_only=True)
class Dequantise(KernelRuntime):
    """Writes the 16-bit weights [outs, ins] of codes and scales."""

    name: ClassVar[str] = "dequantise"

    def init_kernel(self) -> None:
        self.code, self.kernel_expr = SOURCE, "dequantise"
        self.prepare()

    def __call__(self, codes: Tensor, scales: Tensor, weights: Tensor) -> None:
        outs, ins = weights.shape
        blocks = min(DEQUANTISE_BLOCKS, outs // 64 * (ins // 128))
        _launch(self.load_cubin(), blocks, 256, 0, codes, scales, weights, ins, outs)


def shared_bytes(m: int, ins: int, warps: int, split: int, gated: bool, **others: Any) -> int:
    """Shared memory of a block of `small_m`, as the kernel lays it out."""
    steps, halves = ins // 16 // warps // split, 2 if gated else 1
    same = math.gcd(steps, 8)
    groups = steps // 8 if same == 8 else (steps + 7 - same) // 8 + 1
    share = max(m * (steps * 32 + 16), halves * m * 68 * 4)
    gathered = -(-m // split) * split * halves * 256 if split > 1 else 0
    return warps * (128 + halves * groups * 128 + -(-share // 128) * 128) + gathered + m * 4


def small_m_configs(ins: int, outs: int, m: int, gated: bool) -> Iterator[str]:
    """The small-M GEMMs of this shape, by how warps and blocks share the work."""
    tiles = -(-m // 8)
    for warps, split in product((2, 4, 8), (1, 2, 4, 8)):
        blocks = outs // 64 // (2 if gated else 1) * split
        steps, rest = divmod(ins // 16, warps * split)
        cut = {"tiles": tiles, "warps": warps, "split": split, "ahead": READ_AHEAD, "gated": gated}
        at_once = (12 if gated else 16) // warps if tiles < 4 else 1
        kernel: dict[str, Any] = {"ins": ins, "outs": outs, **cut, "at_once": at_once}
        even = not rest and READ_AHEAD <= steps <= MAX_STEPS and MIN_BLOCKS <= blocks <= MAX_BLOCKS
        if m <= MAX_SMALL_M and even and shared_bytes(m, **kernel) <= SHARED_BYTES:
            yield json.dumps({"small_m": kernel})


@cache
def small_m_of(config: str) -> SmallM | None:
    """The kernel of a config of `small_m_configs`; None for a config of humming."""
    kernel = json.loads(config).get("small_m")
    return SmallM(**kernel) if kernel else None
