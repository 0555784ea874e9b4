"""Microseconds of each GEMM of a layer in execution `fast`, base beside awq, and of a forward.

Random weights. The GEMMs of all layers run one after the other, so that weights come from memory;
both models are interleaved. On a GPU the kernels are chosen first, as in a sweep, and a forward is
the replay of its CUDA graph.

    python benchmarks/gemms.py 4b 1,8,64 gemms.json       size, batches of 18 tokens, output
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch

from colqwen_lab.measure.environment import environment, pick_device
from colqwen_lab.model.checkpoint import default_checkpoint
from colqwen_lab.model.config import resolve_variant
from colqwen_lab.runtime.fast import KINDS, load_fast
from colqwen_lab.runtime.graphs import captured, replay_ms
from colqwen_lab.settings import write_file

TOKENS, ROUNDS = 18, 9
DEVICE = pick_device()


def medians(works: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Median milliseconds of each work, interleaved."""

    def timed(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)

    timers: dict[Any, Callable[[], float]] = {}
    for name, work in works.items():
        on_gpu = DEVICE.type == "cuda"
        timers[name] = (
            partial(replay_ms, captured(work, None)[0]) if on_gpu else partial(timed, work)
        )
    times = [{name: timer() for name, timer in timers.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(each[name] for each in times) for name in works}


def multiply(linears: Sequence[Any], x: torch.Tensor) -> None:
    for linear in linears:
        linear(x)


@torch.no_grad()
def main(size: str, batches: str, file: str) -> None:
    models: dict[str, Any] = {}
    for variant in ("base", "awq"):
        checkpoint = default_checkpoint(resolve_variant(variant), size, "random", DEVICE)
        models[variant] = load_fast(checkpoint, DEVICE).model.fast
    records = []
    for batch in map(int, batches.split(",")):
        m = batch * TOKENS
        ids = torch.randint(0, 1000, (batch, TOKENS), device=DEVICE)
        works: dict[Any, Callable[[], Any]] = {}
        for variant, fast in models.items():
            if DEVICE.type == "cuda":
                fast.tune(m)
            for kind in KINDS:
                width = getattr(fast.layers[0], kind).in_features
                x = torch.randn(m, width, device=DEVICE, dtype=fast.layers[0].norms[0].dtype)
                works[variant, kind] = partial(multiply, fast.of_kind(kind), x)
            works[variant, "forward"] = partial(fast.embed, ids, torch.ones_like(ids))
        times = medians(works)
        for variant, fast in models.items():
            layers = len(fast.layers)
            each = {kind: round(1000 * times[variant, kind] / layers, 2) for kind in KINDS}
            forward_ms = round(times[variant, "forward"], 3)
            record = {"M": m, "variant": variant, **each, "forward_ms": forward_ms}
            records.append(record | {"kernels": fast.engaged(m)})
    result = {
        "environment": environment(DEVICE).model_dump(mode="json"),
        "size": size,
        "gemms_us": records,
    }
    write_file(file, json.dumps(result, indent=1) + "\n", r'\{\s*"environment":')
    print(pd.DataFrame(records).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
