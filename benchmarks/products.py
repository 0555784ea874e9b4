"""What binds: microseconds of each product of a layer in `fast`, base's kernel beside awq's, and of a forward.

Random weights; the weights of all layers in turn, so that they come from afar, and both models in turn. On a GPU the
kernels are chosen first, as a sweep does, and a forward is the replay of its graph.

    python benchmarks/products.py 4b 1,8,64 products.json       size, batches of 18 tokens, where to write
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from colqwen_lab.measure.environment import environment, pick_device
from colqwen_lab.model.checkpoint import default_checkpoint
from colqwen_lab.model.config import resolve_variant
from colqwen_lab.runtime.fast import KINDS, load_fast, medians_ms

TOKENS, ROUNDS = 18, 9
DEVICE = pick_device()


def medians(works: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Milliseconds of each, in turn."""
    if DEVICE.type == "cuda":
        return medians_ms(works, ROUNDS)

    def timed(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)

    times = [{name: timed(work) for name, work in works.items()} for _ in range(ROUNDS)]
    return {name: sorted(each[name] for each in times)[ROUNDS // 2] for name in works}


def main(size: str, batches: str, file: str) -> None:
    models = {}
    for variant in ("base", "awq"):
        source = default_checkpoint(resolve_variant(variant), size, "random", DEVICE)
        models[variant] = load_fast(source, DEVICE).model.fast
    records = []
    for batch in map(int, batches.split(",")):
        rows = batch * TOKENS
        ids = torch.randint(0, 1000, (batch, TOKENS), device=DEVICE)
        works: dict[Any, Callable[[], Any]] = {}
        for variant, fast in models.items():
            if DEVICE.type == "cuda":
                fast._graph(batch, TOKENS)
            for kind in KINDS:
                width = getattr(fast.layers[0], kind).in_features
                x = torch.randn(rows, width, device=DEVICE, dtype=fast.layers[0].norms[0].dtype)
                ahead = (kind,) if kind in fast.ahead.get(rows, ()) else ()
                works[variant, kind] = partial(fast.all_products, {kind: x}, ahead)
            works[variant, "forward"] = partial(fast.embed, ids, torch.ones_like(ids))
        with torch.inference_mode():
            found = medians(works)
        for variant, fast in models.items():
            layers = len(fast.layers)
            of_it = {kind: round(1000 * found[variant, kind] / layers, 2) for kind in KINDS}
            record = {
                "rows": rows,
                "variant": variant,
                **of_it,
                "forward_ms": round(found[variant, "forward"], 3),
            }
            records.append(record | {"kernels": fast.engaged(rows)})
    made = {
        "environment": environment(DEVICE).model_dump(mode="json"),
        "size": size,
        "products_us": records,
    }
    Path(file).write_text(json.dumps(made, indent=1) + "\n")
    print(pd.DataFrame(records).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
