"""Sweeps of the tiny network in moments, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from colqwen_lab.measure.sweep import sweep
from colqwen_lab.measure.timing import StoppingRule
from colqwen_lab.options import SweepOptions
from colqwen_lab.records import Cell

QUICK = StoppingRule(min_steps=2, max_steps=2, min_s=0, max_s=0, max_warmup=1)


def options_of(
    path: Path | str, model: str = "base", batches: Any = "1,2,4", **options: Any
) -> Any:
    """Checked options of a sweep of random weights at size tiny into `path`."""
    values = {"model": model, "batch_sizes": batches, "output": str(path), "size": "tiny"}
    return SweepOptions.of(values | {"weights": "random"} | options)


def run(
    path: Path,
    model: str = "base",
    batches: Any = "1,2,4",
    *,
    progress: Callable[[str], Any] = str,
    stopping: StoppingRule = QUICK,
    isolated: bool = False,
    **options: Any,
) -> list[Cell]:
    """The cells of a quick sweep; in one process unless `isolated`."""
    checked = options_of(path, model, batches, **options)
    return sweep(checked, progress, stopping=stopping, isolated=isolated)
