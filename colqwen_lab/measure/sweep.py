"""Sweeps: from options to cells on file, each appended as soon as it is measured.

A run resumes its file: what is wanted minus what is on file is what gets measured.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from colqwen_lab.errors import BadInput, LabError, MissingRequirement, shown
from colqwen_lab.hardware import Card
from colqwen_lab.measure.environment import (
    InterferenceMonitor,
    environment,
    gpu_state,
    pick_device,
    spilled,
)
from colqwen_lab.measure.memory import METHOD, VERIFIED_RUNS, batch_search
from colqwen_lab.measure.timing import (
    CLOCK,
    Failure,
    Samples,
    StoppingRule,
    TimedStep,
    time_interleaved,
)
from colqwen_lab.measure.worker import Remote, Worker, failure_of
from colqwen_lab.model.checkpoint import Checkpoint
from colqwen_lab.model.config import Variant, resolve_size, resolve_variant
from colqwen_lab.model.quantize import checkpoint_of
from colqwen_lab.options import TEXTS, WORKLOADS, SweepOptions
from colqwen_lab.records import (
    MIB,
    RESUME,
    Backend,
    CardRun,
    Cell,
    Configuration,
    Difference,
    Limits,
    Quantization,
    RecordsFile,
    Stages,
    Timing,
    Workload,
    beside,
    rate_of,
    writing,
)
from colqwen_lab.runtime.batches import Batches, Pages, query_batches
from colqwen_lab.settings import outputs_folder

Progress = Callable[[str], None]
# Interference that another measurement may not have; an attached display stays.
DISTURBED = re.compile(r"other process|clock was held down|host's memory is used")
STOPPED = {"count": "step limit", "time": "time limit"}


class Interrupted(KeyboardInterrupt):
    """A sweep that a person stopped. The message is one line."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: a notebook shows the line, not a traceback."""
        return [str(self)]


class Run:
    """One size, workload and execution on this machine, and the workers that hold its models.

    `planned` are the wanted cells before they are measured. Under a card's memory the batch size
    is searched for, and theirs is 1.
    """

    def __init__(
        self,
        options: SweepOptions,
        progress: Progress,
        stopping: StoppingRule | None = None,
        samples: int = 0,
        isolated: bool = True,
    ) -> None:
        self.options, self.progress, self.isolated = options, progress, isolated
        self.stopping = stopping or stopping_rule(options)
        self.device, self.card = pick_device(), options.memory_budget
        self.checkpoints = _checkpoints(options, self.device)
        self.environment = environment(self.device)
        self.workers: dict[Configuration, Remote | Worker] = {}
        self.failures: dict[Configuration, Failure] = {}  # of models that cannot be measured
        self.messages: set[str] = set()
        self.capped = (0, 0)
        self.batches: Callable[..., Batches] = partial(
            query_batches, texts=options.texts, samples=samples
        )
        workload = Workload(kind="queries", batch_size=1, texts=options.texts)
        if options.workload == "pages":
            pages = Pages(options.pages, options.visual_tokens)
            self.batches = partial(pages.batches, samples=samples)
            workload = Workload(
                kind="pages", batch_size=1, pages=pages.label, visual_tokens=pages.visual_tokens
            )
        self.planned = [
            self._planned(c, workload.model_copy(update={"batch_size": batch}))
            for batch in ([1] if self.card else options.batches)
            for c in _configurations(options, self.checkpoints, self.device)
        ]
        models = {_model(cell.configuration) for cell in self.planned}
        if not isolated and self.device.type == "cuda" and len(models) > 1:
            raise BadInput("several models on a GPU must be isolated, to count their memory apart")

    def _planned(self, c: Configuration, workload: Workload) -> Cell:
        checkpoint = self.checkpoints[c.variant]
        return Cell(
            origin="measured",
            variant=c.variant,
            size=checkpoint.size,
            weights=checkpoint.label,
            quantization=_quantization(checkpoint.quantization),
            workload=workload,
            execution=c.execution,
            protocol=c.protocol,
            backend=Backend(requested=c.kernel, requested_dtype=c.dtype),
            status="failed",
            environment=self.environment,
        )

    def on_file(self, rows: Iterable[Cell]) -> list[Cell]:
        """The planned cells that are among `rows`: of the same weights, workload and machine."""
        identity = self.environment.identity()
        name = self.card and self.card.name
        known = {
            _key(row): row
            for row in rows
            if row.environment.identity() == identity and (row.card and row.card.name) == name
        }
        return [known[key] for key in map(_key, self.planned) if key in known]

    def work(self, done: Iterable[Cell]) -> Iterator[Iterator[Cell]]:
        """The planned cells that are not `done`: iterators that measure a batch size each."""
        keys = set(map(_key, done))
        missing = [cell for cell in self.planned if _key(cell) not in keys]
        return self._on_card(self.card, missing) if self.card else self._loaded(missing)

    def _loaded(self, planned: Sequence[Cell]) -> Iterator[Iterator[Cell]]:
        """Load all models, then measure; those that do not fit together are measured one by one."""
        models: dict[Configuration, list[Cell]] = {}
        for cell in planned:
            models.setdefault(_model(cell.configuration), []).append(cell)
        for model, cells in models.items():
            failure = self._load(model)
            if failure and failure.status == "oom" and self.workers:
                self.progress(
                    f"the models do not fit together ({failure.reason}); each is timed alone"
                )
                for alone in models.values():
                    self.end()
                    yield from self._loaded(alone)
                return
            if failure and not failure.ended:
                self.failures[model] = failure
            if not failure:
                sizes = sorted({cell.batch_size for cell in cells})
                answer = self.workers[model].call("compile", sizes)
                if isinstance(answer, Failure):
                    self.progress(f"{model}: kernels compile at their first use ({answer.reason})")
        for batch in dict.fromkeys(cell.batch_size for cell in planned):
            yield self.measure([cell for cell in planned if cell.batch_size == batch])

    def _on_card(self, card: Card, planned: Iterable[Cell]) -> Iterator[Iterator[Cell]]:
        """Each model at the largest batch size that runs under the card's memory."""
        for cell in planned:
            c, outcomes = cell.configuration, list[tuple[int, str]]()
            for batch in batch_search(outcomes):
                failure = self._load(c)
                answer = failure or self.workers[_model(c)].call("memory", batch, c.protocol, True)
                outcomes.append((batch, answer.status if isinstance(answer, Failure) else "ok"))
                if failure or outcomes[-1][1] == "failed":
                    # The model does not load, or has a defect, which says nothing about memory.
                    self.failures[_model(c)] = answer
                    break
            cap_bytes, outside_bytes = self.capped
            workload = cell.workload.model_copy(update={"batch_size": outcomes[-1][0]})
            run = CardRun(
                name=card.name,
                nominal_bytes=card.nominal_bytes,
                cap_bytes=cap_bytes,
                outside_bytes=outside_bytes,
                method=METHOD,
                tried=dict(reversed(outcomes)),  # the first outcome of a batch size counts
                verified_runs=sum(status == "ok" for _, status in outcomes[-VERIFIED_RUNS:]),
            )
            yield self.measure([_updated(cell, workload=workload, card=run)])
            self.end()

    def measure(self, planned: Iterable[Cell]) -> Iterator[Cell]:
        """The cells of one batch size: memory first, then all that fit are timed, interleaved.

        A configuration that failed among others is timed again alone, after the others' cells.
        """
        cells = {cell.configuration: cell for cell in planned}
        before = gpu_state(self.device)
        for c, cell in cells.items():
            answer = self._load(c) or self.workers[_model(c)].call(
                "memory", cell.batch_size, c.protocol, len(self.workers) == 1
            )
            cells[c] = _updated(cell, memory=answer)
        self._prepare(cells)
        ready = [c for c in cells if not cells[c].reason]
        steps: dict[Any, TimedStep] = {c: self._step(c) for c in ready}
        if self.options.control:
            # The first model once more: an A/A control, which must come out as the same.
            first = next(iter(self.checkpoints))
            twice = [c for c in ready if c.variant == first and not c.eight_bit]
            steps |= {("control", c): self._step(c, control=True) for c in twice}
        pids = [worker.pid for worker in self.workers.values()]
        monitor = InterferenceMonitor(self.device, pids)
        samples = time_interleaved(steps, self.stopping)
        state = {"before": before, "after": gpu_state(self.device)} if before else None
        lines = monitor.lines(state)
        self._complete(cells, samples)
        failed = {c: failure for c in ready if (failure := samples[c].failure)}
        alone = [c for c, failure in failed.items() if len(steps) > 1 and not failure.ended]
        for c in [*(c for c in cells if c not in alone), *alone]:
            if c in alone:  # the others may have taken the memory, or its process
                again = {c: _updated(cells[c], reason=None)}
                self._prepare(again)
                if not again[c].reason:
                    self._complete(again, time_interleaved({c: self._step(c)}, self.stopping))
                cells |= again
            cell, worker = cells[c], self.workers.get(_model(c))
            backend = worker.call("backend") if worker and worker.alive else None
            yield _updated(
                cell,
                backend=backend if isinstance(backend, Backend) else cell.backend,
                limits=self._limits,
                gpu_state=state,
                interference=[*lines, *spilled(cell.memory, self.environment.gpu_memory_bytes)],
            )
        for c, cell in cells.items():
            if cell.status == "failed" and self.isolated:
                self.end(_model(c))  # a crashed CUDA context fails all that follows

    def end(self, model: Configuration | None = None) -> None:
        """End the worker of `model`, or all."""
        for key in [model] if model else list(self.workers):
            if worker := self.workers.pop(key, None):
                worker.end()

    def _load(self, c: Configuration) -> Failure | None:
        """Load the model of `c` into a worker, unless it is there; the failure if that fails."""
        model = _model(c)
        if model in self.failures:
            return self.failures[model]
        if model in self.workers and self.workers[model].alive:
            return None
        self.end(model)
        checkpoint = self.checkpoints[c.variant]
        try:
            kind = Remote if self.isolated else Worker
            worker = self.workers[model] = kind(checkpoint, self.device, c, self.batches)
        except OSError as error:  # the system starts no more processes
            return failure_of(error)
        answer = worker.call("cap", self.card) if self.card else None
        if not isinstance(answer, Failure):
            self.capped = answer or self.capped
            answer = worker.call("load")
        if isinstance(answer, Failure):
            self.end(model)
            return answer
        backend, unused = answer
        kernels = ", ".join(f"{kernel} x {count}" for kernel, count in backend.engaged.items())
        line = f"{c.variant} {c.execution}/{c.kernel}: {checkpoint.label}; {backend.dtype}"
        tensors = f"; unused tensors: {', '.join(unused)}" if unused else ""
        self.progress(f"{line}; text linears on {kernels}; {self.environment.device}{tensors}")
        return None

    def _prepare(self, cells: dict[Configuration, Cell]) -> None:
        """Make the batches and the steps of the cells that have not failed."""
        for model in dict.fromkeys(_model(c) for c in cells if not cells[c].reason):
            own = [c for c in cells if _model(c) == model and not cells[c].reason]
            batch, protocols = cells[own[0]].batch_size, [c.protocol for c in own]
            answer = self._load(model) or self.workers[model].call("prepare", batch, protocols)
            if isinstance(answer, Batches):
                for line in answer.messages:
                    if line not in self.messages:
                        self.progress(line)
                self.messages |= set(answer.messages)
                answer = answer.workload
            for c in own:
                cells[c] = _updated(cells[c], workload=answer)

    def _step(self, c: Configuration, control: bool = False) -> TimedStep:
        return partial(self.workers[_model(c)].call, "step", c.protocol, control)

    def _complete(self, cells: dict[Configuration, Cell], samples: dict[Any, Samples]) -> None:
        """Add the times, and what passes of their own on the same batches measure."""
        paged = self.options.workload == "pages"
        timed = [c for c in cells if c in samples and not samples[c].failure]
        for c in [c for c in cells if c in samples]:
            own, others = samples[c], [other for other in timed if other != c]
            cells[c] = _updated(cells[c], step_s=own.step_s, status=own.failure or "ok")
            if own.failure:
                continue
            stages = self.workers[_model(c)].call("stages", c.protocol) if paged else None
            cells[c] = _updated(
                cells[c],
                control_s=samples[("control", c)].step_s if ("control", c) in samples else [],
                items_per_s=rate_of(own.step_s, cells[c].batch_size),
                timing=Timing(
                    warmup_steps=len(own.warmup_s),
                    steady=own.steady,
                    stopped=own.stopped,
                    interleaved_with=list(dict.fromkeys(other.variant for other in others)),
                    interleaved_configurations=list(map(str, others)),
                    clock=CLOCK,
                ),
                difference=self._difference(c, others),
                stages=stages if isinstance(stages, Stages) else None,
            )
        for worker in self.workers.values():
            worker.call("rest")

    def _difference(self, c: Configuration, others: list[Configuration]) -> Difference | None:
        """How far the embeddings of 8-bit activations are from the same weights' 16-bit ones."""
        parents = [other for other in others if other.variant == c.variant and not other.eight_bit]
        if not c.eight_bit or not parents:
            return None
        pair = (c, parents[-1])
        both = [self.workers[_model(one)].call("embeddings", one.protocol) for one in pair]
        if any(isinstance(answer, Failure) for answer in both):
            return None
        own, theirs = map(torch.from_numpy, both)
        cosine = torch.nn.functional.cosine_similarity(own, theirs, dim=-1)
        mean, least = cosine.mean().item(), cosine.min().item()
        return Difference(against=str(parents[-1]), cosine_mean=mean, cosine_min=least)

    @cached_property
    def _limits(self) -> Limits | None:
        """What the GPU reaches in this run; not under a card's memory."""
        if self.card or self.device.type != "cuda":
            return None
        answers = [worker.call("limits") for worker in list(self.workers.values())[:1]]
        return next((answer for answer in answers if isinstance(answer, Limits)), None)


def _updated(cell: Cell, **answers: Any) -> Cell:
    """`cell` with these fields; a Failure among them becomes its status and reason."""
    fields: dict[str, Any] = {}
    for name, answer in answers.items():
        failed = isinstance(answer, Failure)
        fields |= {"status": answer.status, "reason": answer.reason} if failed else {name: answer}
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


def _configurations(
    options: SweepOptions, checkpoints: dict[str, Checkpoint], device: torch.device
) -> list[Configuration]:
    """Every variant in every configuration that its weights can run."""
    packed = {name: one.quantization is not None for name, one in checkpoints.items()}
    names = dict(zip(options.models, packed, strict=True))
    configurations = []
    for c in options.configurations(device.type):
        name, for_packed = names[c.variant], c.kernel != "fp8"
        if c.kernel not in ("auto", "torch") and for_packed not in packed.values():
            kind = "packed" if for_packed else "16-bit"
            valid = (
                "auto, torch, or fp8 in execution fast" if for_packed else "auto, w4-fp8, w4-int8"
            )
            raise BadInput(f"kernel {c.kernel} multiplies {kind} weights; valid here: {valid}")
        if not c.eight_bit or for_packed == packed[name]:
            kernel = c.kernel if packed[name] or c.eight_bit else "auto"
            configurations.append(c.model_copy(update={"variant": name, "kernel": kernel}))
    return list(dict.fromkeys(configurations))


def _model(c: Configuration) -> Configuration:
    """What identifies a loaded model: configurations that differ in the protocol alone share it."""
    return c.model_copy(update={"protocol": "lean"})


def _checkpoints(options: SweepOptions, device: torch.device) -> dict[str, Checkpoint]:
    """The checkpoint of each variant by name, in the order of the models."""
    variants = [resolve_variant(name) for name in options.models]
    if len({variant.name for variant in variants}) < len(variants):
        raise BadInput(f"model must be one or more different models, got {options.model!r}")
    if options.weights != "auto" and any(v.folder or "any" in v.hub for v in variants):
        raise BadInput("weights go with a named model; a folder or a hub id holds its own")
    size = resolve_size(options.size, device.type == "cuda")
    return {
        variant.name: _checked(
            variant, checkpoint_of(variant, size, options.weights, device), options.size
        )
        for variant in variants
    }


def _checked(variant: Variant, checkpoint: Checkpoint, size: str) -> Checkpoint:
    """`checkpoint`, if it is what the variant and the size say."""
    named = variant.folder is None and "/" not in variant.name
    if named and bool(variant.scheme) != bool(checkpoint.quantization):
        kind = "quantised" if checkpoint.quantization else "16-bit"
        raise MissingRequirement(
            f"{checkpoint.label} holds {kind} weights, which is not {variant.name}; "
            "name it as a model instead"
        )
    if size not in ("auto", checkpoint.size):
        raise BadInput(
            f"{checkpoint.label} is of size {checkpoint.size}, not {size}; use auto or that size"
        )
    return checkpoint


def _quantization(config: dict[str, Any] | None) -> Quantization | None:
    """Bits, group size and symmetry from a checkpoint's quantization_config."""
    if config is None:
        return None
    # AutoAWQ says zero_point instead of sym.
    sym = config.get("sym", not config.get("zero_point", False))
    try:
        return Quantization(bits=config["bits"], group_size=config["group_size"], sym=sym)
    except (KeyError, ValueError):
        return None


def stopping_rule(options: SweepOptions) -> StoppingRule:
    """The stopping rule of `options`, for one workload."""
    steps = options.min_steps or WORKLOADS[options.workload].min_steps
    return StoppingRule(
        min_steps=steps,
        max_steps=max(StoppingRule.max_steps, steps),
        min_s=min(StoppingRule.min_s, options.max_s),
        max_s=options.max_s,
    )


def to_keep(rows: Iterable[Cell]) -> list[Cell]:
    """The rows without those to measure again on resume: failed, or disturbed."""
    return [
        cell
        for cell in rows
        if cell.status != "failed" and not any(map(DISTURBED.search, cell.interference))
    ]


def line_of(cell: Cell, prefix: str = "") -> str:
    """One line of progress, readable in a headless log."""
    head = f"{prefix}{cell.configuration} batch {cell.batch_size}"
    if cell.items_per_s is None or cell.memory is None or cell.timing is None:
        return f"{head}: {'out of memory' if cell.status == 'oom' else cell.status}: {cell.reason}"
    stopped = STOPPED.get(cell.timing.stopped, cell.timing.stopped)
    rate = f"{cell.items_per_s.median:,.1f} {cell.workload.kind}/s"
    facts = "; ".join([f"{len(cell.step_s)} steps, {stopped}", *cell.interference])
    return f"{head}: {rate}, peak {cell.memory.peak_bytes / MIB:,.0f} MiB ({facts})"


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


def unmark(records: Path) -> None:
    """Remove the mark of an earlier sweep that ended."""
    with writing(records), suppress(FileNotFoundError, NotADirectoryError):
        beside(records, "result.json").unlink()


def finish(
    path: Path, cells: list[Cell], errors: dict[str, LabError], parts: int, spent: dict[str, float]
) -> list[Cell]:
    """`cells`, after the mark of a sweep that ended is written beside the records.

    Raises:
        LabError: the only sweep has failed.
        MissingRequirement: some sweeps of a matrix have failed.
    """
    if errors and parts == 1:
        raise next(iter(errors.values()))
    if errors:
        reasons = "; ".join(f"{name}: {error}" for name, error in errors.items())
        raise MissingRequirement(
            f"{len(errors)} of {parts} sweeps failed, the rows of the others are on file: {reasons}"
        )
    counts = {s: sum(cell.status == s for cell in cells) for s in ("ok", "oom", "failed")}
    result = {"complete": True, "records": path.name, "cells": len(cells), **counts, **spent}
    mark = beside(path, "result.json")
    temporary = mark.with_name(mark.name + ".tmp")
    with writing(mark):
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(mark)
    return cells


def spent(start: float, cells: Iterable[Cell]) -> dict[str, float]:
    """Seconds since `start`, and seconds in the timed steps of `cells`."""
    timed_s = sum(sum(cell.step_s) + sum(cell.control_s) for cell in cells)
    return {"wall_s": round(time.perf_counter() - start, 1), "timed_s": round(timed_s, 1)}


def to_stderr(line: str) -> None:
    """Print a line of progress on stderr."""
    print(shown(line), file=sys.stderr, flush=True)


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
    debugger. `samples` is the fewest items of a cell; 0 is the workload's default.

    Raises:
        BadInput: a wrong value, or a file that cannot be written.
        MissingRequirement: no weights or no kernel here, or a full disk; measured rows are on file.
        Interrupted: a person stopped it; measured rows are on file.
    """
    start, has_gpu = time.perf_counter(), pick_device().type == "cuda"
    parts = list(dict.fromkeys(options.matrix()))
    path = path_of(options, "sweep", (resolve_size(part.size, has_gpu) for part in parts))
    runs: dict[str, Run] = {}
    errors: dict[str, LabError] = {}
    done, new = 0, list[Cell]()
    results: list[Cell] = []

    try:
        for part in parts:
            try:
                runs[title(part)] = Run(part, progress, stopping, samples, isolated)
            except LabError as error:
                errors[title(part)] = error
        if not runs:
            return finish(path, [], errors, len(parts), {})
        with RecordsFile(path, Cell, progress=progress) as file:
            unmark(path)
            for name, run in runs.items():
                kept = [] if options.fresh else run.on_file(to_keep(file.rows))
                done += len(kept)
                for cell in kept:
                    progress(line_of(cell, "on file: "))
                try:
                    for cells in run.work(kept):
                        for cell in cells:
                            file.append([cell])
                            new.append(cell)
                            progress(line_of(cell))
                except LabError as error:
                    errors[name] = error
                run.end()
                results += run.on_file(file.rows)
            times = spent(start, new)
            progress(f"took {times['wall_s']} s, of which {times['timed_s']} s in timed steps")
            return finish(path, results, errors, len(parts), times)
    except OSError as error:
        raise MissingRequirement(f"the sweep ended: {error}; {RESUME}") from None
    except KeyboardInterrupt:
        count = f"{done + len(new)} of {sum(len(run.planned) for run in runs.values())}"
        raise Interrupted(f"stopped; {count} cells on file, run again to resume") from None
    finally:
        for run in runs.values():
            run.end()
