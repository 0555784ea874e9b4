"""The report's own command line, kept working: its flags, its protocol, its JSON keys.

    uv run python benchmark.py --only_base --sweep_batch_sizes "8,16" --output_json base.json

The records with every sample go beside the JSON, as NAME.records.jsonl. As in the report, models
run in FP16.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from colqwen_lab import report_script, signals
from colqwen_lab.errors import BadInput, LabError
from colqwen_lab.options import SweepOptions, batch_sizes_of
from colqwen_lab.records import Cell
from colqwen_lab.settings import regular_file, write_file

LIKE = r'\{\s*"metadata":'  # how a document of this script begins
COUNTS = {
    "text_samples": 64,
    "text_batch_size": 8,
    "image_samples": 16,
    "image_batch_size": 4,
    "image_size": 512,
    "measure_steps": 10,
}


class Parser(argparse.ArgumentParser):
    """Reports a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"benchmark.py: {message}; --help lists the flags\n")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the report's script."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (COUNTS | {"warmup_steps": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only_base", action="store_true")
    only.add_argument("--only_awq", action="store_true")
    parser.add_argument("--text_only", action="store_true")
    parser.add_argument("--sweep_batch_sizes", default="", help='such as "8,16"')
    parser.add_argument(
        "--high_batch_sweep", default="", help='such as "512,1024", for the quantised model only'
    )
    parser.add_argument("--output_json", default="benchmark_results.json")
    parser.add_argument("--size", default="auto", help="auto, tiny, mid, 4b, 8b")
    parser.add_argument("--weights", default="auto", help="auto, hub, random, or a folder")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
    """Measure what the flags name; the JSON file. Raises BadInput or MissingRequirement."""
    # Not at the top: --help needs no torch.
    from colqwen_lab.measure.sweep import sweep
    from colqwen_lab.measure.timing import StoppingRule

    target = Path(args.output_json)
    regular_file(target, LIKE)
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise BadInput(f"--output_json must be a file in a writable folder, got {target}")
    for flag in COUNTS:
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag} must be 1 or more, got {getattr(args, flag)}")
    if args.warmup_steps < 0:
        raise BadInput(f"--warmup_steps must be 0 or more, got {args.warmup_steps}")
    stopping = StoppingRule(
        min_steps=args.measure_steps,
        max_steps=args.measure_steps,
        max_warmup=args.warmup_steps,
        min_s=0,
        max_s=float("inf"),
    )
    shared = {
        "size": args.size,
        "weights": args.weights,
        "protocol": "published",
        "dtype": "float16",
        "fresh": True,  # the document's metadata are those of this run
        "output": str(target.with_name(f"{target.stem}.records.jsonl")),
    }
    named: list[tuple[str, Cell]] = []
    for scenario, samples, options in _jobs(args):
        checked = SweepOptions.of(shared | options)
        for cell in sweep(checked, stopping=stopping, samples=samples):
            label = f"{report_script.LABELS[cell.variant]}_{scenario}"
            sweeps = args.sweep_batch_sizes or args.high_batch_sweep
            named.append((f"{label}_bs{cell.batch_size}" if sweeps else label, cell))
    document = report_script.document(named, _metadata(args, [cell for _, cell in named]))
    return write_file(target, json.dumps(document, indent=2) + "\n", LIKE)


def _jobs(args: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(scenario, samples, sweep options) of each sweep that the flags name."""
    models = ["base"] * (not args.only_awq) + ["awq"] * (not args.only_base)
    sweeps = args.sweep_batch_sizes or args.high_batch_sweep
    if args.sweep_batch_sizes or not sweeps:
        batches = batch_sizes_of(args.sweep_batch_sizes or args.text_batch_size)
        yield "text_queries", args.text_samples, {"model": models, "batch_sizes": batches}
    if args.high_batch_sweep:
        batches = batch_sizes_of(args.high_batch_sweep)
        yield "high_batch", args.text_samples, {"model": "awq", "batch_sizes": batches}
    if not sweeps and not args.text_only:
        pages = f"{args.image_size} x {args.image_size}"
        work = {"workload": "pages", "pages": pages, "batch_sizes": args.image_batch_size}
        yield "image_documents", args.image_samples, {"model": models} | work


def _metadata(args: argparse.Namespace, cells: list[Cell]) -> dict[str, Any]:
    environment = cells[0].environment
    flags = (*list(COUNTS)[:-1], "warmup_steps", "measure_steps")
    return {
        "device": "cuda" if environment.gpu else "cpu",
        "gpu": environment.gpu,
        "cuda_version": environment.cuda,
        "cpu": environment.cpu,
        "size": cells[0].size,
        "weights": {cell.variant: cell.weights for cell in cells},
        "memory_method": next((cell.memory.method for cell in cells if cell.memory), None),
    } | {flag: getattr(args, flag) for flag in flags}


def main() -> None:
    """Run the script.

    Exit codes: 0, 1 missing requirement, 2 wrong value, 130 Ctrl-C, 143 SIGTERM.
    """
    signals.listen(signals.interrupt)
    try:
        print(f"Results saved to {run(arguments())}")
    except LabError as error:
        signals.end(f"benchmark.py: {error}", error.exit_code)
    except KeyboardInterrupt:
        signals.end("benchmark.py: stopped; the records beside the JSON hold the rows")


if __name__ == "__main__":
    main()
