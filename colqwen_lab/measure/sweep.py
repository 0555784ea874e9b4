"""Sweeps: from options to cells on file, each appended as soon as it is measured.

A run resumes its file: what is wanted minus what is on file is what gets measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from colqwen_lab import records, signals
from colqwen_lab.errors import LabError, MissingRequirement
from colqwen_lab.hardware import Card
from colqwen_lab.measure.environment import (
    environment,
    idle_watts,
    interference,
    pick_device,
    spilled,
    watch,
)
from colqwen_lab.measure.memory import METHOD, VERIFIED_RUNS, batch_search
from colqwen_lab.measure.planned import checkpoints_of, configurations_of, planned_cell
from colqwen_lab.measure.sweep_file import (
    Interrupted,
    Progress,
    failure,
    line_of,
    opened,
    path_of,
    stopped,
    title,
    to_stderr,
)
from colqwen_lab.measure.timing import CLOCK, Failure, Samples, StoppingRule, time_interleaved
from colqwen_lab.measure.worker import Remote, Worker, failure_of
from colqwen_lab.model.config import resolve_size
from colqwen_lab.options import TEXTS, WORKLOADS, SweepOptions
from colqwen_lab.records import RESUME, Cell, Configuration
from colqwen_lab.runtime.batches import Batches, Pages, query_batches

MOST_S = 1e8  # a record holds no infinity
# Synthetic pages on disk, where pages are timed from disk to disk.
GPU_FILES, CPU_FILES = 256, 16


def sweep(
    options: SweepOptions,
    progress: Progress = to_stderr,
    *,
    stopping: StoppingRule | None = None,
    samples: int = 0,
    isolated: bool = True,
) -> list[Cell]:
    """The cells of `options`, measured on this machine's device; what is on file already is kept.

    The sizes, workloads and executions of a matrix run one after the other; one that cannot run
    leaves the others. Models are `isolated` in processes of their own, or run in this one, for a
    debugger (on a GPU: one model). `samples` is the fewest items of a cell; 0 is the default.

    Raises BadInput for a wrong value or a file that cannot be written, MissingRequirement without
    weights or a kernel or when the disk is full, Interrupted when a person stops it. Measured rows
    are on file.
    """
    start, cuda = time.perf_counter(), pick_device().type == "cuda"
    parts = {title(part): part for part in options.matrix()}
    path = path_of(options, "sweep", (resolve_size(part.size, cuda) for part in parts.values()))
    runs, errors = dict[str, Run](), dict[str, LabError]()
    kept, new = dict[str, list[Cell]](), list[Cell]()
    try:
        for name, part in parts.items():
            try:
                runs[name] = Run(part, progress, stopping, samples, isolated)
            except LabError as error:
                errors[name] = error
        if not runs:
            raise failure(errors, len(parts))
        with opened(path, options, progress, start) as file:
            rows, new = file.kept(), file.new
            kept = {name: run.kept(rows) for name, run in runs.items()}
            for name, run in runs.items():
                for cell in kept[name]:
                    progress(line_of(cell, "on file: "))
                try:
                    for planned in run.batches(kept[name]):
                        for cell in run.measure(planned):
                            file.add(cell)
                            progress(line_of(cell))
                except LabError as error:
                    errors[name] = error
                run.end()
            cells = [cell for run in runs.values() for cell in run.on_file(file.records.rows)]
            return file.finish(cells, errors, len(parts))
    except OSError as error:
        raise MissingRequirement(f"the sweep ended: {error}; {RESUME}") from None
    except KeyboardInterrupt:
        if not kept:
            raise Interrupted("stopped before the first cell") from None
        done = sum(map(len, kept.values())) + len(new)
        planned_cells = sum(len(run.planned) for run in runs.values())
        raise stopped(f"{done} of {planned_cells}", options) from None
    finally:
        with signals.deferred():
            for run in runs.values():
                run.close()


@dataclass
class Run:
    """One size, workload and execution on this machine, and the workers that hold its models.

    `planned` are the wanted cells before they are measured. Under a card's memory the batch size
    is searched for, and theirs is 1.
    """

    options: SweepOptions
    progress: Progress
    stopping: StoppingRule | None = None
    samples: int = 0
    isolated: bool = True

    def __post_init__(self) -> None:
        options, self.device = self.options, pick_device()
        self.card, self.cap = options.memory_budget, (0, 0)
        self.environment = here = environment(self.device)
        self.progress_once = cache(self.progress)
        steps = options.min_steps or WORKLOADS[options.workload].min_steps
        self.stopping = self.stopping or StoppingRule(
            min_steps=steps,
            max_steps=max(StoppingRule.max_steps, steps),
            min_s=min(StoppingRule.min_s, options.max_s),
            max_s=options.max_s,
        )
        rule = self.stopping
        self.asked: dict[str, Any] = {"min_steps": rule.min_steps, "max_s": min(rule.max_s, MOST_S)}
        self.workers: dict[Configuration, Remote | Worker] = {}
        self.loading: set[Configuration] = set()  # workers that have not answered yet
        self.failures: dict[Configuration, Failure] = {}  # of models that do not load
        self.folder: TemporaryDirectory[str] | None = None
        self.idle_w = 0.0
        make: Callable[..., Batches] = partial(query_batches, texts=options.texts)
        work: dict[str, Any] = {"kind": options.workload, "texts": options.texts}
        if options.workload == "pages":
            pages = Pages(options.pages, options.visual_tokens)
            make = pages.batches
            work = {"kind": "pages", "pages": pages.label, "visual_tokens": pages.visual_tokens}
            self.on_disk = pages.on_disk
        self.make_batches = partial(make, samples=self.samples)
        self.checkpoints = checkpoints_of(options, self.device)
        configurations = configurations_of(options, self.checkpoints, self.device)
        self.planned = [
            planned_cell(c, self.checkpoints[c.variant], {"batch_size": batch} | work, here)
            for batch in ([1] if self.card else options.batches)
            for c in configurations
        ]

    def on_file(self, rows: Iterable[Cell]) -> list[Cell]:
        """The rows of planned cells, in their order: the same weights, workload and machine."""
        here = (self.environment.identity(), self.card and self.card.name)
        known = {
            _key(row): row
            for row in rows
            if (row.environment.identity(), row.card and row.card.name) == here
        }
        return [known[key] for key in map(_key, self.planned) if key in known]

    def kept(self, rows: Iterable[Cell]) -> list[Cell]:
        """The planned cells among `rows` that were timed as this run asks."""
        return [cell for cell in self.on_file(rows) if not cell.timing or self._as_asked(cell)]

    def _as_asked(self, cell: Cell) -> bool:
        if not cell.control_s and self._controlled(cell.configuration):
            return False
        return self.asked.items() <= dict(cell.timing or ()).items()

    def _controlled(self, c: Configuration) -> bool:
        """Whether `c` is timed once more: an A/A control, which must come out as the same."""
        first = next(iter(self.checkpoints))
        return self.options.control and c.variant == first and not c.eight_bit

    def batches(self, done: Iterable[Cell]) -> Iterator[list[Cell]]:
        """The planned cells that are not `done`, those to `measure` together at a time.

        All models are loaded first; those that do not fit together are measured one by one.
        """
        keys = set(map(_key, done))
        cells = [cell for cell in self.planned if _key(cell) not in keys]
        if self.card:
            yield from ([self._largest(cell, self.card)] for cell in cells)
            return
        models = list(dict.fromkeys(_model(cell.configuration) for cell in cells))
        if models:
            self.idle_w = idle_watts(self.device)
        if self.isolated:
            self._load(models)
        groups = [models]
        for model in models:
            failure = self._worker(model)
            if isinstance(failure, Failure) and failure.status == "oom" and self.workers:
                why = f"the models do not fit together ({failure.reason})"
                self.progress(f"{why}; each is timed alone")
                self.failures.clear()
                groups = [[model] for model in models]
                break
        for group in groups:
            if group is not models:
                self.end()
            own = [cell for cell in cells if _model(cell.configuration) in group]
            for batch in dict.fromkeys(cell.batch_size for cell in own):
                self.progress(f"measuring batch {batch}")
                yield [cell for cell in own if cell.batch_size == batch]

    def _largest(self, cell: Cell, card: Card) -> Cell:
        """`cell` at the largest batch size that runs under the card's memory."""
        self.end()
        self.progress(f"searching the largest batch of {cell.configuration} on {card.name}")
        c, outcomes = cell.configuration, list[tuple[int, str]]()
        for batch in batch_search(outcomes):
            answer = self._worker(c).call("measure", batch, c.protocol, True)
            outcomes.append((batch, answer.status if isinstance(answer, Failure) else "ok"))
            if outcomes[-1][1] == "failed":  # a defect says nothing about memory
                self.failures[_model(c)] = answer
                break
        run = records.CardRun(
            name=card.name,
            nominal_bytes=card.nominal_bytes,
            cap_bytes=self.cap[0],
            outside_bytes=self.cap[1],
            method=METHOD,
            tried=dict(reversed(outcomes)),  # the first outcome of a batch size counts
            verified_runs=sum(status == "ok" for _, status in outcomes[-VERIFIED_RUNS:]),
        )
        workload = cell.workload.model_copy(update={"batch_size": outcomes[-1][0]})
        return cell.model_copy(update={"workload": workload, "card": run})

    def measure(self, planned: Iterable[Cell]) -> Iterator[Cell]:
        """The cells of one batch size: memory first, then all that fit are timed, interleaved.

        A configuration that failed among others is timed again alone, after the others' cells.
        """
        cells = {cell.configuration: cell for cell in planned}
        rounds = [list(cells)]
        for together in rounds:
            for c in together:
                worker, batch = self._worker(c), cells[c].batch_size
                answer = worker.call("measure", batch, c.protocol, len(self.workers) == 1)
                if not isinstance(answer, Failure):
                    memory, batches = answer
                    list(map(self.progress_once, batches.messages))
                    answer = {"memory": memory, "workload": batches.workload}
                cells[c] = _updated(cells[c], answer)
            keys = [(c, False) for c in together if not cells[c].reason]
            if together is rounds[0]:
                keys += [(c, True) for c, _ in keys if self._controlled(c)]
            steps = {
                (c, control): partial(self._worker(c).call, "step", c.protocol, control)
                for c, control in keys
            }
            watched = watch(self.device, [worker.pid for worker in self.workers.values()])
            shapes = next((cells[c].workload.shapes for c, _ in keys), [])
            samples = time_interleaved(steps, self.stopping, shapes or [0])
            lines, states = interference(watched)
            backends = {model: worker.call("rest") for model, worker in self.workers.items()}
            for c in together:
                failure = samples[c, False].failure if (c, False) in steps else None
                if failure and len(steps) > 1 and not failure.ended:
                    rounds.append([c])  # the others may have taken the memory, or the process
                    continue
                times = {} if cells[c].reason else self._times(cells[c], samples)
                cells[c] = _updated(
                    _updated(cells[c], times),
                    {
                        "backend": backends.get(_model(c), cells[c].backend),
                        "limits": self._limits,
                        "gpu_state": states,
                        "interference": lines + spilled(cells[c].memory, self.environment),
                    },
                )
                yield cells[c]
        for c, cell in cells.items():
            if cell.status == "failed" and self.isolated:
                self.end(_model(c))  # a crashed CUDA context fails all that follows

    def end(self, model: Configuration | None = None) -> None:
        """End the worker of `model`, or all."""
        for key in [model] if model else list(self.workers):
            self.loading.discard(key)
            if worker := self.workers.pop(key, None):
                worker.end()

    def close(self) -> None:
        """End all workers, and remove the files of synthetic pages."""
        self.end()
        if self.folder:
            self.folder.cleanup()

    def _load(self, models: Iterable[Configuration]) -> None:
        """Load the models at the same time."""
        for model in models:
            self._start(model)
        for model in models:
            self._worker(model)
        # To load takes more memory than a model: what found too little is loaded again, alone.
        self.failures = {c: one for c, one in self.failures.items() if one.status != "oom"}

    def _start(self, c: Configuration) -> Remote | Worker | Failure:
        """A worker that is loading the model of `c`."""
        model = _model(c)
        self.end(model)
        self.progress(f"loading {c.variant} {c.execution}/{c.kernel}")
        try:
            kind = Remote if self.isolated else Worker
            worker = kind(self.checkpoints[c.variant], self.device, c, self.make_batches)
        except OSError as error:  # the system starts no more processes
            return failure_of(error)
        self.workers[model] = worker
        self.loading.add(model)
        worker.ask("load", self.card, sorted({cell.batch_size for cell in self.planned}))
        return worker

    def _worker(self, c: Configuration) -> Remote | Worker | Failure:
        """The worker that has the model of `c` loaded; where that fails, the failure answers."""
        model = _model(c)
        if model in self.failures:
            return self.failures[model]
        known = self.workers.get(model)
        worker = known if known and known.alive else self._start(model)
        if isinstance(worker, Failure) or model not in self.loading:
            return worker
        self.loading.remove(model)
        answer = worker.answer()
        if isinstance(answer, Failure):
            self.end(model)
            if not answer.ended:
                self.failures[model] = answer
            return answer
        self.cap, backend, unused = answer
        kernels = ", ".join(f"{kernel} x {count}" for kernel, count in backend.engaged.items())
        label = self.checkpoints[c.variant].label
        line = f"{c.variant} {c.execution}/{c.kernel}: {label}; {backend.dtype}"
        tensors = f"; unused tensors: {', '.join(unused)}" if unused else ""
        self.progress(f"{line}; text linears on {kernels}; {self.environment.device}{tensors}")
        return worker

    def _times(
        self, cell: Cell, samples: dict[tuple[Configuration, bool], Samples]
    ) -> dict[str, Any] | Failure:
        """The times of `cell`, and what passes of their own on the same batches measure."""
        c, work = cell.configuration, cell.workload
        own, control = samples[c, False], samples.get((c, True), Samples())
        if own.failure:
            return own.failure
        timed = [other for (other, twice), one in samples.items() if not (twice or one.failure)]
        others = [other for other in timed if other != c]
        parents = [other for other in others if other.variant == c.variant and not other.eight_bit]
        paged = self.options.workload == "pages"
        return {
            "status": "ok",
            "step_s": own.step_s,
            "control_s": control.step_s,
            "items_per_s": records.rate_of(own.step_s, work.batch_size, work.shapes),
            "timing": records.Timing(
                warmup_steps=len(own.warmup_s),
                steady=own.steady,
                stopped=own.stopped,
                interleaved_with=list(dict.fromkeys(other.variant for other in others)),
                interleaved_configurations=list(map(str, others)),
                clock=CLOCK,
                **self.asked,
            ),
            "stages": self._worker(c).call("stages", c.protocol) if paged else None,
            "energy": self._worker(c).call("energy", c.protocol, self.idle_w),
            "loading": self._worker(c).call("loading"),
            "difference": self._difference(c, parents[-1]) if c.eight_bit and parents else None,
            "end_to_end": self._end_to_end(c, work) if paged else [],  # last: it may end the worker
        }

    def _end_to_end(self, c: Configuration, work: records.Workload) -> list[records.EndToEnd]:
        """The pages from disk to disk; none where that fails, which costs the cell nothing else."""
        if not (loaders := self.options.loaders):
            return []
        try:
            question = (self._files, work.visual_tokens, c.protocol, loaders)
            runs = self._worker(c).call("end_to_end", *question)
        except (LabError, OSError) as error:  # such as a full disk
            runs = Failure("failed", str(error))
        if isinstance(runs, Failure):
            self.progress(f"{c}, from disk to disk: {runs.reason}")
            return []
        return runs

    def _difference(self, c: Configuration, parent: Configuration) -> records.Difference | None:
        """How far the embeddings of 8-bit activations are from the same weights' 16-bit ones."""
        both = [self._worker(one).call("embeddings", one.protocol) for one in (c, parent)]
        if any(isinstance(answer, Failure) for answer in both):
            return None
        own, theirs = map(torch.from_numpy, both)
        cosine = cosine_similarity(own, theirs, dim=-1)
        mean, least = cosine.mean().item(), cosine.min().item()
        return records.Difference(against=str(parent), cosine_mean=mean, cosine_min=least)

    @cached_property
    def _files(self) -> list[Path]:
        """The files of the pages; synthetic ones are written for this run."""
        self.folder = TemporaryDirectory(prefix="lab-pages-")
        count = GPU_FILES if self.device.type == "cuda" else CPU_FILES
        return self.on_disk(Path(self.folder.name), count)

    @cached_property
    def _limits(self) -> records.Limits | Failure | None:
        """What the GPU reaches in this run; not under a card's memory."""
        if self.device.type != "cuda" or self.card or not self.workers:
            return None
        return next(iter(self.workers.values())).call("limits")


def _updated(cell: Cell, answer: dict[str, Any] | Failure) -> Cell:
    """`cell` with these fields, or failed; fields that could not be measured stay."""
    if isinstance(answer, Failure):
        answer = {"status": answer.status, "reason": answer.reason}
    fields = {name: value for name, value in answer.items() if not isinstance(value, Failure)}
    return cell.model_copy(update=fields)


def _key(cell: Cell) -> tuple[str, ...]:
    """The key of a cell as it was planned.

    Under a card's memory any batch size will do. Without a tokenizer the report's queries are
    random ids, and the row says so.
    """
    work = cell.workload
    texts = work.texts if work.texts in (None, *TEXTS) else "report"
    batch = 1 if cell.card else work.batch_size
    planned = work.model_copy(update={"texts": texts, "batch_size": batch})
    return cell.model_copy(update={"workload": planned, "card": None}).key()


def _model(c: Configuration) -> Configuration:
    """What identifies a loaded model: configurations that differ in the protocol alone share it."""
    return c.model_copy(update={"protocol": "lean"})
