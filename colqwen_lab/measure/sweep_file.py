"""The records file of a sweep, here or over a cluster: its name, its mark, its progress lines."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from colqwen_lab import signals
from colqwen_lab.errors import LabError, MissingRequirement, shown
from colqwen_lab.model.config import resolve_variant
from colqwen_lab.options import SweepOptions
from colqwen_lab.records import MIB, RESUME, Cell, RecordsFile
from colqwen_lab.settings import outputs_folder, regular_file, write_file, writing

Progress = Callable[[str], None]
MARK = r'\{\s*"complete":'  # how the mark of a sweep that ended begins
STOPPED = {"count": "step limit", "time": "time limit"}


class Interrupted(KeyboardInterrupt):
    """A sweep that a person stopped. The message is one line."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: a notebook shows the line, not a traceback."""
        return [str(self)]


def stopped(cells: str, options: SweepOptions) -> Interrupted:
    """A sweep stopped after so many cells, and how to resume it."""
    again = "run again without fresh to resume" if options.fresh else "run again to resume"
    return Interrupted(f"stopped; {cells} cells on file, {again}")


def to_stderr(line: str) -> None:
    """Print a line of progress on stderr."""
    with suppress(OSError):  # a full or closed stderr does not end a sweep
        print(shown(line), file=sys.stderr, flush=True)


def title(part: SweepOptions) -> str:
    """Size, workload and configurations of one sweep of a matrix."""
    label = part.configuration or f"{part.execution}/{part.protocol}/{part.kernel}"
    return f"{part.size} {part.workload} {label}"


def path_of(options: SweepOptions, kind: str, sizes: Iterable[str]) -> Path:
    """The records file: `output`, or one under `outputs/` named by models, sizes, workloads."""
    if options.output:
        return Path(options.output)
    models = (resolve_variant(name).name.replace("/", "-") for name in options.models)
    parts = [kind, *models, *dict.fromkeys(sizes), *options.workload.split(",")]
    return outputs_folder() / f"{'-'.join(parts)}.jsonl"


def line_of(cell: Cell, prefix: str = "") -> str:
    """One line of progress, readable in a headless log."""
    head = f"{prefix}{cell.configuration} batch {cell.batch_size}"
    if cell.items_per_s is None or cell.memory is None or cell.timing is None:
        return f"{head}: {'out of memory' if cell.status == 'oom' else cell.status}: {cell.reason}"
    why = STOPPED.get(cell.timing.stopped, cell.timing.stopped)
    rate = f"{cell.items_per_s.median:,.1f} {cell.workload.kind}/s"
    facts = "; ".join([f"{len(cell.step_s)} steps, {why}", *cell.interference])
    return f"{head}: {rate}, peak {cell.memory.peak_bytes / MIB:,.0f} MiB ({facts})"


def failure(errors: dict[str, LabError], parts: int) -> LabError:
    """The error of the only sweep, or one that names each that failed of a matrix of `parts`."""
    if parts == 1:
        return next(iter(errors.values()))
    reasons = "; ".join(f"{name}: {error}" for name, error in errors.items())
    failed = f"{len(errors)} of {parts} sweeps failed, the rows of the others are on file"
    return MissingRequirement(f"{failed}: {reasons}")


@dataclass
class SweepFile:
    """The records file of a running sweep. `new` are the cells measured since it was opened."""

    records: RecordsFile[Cell]
    mark: Path
    options: SweepOptions
    progress: Progress
    start: float
    new: list[Cell] = field(default_factory=list)

    def kept(self) -> list[Cell]:
        """The rows on file that count: none if `fresh`, and none that failed or was disturbed."""
        rows = [] if self.options.fresh else self.records.rows
        return [cell for cell in rows if cell.status != "failed" and not cell.disturbed]

    def add(self, cell: Cell) -> None:
        """Put a measured cell on disk."""
        with signals.deferred():
            self.records.append([cell])
            self.new.append(cell)

    def finish(self, cells: list[Cell], errors: dict[str, LabError], parts: int) -> list[Cell]:
        """`cells`, after the mark of a sweep that ended is written beside the records.

        Raises the `failure` of `errors`, and MissingRequirement if cells are no longer on file.
        """
        wall_s = round(time.perf_counter() - self.start, 1)
        timed_s = round(sum(sum(cell.step_s) + sum(cell.control_s) for cell in self.new), 1)
        if self.new or not errors:
            self.progress(f"took {wall_s} s, of which {timed_s} s in timed steps")
        if errors:
            raise failure(errors, parts)
        path, counts = self.records.path, Counter(cell.status for cell in cells)
        if lost := self.records.lost(cells):
            raise MissingRequirement(
                f"{lost} of {len(cells)} cells are no longer in {path}; run the same command again"
            )
        result = {"complete": True, "records": path.name, "cells": len(cells)}
        result |= {status: counts[status] for status in ("ok", "oom", "failed")}
        result |= {"wall_s": wall_s, "timed_s": timed_s}
        write_file(self.mark, json.dumps(result, indent=1) + "\n", MARK)
        return cells


@contextmanager
def opened(
    path: Path, options: SweepOptions, progress: Progress, start: float
) -> Iterator[SweepFile]:
    """The records file of a sweep that began at `start`, without the mark of an earlier one."""
    with RecordsFile(path, Cell, progress=progress) as file:
        mark = Path(f"{str(file.path).removesuffix('.jsonl')}.result.json")
        with writing(path, MissingRequirement, RESUME):
            regular_file(mark, MARK).unlink(missing_ok=True)
        yield SweepFile(file, mark, options, progress, start)
