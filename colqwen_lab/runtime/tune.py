"""Choices by timing on this GPU: the kernel config of each GEMM at each M, and which weights to
dequantise before a cuBLAS GEMM. Choices are kept in the cache folder, by GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional

from colqwen_lab.model.inputs import digest
from colqwen_lab.runtime.gemms import CONSUMERS, KINDS, Gemms, Paths, normed
from colqwen_lab.runtime.graphs import capture_stream, medians_ms
from colqwen_lab.runtime.linears import FusedLinear, Unnormed
from colqwen_lab.settings import cache_folder, writable_folder

# A kernel config whose result differs more from that of the kernel's own choice is rejected.
MAX_ERROR = 0.01
# The consumer of a norm before its producer; time saved in the consumer is not credited to it.
SEARCH_ORDER = ("qkv", "gate_up", "o", "down")
# From this M on, weights may be dequantised before a cuBLAS GEMM; the sets of kinds to time.
MIN_PREFETCH_M = 512
PREFETCH_SETS = (
    (),
    ("o",),
    ("qkv",),
    ("down",),
    ("qkv", "o"),
    ("gate_up",),
    ("qkv", "o", "down"),
    ("gate_up", "down"),
    KINDS,
)

MakeGemms = Callable[..., Gemms]


def candidates(layer: Any, sizes: Iterable[int], paths: Paths) -> dict[tuple[str, int], list[str]]:
    """The compiled kernel configs to time, by kind and M; only the cached choice if it is known."""
    linears = {kind: getattr(layer, kind) for kind in KINDS if getattr(layer, kind).tunable}
    known = _read() if linears else {}
    wanted = {}
    for kind, linear in linears.items():
        for m in sizes:
            own, *others = linear.kernel_configs(m)
            allowed = (paths.small_m if linear.small_m(one) else paths.search for one in others)
            configs = [own, *(one for one, ok in zip(others, allowed, strict=True) if ok)]
            best = known.get(_key(linear, m, paths), "")
            wanted[kind, m] = [best] if best in configs else configs
    device = layer.norms[0].device

    def compiles(pair: tuple[str, str]) -> bool:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return linears[pair[0]].compiles(pair[1])

    pairs = list({(kind, one): None for (kind, _), configs in wanted.items() for one in configs})
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(pairs, pool.map(compiles, pairs), strict=True))
    return {
        (kind, m): [one for one in configs if one == configs[0] or compiled[kind, one]]
        for (kind, m), configs in wanted.items()
    }


def kernel_configs(
    make: MakeGemms, layers: Sequence[Any], m: int, wanted: dict[str, list[str]], paths: Paths
) -> dict[str, str]:
    """The fastest kernel config at M of each kind in `wanted`."""
    chosen: dict[str, str] = {}
    new = {}
    for kind in (kind for kind in SEARCH_ORDER if kind in wanted):
        best, *others = wanted[kind]
        if others:
            best = _fastest(make, layers, kind, m, wanted[kind], chosen)
            new[_key(getattr(layers[0], kind), m, paths)] = best
        chosen[kind] = best
    _add(new)
    return chosen


def _fastest(
    make: MakeGemms,
    layers: Sequence[Any],
    kind: str,
    m: int,
    configs: Sequence[str],
    chosen: dict[str, str],
) -> str:
    """The fastest of `configs`, each timed over all layers, so that weights come from memory.

    SiLU-and-mul and the part of RMSNorm that a config takes over count as its own time.
    """
    linear, like = getattr(layers[0], kind), layers[0].norms[0]
    x = normed(like.new_empty(m, linear.in_features).normal_(), torch.ones_like(like[:1]), 0.0)
    squares = x.new_full((m, x.shape[1] // 64), 64, dtype=torch.float32)  # mean square 1
    residual = like.new_empty(m if kind in CONSUMERS else 0, linear.out_features).normal_()

    def result_of(gemms: Gemms, index: int) -> Tensor:
        if kind in CONSUMERS:
            return gemms.add_normed(index, kind, x, residual, layers[index].norms[1])[0]
        given = Unnormed(x, squares, 0.0) if gemms.splits_norm(index, kind) else x
        return gemms.mlp_input(index, given) if kind == "gate_up" else gemms(index, kind, given)

    def all_layers(gemms: Gemms) -> None:
        for index in range(len(layers)):
            result_of(gemms, index)

    times: dict[str, float] = {}
    expected = None
    for config in configs:
        gemms = make((), {**chosen, kind: config})
        try:
            result = result_of(gemms, 0)
            expected = result if expected is None else expected
            if _close(result, expected):
                times |= medians_ms({config: partial(all_layers, gemms)})
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError):  # it compiles, but this GPU does not launch it
            if config == configs[0]:
                raise
    return min(times, key=lambda config: times[config])


def prefetched_kinds(
    make: MakeGemms, layers: Sequence[Any], m: int, configs: dict[str, str], paths: Paths
) -> tuple[str, ...]:
    """The kinds of GEMM that run as dequantise-then-GEMM at M; `configs` are those of the others.

    None under a memory cap, which their buffers would break, or where memory is too short to time
    them.
    """
    if torch.cuda.get_per_process_memory_fraction() < 1:
        return ()
    key = f"dequantise-then-GEMM {_key(layers[0].gate_up, m, paths)}"
    best = _read().get(key)
    if best is None:
        try:
            with torch.cuda.stream(capture_stream()):
                best = "+".join(_fastest_prefetch(make, layers, m, configs))
        except torch.cuda.OutOfMemoryError:
            return ()
        _add({key: best})
    return tuple(filter(None, best.split("+")))


def _fastest_prefetch(
    make: MakeGemms, layers: Sequence[Any], m: int, configs: dict[str, str]
) -> tuple[str, ...]:
    """Of the sets within 1 % of the fastest, the one with the smallest buffers."""
    like = layers[0].norms[0]
    linears = {kind: getattr(layers[0], kind) for kind in KINDS}
    x = {kind: like.new_empty(m, one.in_features).normal_() for kind, one in linears.items()}
    for kind, linear in linears.items():
        weight = x[kind].new_empty(linear.out_features, linear.in_features)
        linear.dequantise(weight)
        if not _close(functional.linear(x[kind], weight), make((), configs)(0, kind, x[kind])):
            return ()

    def values(kinds: Sequence[str]) -> int:
        return sum(linears[kind].in_features * linears[kind].out_features for kind in kinds)

    medians = medians_ms(
        {
            kinds: partial(all_gemms, partial(make, kinds, configs), len(layers), x)
            for kinds in sorted(PREFETCH_SETS, key=values)
        }
    )
    return next(kinds for kinds, ms in medians.items() if ms <= 1.01 * min(medians.values()))


def all_gemms(make: MakeGemms, layers: int, x: dict[str, Tensor]) -> None:
    """The GEMMs of `x`, [M, in] by kind, in every layer."""
    gemms = make()
    for index in range(layers):
        for kind, each in x.items():
            gemms(index, kind, each)


def _close(result: Tensor, expected: Tensor) -> bool:
    return bool((result - expected).norm() < MAX_ERROR * expected.norm())


# ---------------------------------------------------------------- the cache


def _key(linear: FusedLinear, m: int, paths: Paths) -> str:
    switches = (paths.small_m, paths.split_norms, paths.search)
    parts = f"{linear.identity} {linear.returns_gate_up} {switches} {_sources()}"
    gemm = f"{linear.in_features} to {linear.out_features} x {m}"
    hashed = hashlib.sha256(parts.encode()).hexdigest()[:12]
    return f"{linear.kernel} {version('humming-kernels')}: {gemm} #{hashed}"


@cache
def _sources() -> str:
    """A digest of this package: other sources of kernels need new timings."""
    return digest(sorted(Path(__file__).parent.glob("*.*")))


def _path() -> Path:
    name = torch.cuda.get_device_name().replace(" ", "_").replace("/", "_")
    return writable_folder(cache_folder()) / f"kernel-configs-{name}.json"


def _read() -> dict[str, str]:
    path = _path()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _add(new: dict[str, str]) -> None:
    """Add to the cache file; two processes may do so at once."""
    path = _path()
    if new:
        with FileLock(f"{path}.lock"):
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(_read() | new, indent=0), encoding="utf-8")
            temporary.replace(path)
