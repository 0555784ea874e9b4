"""The report's own command line, kept working: its flags, its protocol, its JSON keys.

    uv run python benchmark.py --only_base --sweep_batch_sizes "8,16,32,64,128,256" --output_json sweep_4b_base.json

The records with every sample go beside the JSON, as NAME.records.jsonl. As in the report, models run in FP16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from colqwen_lab.errors import BadInput, LabError
from colqwen_lab.records import SCRIPT_NAMES, Cell, batch_sizes_of, script_json


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"benchmark.py: {message}; --help lists what it takes\n")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text_samples", type=int, default=64, help="queries, at least two batches of them"
    )
    parser.add_argument("--text_batch_size", type=int, default=8)
    parser.add_argument("--image_samples", type=int, default=16)
    parser.add_argument("--image_batch_size", type=int, default=4)
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--warmup_steps", type=int, default=3)
    parser.add_argument("--measure_steps", type=int, default=10)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only_base", action="store_true")
    only.add_argument("--only_awq", action="store_true")
    parser.add_argument("--text_only", action="store_true")
    parser.add_argument("--sweep_batch_sizes", default="", help='such as "8,16"')
    parser.add_argument(
        "--high_batch_sweep", default="", help='such as "512,1024", for the quantised model only'
    )
    parser.add_argument("--output_json", default="benchmark_results.json")
    parser.add_argument(
        "--size",
        default="auto",
        help="auto (4b where there is a CUDA GPU, else tiny), tiny, mid, 4b, 8b",
    )
    parser.add_argument(
        "--weights", default="auto", help="auto, hub, random, or a checkpoint folder"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
    """Measure what the flags ask for; the JSON file. Raises BadInput or MissingRequirement."""
    from colqwen_lab.measure.sweep import request, sweep
    from colqwen_lab.measure.timing import StoppingRule

    target = Path(args.output_json)
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise BadInput(f"--output_json {target}; valid: a file in a folder that can be written")
    for flag in (
        "text_samples",
        "text_batch_size",
        "image_samples",
        "image_batch_size",
        "image_size",
        "measure_steps",
    ):
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag} {getattr(args, flag)}; valid: 1 or more")
    steps = {
        "min_steps": args.measure_steps,
        "max_steps": args.measure_steps,
        "max_warmup": args.warmup_steps,
    }
    patience = StoppingRule(**steps, min_s=0, max_s=float("inf"))
    variants = ["base"] * (not args.only_awq) + ["awq"] * (not args.only_base)
    plain = not args.sweep_batch_sizes and not args.high_batch_sweep
    queries: dict[str, Any] = {"samples": args.text_samples}
    jobs: list[tuple[list[str], Any, str, dict[str, Any]]] = []
    if plain or args.sweep_batch_sizes:
        batches = batch_sizes_of(args.sweep_batch_sizes or args.text_batch_size)
        jobs.append((variants, batches, "text_queries", queries))
    if args.high_batch_sweep:
        jobs.append((["awq"], batch_sizes_of(args.high_batch_sweep), "high_batch", queries))
    if plain and not args.text_only:
        square = f"{args.image_size}x{args.image_size}"
        pages = {"workload": "pages", "pages": square, "samples": args.image_samples}
        jobs.append((variants, args.image_batch_size, "image_documents", pages))
    named: list[tuple[str, Cell]] = []
    for number, (models, batches, scenario, work) in enumerate(jobs):
        asked = request(
            models,
            batches,
            size=args.size,
            weights=args.weights,
            protocol="published",
            dtype="float16",
            **work,
            output=target.with_name(f"{target.stem}.records.jsonl"),
            fresh=number == 0,
            patience=patience,
        )
        for cell in sweep(asked):
            label = f"{SCRIPT_NAMES[cell.variant]}_{scenario}"
            named.append((label if plain else f"{label}_bs{cell.batch_size}", cell))
    cells = [cell for _, cell in named]
    environment = cells[0].environment
    metadata = {
        "device": "cuda" if environment.gpu else "cpu",
        "gpu": environment.gpu,
        "cuda_version": environment.cuda,
        "cpu": environment.cpu,
        "size": cells[0].size,
        "weights": {cell.variant: cell.weights for cell in cells},
        "memory_method": next((cell.memory.method for cell in cells if cell.memory), None),
    }
    flags = ("text_samples", "text_batch_size", "image_samples", "image_batch_size", "image_size")
    metadata |= {flag: getattr(args, flag) for flag in (*flags, "warmup_steps", "measure_steps")}
    document = script_json(named, metadata)
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return target


def main() -> None:
    try:
        print(f"Results saved to {run(arguments())}")
    except LabError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(
            "benchmark.py: interrupted; the records beside the JSON hold the rows measured so far",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
