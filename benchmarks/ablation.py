"""What each special path of execution `fast` buys: a forward with the path, and without it.

A forward is the replay of its CUDA graph, for a batch of queries of 18 tokens. All forwards of a
batch are replayed interleaved, round by round. A path's gain is the median over the rounds of
(time without it / time with everything on - 1), with the interval between ranks 4 and 12 of 15,
which covers the median with 96 %. A control is everything on, timed a second time. A path that
timing does not choose at a batch has no row there: leaving it out changes nothing.

    benchmarks/ablation.sh OUT.json
    python benchmarks/ablation.py OUT.json [SIZE] [BATCHES]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch

from colqwen_lab.measure.environment import environment
from colqwen_lab.model.checkpoint import default_checkpoint
from colqwen_lab.model.config import resolve_variant
from colqwen_lab.runtime.fast import KINDS, Fast, load_fast
from colqwen_lab.runtime.graphs import captured, replay_ms
from colqwen_lab.runtime.linears import Fp8, is_small_m
from colqwen_lab.runtime.tune import Paths
from colqwen_lab.settings import write_file

TOKENS, ROUNDS, LOW, HIGH = 18, 15, 3, 11
ON = "everything on"
CONTROL = "control: everything on"
MODELS = {"base": ("base", "auto"), "awq": ("awq", "auto"), "fp8": ("base", "fp8")}
# The switches of `Paths` that are turned off.
SHORT_ATTENTION = {"short attention (Triton)": ("short_attention",)}
ABLATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "base": SHORT_ATTENTION,
    "awq": {
        "small-M GEMM": ("small_m",),
        "kernel-config search": ("search",),
        "search and small-M GEMM": ("search", "small_m"),
        **SHORT_ATTENTION,
    },
    "fp8": {"fused FP8 quantise (Triton)": ("fused_fp8",), **SHORT_ATTENTION},
}


class Choice(NamedTuple):
    """The paths of a forward, and the kernel configs that timing chose with them, by kind."""

    paths: Paths
    configs: dict[str, str]


def tunable(fast: Fast) -> dict[str, Any]:
    """The first linear of each tunable kind; its kernel configs are those of the kind."""
    linears = {kind: fast.of_kind(kind)[0] for kind in KINDS}
    return {kind: linear for kind, linear in linears.items() if linear.tunable}


def chosen(fast: Fast, paths: Paths, m: int) -> Choice:
    """The choices at M with `paths`, timed afresh or from the cache."""
    fast.paths = paths
    linears = tunable(fast)
    for linear in linears.values():
        linear.configs.pop(m, None)
    fast.tune(m)
    return Choice(paths, {kind: linear.configs[m] for kind, linear in linears.items()})


def apply(fast: Fast, choice: Choice, m: int) -> None:
    fast.paths = choice.paths
    for kind, linear in tunable(fast).items():
        linear.configs[m] = choice.configs[kind]
    for layer in fast.layers:
        for kind in KINDS:
            if isinstance(linear := getattr(layer, kind), Fp8):
                linear.accepts_gate_up = choice.paths.fused_fp8
        layer.gate_up.gated = not layer.down.accepts_gate_up


def forward(fast: Fast, choice: Choice, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    apply(fast, choice, ids.numel())
    return fast.embed(ids, mask)


def used(fast: Fast, choice: Choice, m: int) -> set[str]:
    """The switches of `Paths` that change a forward at M, given what timing chose."""
    own = {kind: linear.kernel_configs(m)[0] for kind, linear in tunable(fast).items()}
    small = {kind for kind, config in choice.configs.items() if is_small_m(config)}
    switches = {
        "small_m": bool(small),
        "search": any(choice.configs[kind] != own[kind] for kind in own.keys() - small),
        "short_attention": True,
        "fused_fp8": True,
    }
    return {name for name, on in switches.items() if on}


def replays_ms(works: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Milliseconds of each round of each work: captured once, then replayed interleaved."""
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: captured(work, pool)[0] for name, work in works.items()}
    times = [{name: replay_ms(graph) for name, graph in graphs.items()} for _ in range(rounds)]
    return {name: [each[name] for each in times] for name in graphs}


def measured(models: dict[str, Fast], batch: int) -> Iterator[dict[str, Any]]:
    """The records of one batch size."""
    m = batch * TOKENS
    device = next(iter(models.values())).parts[0].weight.device
    ids = torch.randint(0, 1000, (batch, TOKENS), device=device)
    mask = torch.ones_like(ids)
    works: dict[tuple[str, str], Callable[[], Any]] = {}
    kernels = {}
    for name, fast in models.items():
        on = chosen(fast, Paths(), m)
        kernels[name] = fast.engaged(m)
        choices = {ON: on, CONTROL: on}
        for path, switches in ABLATIONS[name].items():
            if used(fast, on, m) & {*switches}:
                off = Paths()._replace(**dict.fromkeys(switches, False))
                choices[path] = chosen(fast, off, m)
        for path, choice in choices.items():
            works[name, path] = partial(forward, fast, choice, ids, mask)
    times = replays_ms(works, ROUNDS)
    for (name, path), off_ms in times.items():
        on_ms = times[name, ON]
        gains = sorted(100 * (b / a - 1) for a, b in zip(on_ms, off_ms, strict=True))
        yield {
            "model": name,
            "path": path,
            "batch_size": batch,
            "M": m,
            "median_ms": round(statistics.median(off_ms), 4),
            "gain_percent": round(statistics.median(gains), 2),
            "low_percent": round(gains[LOW], 2),
            "high_percent": round(gains[HIGH], 2),
            "kernels": kernels[name],
        }


def tables(records: list[dict[str, Any]]) -> str:
    frame = pd.DataFrame(records)
    order = {"index": ["model", "path"], "columns": "batch_size", "sort": False}
    on = frame[frame.path == ON].pivot_table(values="median_ms", **order)
    gains = frame[frame.path != ON].pivot_table(values="gain_percent", **order)
    shown = gains.map(lambda value: "-" if pd.isna(value) else f"{value:+.1f}")
    return (
        f"milliseconds of a forward, everything on\n{on.to_string()}\n\n"
        f"percent slower without the path ('-': not used at this batch)\n{shown.to_string()}"
    )


@torch.no_grad()
def main(file: str, size: str = "4b", batches: str = "1,2,4,8,16,32,64,128,256,512") -> None:
    start, device = time.monotonic(), torch.device("cuda")
    sizes = [int(batch) for batch in batches.split(",")]

    def progress(line: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {line}", file=sys.stderr, flush=True)

    models: dict[str, Fast] = {}
    for name, (variant, kernel) in MODELS.items():
        checkpoint = default_checkpoint(resolve_variant(variant), size, "random", device)
        models[name] = load_fast(checkpoint, device, kernel).model.fast
        progress(f"{name} loaded")
        models[name].compile(batch * TOKENS for batch in sizes)
    progress("kernels compiled")
    records: list[dict[str, Any]] = []
    for batch in sizes:
        records += measured(models, batch)
        result = {
            "environment": environment(device).model_dump(mode="json"),
            "size": size,
            "tokens": TOKENS,
            "rounds": ROUNDS,
            "records": records,
        }
        write_file(file, json.dumps(result, indent=1) + "\n", r'\{\s*"environment":')
        progress(f"batch {batch} done")
    print(tables(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
