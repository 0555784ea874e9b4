"""The lab's own kernels for 4-bit weights on Hopper, in CUDA (w4.cu): products of few rows, and dequantising.

They read codes and scales as humming-kernels lays them out, so that each number of rows can have the kernel that is
soonest while the weights lie there once. humming's compiler builds them at first use and keeps them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import cuda.bindings.driver as driver
import torch
from humming.jit.runtime import KernelRuntime
from torch import Tensor

from colqwen_lab.runtime.linears import Unnormed

SOURCE = (Path(__file__).parent / "w4.cu").read_text(encoding="utf-8")
# More take more registers for their sums than a warp has.
MOST_ROWS = 40
SHARED_BYTES = 227 * 1024
# Blocks that a product is cut into: enough for 132 multiprocessors, few enough to be there at once.
FEWEST_BLOCKS, MOST_BLOCKS = 64, 800
# Steps of 16 inputs that a warp reads ahead, and the most that it is given: they are unrolled.
AHEAD, MOST_STEPS = 4, 40
DEQUANTISING_BLOCKS = 4096


def _argument(value: Tensor | float | None) -> tuple[float, Any]:
    if isinstance(value, float):
        return value, ctypes.c_float
    if isinstance(value, int):
        return value, ctypes.c_int
    return (0 if value is None else value.data_ptr()), ctypes.c_void_p


def _launch(func: Any, blocks: int, threads: int, shared: int, *values: Any) -> None:
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.cuFuncSetAttribute(func, attribute, shared)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, torch.cuda.current_stream().cuda_stream
    given = [_argument(one) for one in values]
    (result,) = driver.cuLaunchKernelEx(config, func, tuple(zip(*given, strict=True)), 0)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(
            f"{result}: {blocks} blocks of {threads} threads, {shared} bytes of shared memory"
        )


@dataclasses.dataclass(kw_only=True)
class FewRows(KernelRuntime):
    """x [rows, in] times weights [out, in]: [rows, out]; of `gated`, [rows, out / 2], SiLU of one half times the other.

    x may be `Unnormed`. With `added` [rows, out] and a norm's weights and eps, `(added + product, its Unnormed)`.

    A cluster of `split` blocks of `warps` warps multiplies 64 outputs (of `gated`, 64 of each half); a warp reads
    `ahead` steps of 16 inputs ahead, and registers are shared out so that `at_once` blocks run on a multiprocessor.
    """

    name: ClassVar[str] = "few_rows"
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
        self.kernel_expr = f"few_rows<{', '.join(map(str, sizes))}>"
        self.prepare()

    def __call__(
        self,
        x: Tensor | Unnormed,
        codes: Tensor,
        scales: Tensor,
        added: tuple[Tensor, Tensor, float] | None = None,
    ) -> Any:
        given, squares, eps = (
            (x.weighted, x.squares, x.eps)
            if isinstance(x, Unnormed)
            else (x.contiguous(), None, 0.0)
        )
        rows, halves = given.shape[0], 2 if self.gated else 1
        out = given.new_empty(rows, self.outs // halves)
        found: Unnormed | None = None
        shared: tuple[Tensor | None, ...] = (None,) * 4
        if added:
            assert not self.gated
            total, weight, next_eps = added
            sums = given.new_empty(rows, self.outs // 64, dtype=torch.float32)
            found = Unnormed(torch.empty_like(out), sums, next_eps)
            shared = (total.contiguous(), weight, found.weighted, found.squares)
        _launch(
            self.load_cubin(),
            self.outs // 64 // halves * self.split,
            32 * self.warps,
            shared_bytes(rows, **dataclasses.asdict(self)),
            *(codes, scales, given, out, rows, squares, eps),
            *shared,
        )
        return (out, found) if found else out


@dataclasses.dataclass(kw_only=True)
class Dequantise(KernelRuntime):
    """Weights [out, in] of codes and scales, written into what is given."""

    name: ClassVar[str] = "dequantise"

    def init_kernel(self) -> None:
        self.code, self.kernel_expr = SOURCE, "dequantise"
        self.prepare()

    def __call__(self, codes: Tensor, scales: Tensor, weights: Tensor) -> None:
        outs, ins = weights.shape
        blocks = min(DEQUANTISING_BLOCKS, outs // 64 * (ins // 128))
        _launch(self.load_cubin(), blocks, 256, 0, codes, scales, weights, ins, outs)


def shared_bytes(rows: int, ins: int, warps: int, split: int, gated: bool, **others: Any) -> int:
    """Shared memory of a block of `few_rows`, as the kernel lays it out."""
    steps, halves = ins // 16 // warps // split, 2 if gated else 1
    same = math.gcd(steps, 8)
    groups = steps // 8 if same == 8 else (steps + 7 - same) // 8 + 1
    share = max(rows * (steps * 32 + 16), halves * rows * 68 * 4)
    gathered = -(-rows // split) * split * halves * 256 if split > 1 else 0
    return warps * (128 + halves * groups * 128 + -(-share // 128) * 128) + gathered + rows * 4


def few_rows_schedules(ins: int, outs: int, rows: int, gated: bool) -> Iterator[str]:
    """Ways to cut a product of so many rows, each to be timed."""
    tiles = -(-rows // 8)
    for warps, split in product((2, 4, 8), (1, 2, 4, 8)):
        blocks = outs // 64 // (2 if gated else 1) * split
        steps, rest = divmod(ins // 16, warps * split)
        cut = {"tiles": tiles, "warps": warps, "split": split, "ahead": AHEAD, "gated": gated}
        at_once = (12 if gated else 16) // warps if tiles < 4 else 1
        kernel: dict[str, Any] = {"ins": ins, "outs": outs, **cut, "at_once": at_once}
        even = not rest and AHEAD <= steps <= MOST_STEPS and FEWEST_BLOCKS <= blocks <= MOST_BLOCKS
        if rows <= MOST_ROWS and even and shared_bytes(rows, **kernel) <= SHARED_BYTES:
            yield json.dumps({"few_rows": kernel})


@cache
def few_rows_of(schedule: str) -> FewRows | None:
    """The kernel that a schedule names, where it is one of `few_rows_schedules`."""
    kernel = json.loads(schedule).get("few_rows")
    return FewRows(**kernel) if kernel else None
