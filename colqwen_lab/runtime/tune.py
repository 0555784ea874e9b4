"""The kernel config of each GEMM at each M, chosen by timing on this GPU.

Choices are kept in the cache folder, a file each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from colqwen_lab.model.inputs import digest
from colqwen_lab.runtime.graphs import captured, replay_ms
from colqwen_lab.runtime.linears import DEQUANTISE, FusedLinear, is_small_m
from colqwen_lab.settings import cache_folder, writable_folder

# A kernel config whose result differs more from that of the kernel's own choice is rejected.
MAX_ERROR = 0.01
ROUNDS = 5
# The sources of kernels: when they change, everything is timed again.
SOURCES = sorted(Path(__file__).parent.glob("*.*"))


class Paths(NamedTuple):
    """The special paths of execution `fast`. `benchmarks/ablation.py` turns each off to time it.

    small_m: the small-M GEMM for 4-bit weights.
    dequantise: 4-bit weights are dequantised, then multiplied by cuBLAS, at a large M.
    search: kernel configs beside the kernel's own choice are timed.
    short_attention: the lab's attention kernel for short queries.
    fused_fp8: the lab's FP8 quantise kernel, with SiLU-and-mul.
    """

    small_m: bool = True
    dequantise: bool = True
    search: bool = True
    short_attention: bool = True
    fused_fp8: bool = True


def candidates(linear: FusedLinear, m: int, paths: Paths) -> list[str]:
    """The kernel configs to time at M, the kernel's own first; or the choice in the cache alone."""
    own, *others = linear.kernel_configs(m)
    allowed = (
        paths.small_m
        if is_small_m(one)
        else paths.dequantise
        if one == DEQUANTISE
        else paths.search
        for one in others
    )
    configs = [own, *compress(others, allowed)]
    file = _choice_file(linear, m, paths)
    choice = file.read_text(encoding="utf-8") if file.exists() else ""
    return [choice] if choice in configs else configs


def compile_all(linears: Iterable[FusedLinear], sizes: Iterable[int], paths: Paths) -> None:
    """Compile the candidates of `linears` at each M of `sizes`, all at once."""
    pairs = {
        (one, config) for one in linears for m in sizes for config in candidates(one, m, paths)
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pair: pair[0].compiles(pair[1]), pairs))


def choose(
    linears: Sequence[FusedLinear],
    x: Tensor,
    gemm: Callable[[FusedLinear, Tensor], Tensor],
    paths: Paths,
) -> None:
    """Set the fastest kernel config of `linears`, which share their configs, at the M of x [M, in].

    `gemm` is timed over all linears, so that weights come from memory. It includes SiLU-and-mul,
    which some configs take over.
    """
    first, m, expected = linears[0], len(x), x
    compile_all([first], [m], paths)
    own, *others = candidates(first, m, paths)
    times: dict[str, float] = {}

    def all_gemms() -> None:
        for linear in linears:
            gemm(linear, x)

    for config in [own, *filter(first.compiles, others)] if others else []:
        first.configs[m] = config
        try:
            result = gemm(first, x)
            expected = result if config == own else expected
            if (result - expected).norm() < MAX_ERROR * expected.norm():
                graph, _ = captured(all_gemms, None)
                times[config] = statistics.median(replay_ms(graph) for _ in range(ROUNDS))
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError):  # it compiles, but this GPU does not launch it
            if config == own:
                raise
    first.configs[m] = min(times, key=lambda one: times[one], default=own)
    _choice_file(first, m, paths).write_text(first.configs[m], encoding="utf-8")


def _choice_file(linear: FusedLinear, m: int, paths: Paths) -> Path:
    gpu, code = torch.cuda.get_device_name(), digest(SOURCES)
    parts = f"{gpu} {code} {linear.identity} {linear.gated} {m} {paths}"
    folder = writable_folder(cache_folder() / "kernel-configs")
    return folder / sha256(parts.encode()).hexdigest()[:16]
