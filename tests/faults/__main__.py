"""The fault injection suite: `python -m tests.faults -o FILE`. Exit code 1 if anything is lost."""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from colqwen_lab.measure.environment import code_version
from tests.faults import faults, parsers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="write the figures to this file")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="a share of each kind, in seconds")
    parser.add_argument("kinds", nargs="*", help="only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    rng, quick = random.Random(arguments.seed), arguments.quick
    kinds = {
        "kills": lambda: faults.kills(rng, *((4, 0, 0) if quick else (32, 20, 4))),
        "killed_workers": lambda: faults.killed_workers(rng, 1 if quick else 25),
        "torn_writes": lambda: faults.torn_writes(37 if quick else 1),
        "interleaved_writes": lambda: faults.interleaved_writes(rng, 5 if quick else 300),
        "full_disk": lambda: faults.full_disk(997 if quick else 29),
        "out_of_memory": lambda: faults.out_of_memory(9 if quick else 1),
        "headers": lambda: faults.headers(rng, *((10, 25) if quick else (300, 1))),
        "fuzzed_records": lambda: faults.fuzzed_records(100 if quick else 5000),
        "fuzzed_parameters": lambda: faults.fuzzed_parameters(100 if quick else 3000),
        "fuzzed_parsers": lambda: parsers.fuzz(arguments.seed, 500 if quick else 50_000),
    }
    counts, took_s = {}, {}
    for kind in arguments.kinds or kinds:
        began = time.monotonic()
        counts[kind] = kinds[kind]()
        took_s[kind] = round(time.monotonic() - began, 1)
        print(f"{kind} ({took_s[kind]} s): {json.dumps(counts[kind])}", file=sys.stderr, flush=True)
    lost = sum(figures.get(bad, 0) for figures in counts.values() for bad in ("lost", "orphans"))
    unclear = sum(
        figures.get(bad, 0) for figures in counts.values() for bad in ("unclear", "executed")
    )
    used = {
        name: version(name)
        for name in ("torch", "transformers", "safetensors", "pydantic", "hypothesis")
    }
    record = {
        "seed": arguments.seed,
        "quick": quick,
        "lost": lost,
        "unclear": unclear,
        "faults": counts,
        "took_s": took_s,
    }
    record |= {
        "code": code_version(),
        "versions": used | {"python": platform.python_version()},
        "os": platform.system(),
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"lost": lost, "unclear": unclear}))
    sys.exit(bool(lost or unclear))


if __name__ == "__main__":
    main()
