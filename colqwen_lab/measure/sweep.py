"""Sweeps: from options to cells on file, each appended as soon as it is measured.

A run resumes its file: what is wanted minus what is on file is what gets measured.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from colqwen_lab.errors import BadInput, LabError, MissingRequirement, shown
from colqwen_lab.measure.environment import (
    InterferenceMonitor,
    environment,
    gpu_state,
    pick_device,
    spilled,
)
from colqwen_lab.measure.memory import METHOD, BatchSearch
from colqwen_lab.measure.timing import (
    CLOCK,
    Failure,
    Samples,
    StoppingRule,
    TimedStep,
    time_interleaved,
)
from colqwen_lab.measure.worker import Remote, Setup, Worker, failure_of
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
    Timing,
    Workload,
    beside,
    rate_of,
    writing,
)
from colqwen_lab.runtime.batches import Pages, query_batches
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


@dataclass
class Draft:
    """The fields of a cell as they are measured, and the failure that ended it."""

    configuration: Configuration
    fields: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None

    def take(self, name: str, answer: Any) -> None:
        """Set a field, or the failure in its place."""
        if isinstance(answer, Failure):
            self.failure = answer
        else:
            self.fields[name] = answer


class Run:
    """One size, workload and execution on this machine, and the workers that hold its models."""

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
        self.device = pick_device()
        self.checkpoints = _checkpoints(options, self.device)
        self.pages = (
            Pages(options.pages, options.visual_tokens) if options.workload == "pages" else None
        )
        self.batches = (
            partial(self.pages.batches, samples=samples)
            if self.pages
            else partial(query_batches, texts=options.texts, samples=samples)
        )
        self.card = options.memory_budget
        # Under a card's memory the batch size is searched for; 0 stands for it.
        batch_sizes = (0,) if self.card else options.batches
        self.configurations = self._configurations()
        self.wanted = [(c, batch) for batch in batch_sizes for c in self.configurations]
        self.environment = environment(self.device)
        models = set(map(_model, self.configurations))
        if not isolated and self.device.type == "cuda" and len(models) > 1:
            raise BadInput("several models on a GPU must be isolated, to count their memory apart")
        self.workers: dict[Configuration, Remote | Worker] = {}
        self.backends: dict[Configuration, Backend] = {}
        self.failures: dict[Configuration, Failure] = {}  # of models that cannot be measured
        self.capped = (0, 0)
        self.shown: set[str] = set()

    def _configurations(self) -> list[Configuration]:
        """Every variant in every configuration that its weights can run."""
        packed = {name: c.quantization is not None for name, c in self.checkpoints.items()}
        names = dict(zip(self.options.models, packed, strict=True))
        configurations = []
        for c in self.options.configurations(self.device.type):
            for_packed = c.kernel != "fp8"
            if c.kernel not in ("auto", "torch") and for_packed not in packed.values():
                kind, others = ("packed", "auto, torch, or fp8 in execution fast")
                if not for_packed:
                    kind, others = ("16-bit", "auto, w4-fp8 or w4-int8")
                raise BadInput(f"kernel {c.kernel!r} multiplies {kind} weights; use {others}")
            name = names[c.variant]
            if c.eight_bit and for_packed != packed[name]:
                continue
            kernel = c.kernel if packed[name] or c.eight_bit else "auto"
            configurations.append(c.model_copy(update={"variant": name, "kernel": kernel}))
        return list(dict.fromkeys(configurations))

    def on_file(self, rows: Iterable[Cell]) -> dict[tuple[Configuration, int], Cell]:
        """The wanted cells among `rows`: measured here, of the same weights and workload."""
        plain, card, identity = self._workload(1), self.card, self.environment.identity()
        cells = {}
        for cell in rows:
            work, checkpoint = cell.workload, self.checkpoints.get(cell.variant)
            # Without a tokenizer the report's queries are random ids, and the row says so.
            texts = work.texts if work.texts in TEXTS or not work.texts else "report"
            if (
                checkpoint
                and (cell.origin, cell.environment.identity()) == ("measured", identity)
                and (cell.size, cell.weights) == (checkpoint.size, checkpoint.label)
                and (work.budget, work.pages, texts) == (plain.budget, plain.pages, plain.texts)
                and (cell.card and cell.card.name) == (card and card.name)
            ):
                cells[cell.configuration, 0 if card else cell.batch_size] = cell
        return {pair: cells[pair] for pair in self.wanted if pair in cells}

    def work(self, missing: Sequence[tuple[Configuration, int]]) -> Iterator[Iterator[Cell]]:
        """The cells to measure, an iterator for each batch size; models are loaded before.

        Models that do not fit together are measured alone, one after the other.
        """
        for c, _ in missing if self.card else ():
            search = BatchSearch()
            while batch := search.next():
                failure = self._load(c)
                answer = failure or self.workers[_model(c)].ask("memory", batch, c.protocol, True)
                search.note(batch, answer.status if isinstance(answer, Failure) else "ok")
                if isinstance(answer, Failure) and (failure or answer.status == "failed"):
                    # The model does not load, or has a defect, which says nothing about memory.
                    self.failures[_model(c)] = answer
                    break
            yield self.measure([c], search.batch or 1, search)
            self.end()
        if self.card:
            return
        batches: dict[Configuration, list[int]] = {}
        for c, batch in missing:
            batches.setdefault(_model(c), []).append(batch)
        for model, sizes in batches.items():
            failure = self._load(model)
            if failure and failure.status == "oom" and self.workers:
                self.progress(
                    f"the models do not fit together ({failure.reason}); each is timed alone"
                )
                for one in batches:
                    self.end()
                    yield from self.work([pair for pair in missing if _model(pair[0]) == one])
                return
            if failure and not failure.ended:
                self.failures[model] = failure
            if not failure:
                answer = self.workers[model].ask("compile", sorted(set(sizes)))
                if isinstance(answer, Failure):
                    self.progress(f"{model}: kernels compile at their first use ({answer.reason})")
        for batch in dict.fromkeys(batch for _, batch in missing):
            yield self.measure([c for c, size in missing if size == batch], batch)

    def measure(
        self, configurations: list[Configuration], batch: int, search: BatchSearch | None = None
    ) -> Iterator[Cell]:
        """The cells of one batch size: memory first, then all that fit are timed, interleaved.

        A configuration that failed beside others is timed again alone, after the others' cells.
        """
        before = gpu_state(self.device)
        drafts = [Draft(c, {"workload": self._workload(batch)}) for c in configurations]
        for draft in drafts:
            c = draft.configuration
            answer = self._load(c) or self.workers[_model(c)].ask(
                "memory", batch, c.protocol, len(self.workers) == 1
            )
            draft.take("memory", answer)
        self._prepare([draft for draft in drafts if not draft.failure], batch)
        ready = [draft for draft in drafts if not draft.failure]
        steps: dict[Any, TimedStep] = {d.configuration: self._step(d) for d in ready}
        first = next(iter(self.checkpoints))
        if self.options.control:
            # The first model once more: an A/A control, which must come out as the same.
            controls = [d for d in ready if d.configuration.variant == first]
            steps |= {
                ("control", d.configuration): self._step(d, control=True)
                for d in controls
                if not d.configuration.eight_bit
            }
        pids = [worker.pid for worker in self.workers.values()]
        monitor = InterferenceMonitor(self.device, pids)
        samples = time_interleaved(steps, self.stopping)
        state = before and {"before": before, "after": gpu_state(self.device) or {}}
        shared = {"gpu_state": state, "card": search and self._card_run(search)}
        interference = monitor.lines(state)
        self._complete(ready, samples)
        alone = [d for d in ready if d.failure and not d.failure.ended and len(samples) > 1]
        for draft in [*(d for d in drafts if d not in alone), *alone]:
            if draft in alone:  # the others may have taken the memory, or its process
                draft.failure = self._load(draft.configuration)
                self._prepare([draft] if not draft.failure else [], batch)
                if not draft.failure:
                    samples = time_interleaved(
                        {draft.configuration: self._step(draft)}, self.stopping
                    )
                    self._complete([draft], samples)
            cell = self._cell(draft, interference, shared)
            yield cell
        for draft in drafts:
            if draft.failure and draft.failure.status == "failed" and self.isolated:
                self.end(
                    _model(draft.configuration)
                )  # a crashed CUDA context fails all that follows

    def end(self, model: Configuration | None = None) -> None:
        """End the worker of `model`, or all."""
        for one in [model] if model else list(self.workers):
            if worker := self.workers.pop(one, None):
                worker.end()

    # ------------------------------------------------------------ parts

    def _load(self, c: Configuration) -> Failure | None:
        """Load the model of `c` into a worker, unless it is there; the failure if it does not load."""
        model, options = _model(c), self.options
        if model in self.failures:
            return self.failures[model]
        if model in self.workers and self.workers[model].alive:
            return None
        self.end(model)
        checkpoint = self.checkpoints[c.variant]
        setup = Setup(checkpoint, self.device, c.execution, c.kernel, options.dtype, self.batches)
        try:
            worker = (Remote if self.isolated else Worker)(setup)
        except OSError as error:  # the system starts no more processes
            return failure_of(error)
        try:
            if self.card:
                self.capped = worker.ask("cap", self.card)
            answer = worker.ask("load")
        except BaseException:
            worker.end()
            raise
        if isinstance(answer, Failure):
            worker.end()
            return answer
        self.workers[model] = worker
        weights, unused, backend = answer
        self.backends[model] = backend
        kernels = ", ".join(f"{kernel} x {count}" for kernel, count in backend.engaged.items())
        line = f"{c}: {weights}; {backend.dtype}; text linears on {kernels}"
        tensors = f"; unused tensors: {', '.join(unused)}" if unused else ""
        self.progress(f"{line}; {self.environment.device}{tensors}")
        return None

    def _prepare(self, drafts: list[Draft], batch: int) -> None:
        """Make the batches and the steps of `drafts` in their workers."""
        for model in dict.fromkeys(_model(draft.configuration) for draft in drafts):
            own = [draft for draft in drafts if _model(draft.configuration) == model]
            wanted = [(d.configuration.protocol, control) for d in own for control in (False, True)]
            answer = self.workers[model].ask("prepare", batch, wanted)
            workload, messages = (answer, ()) if isinstance(answer, Failure) else answer
            for draft in own:
                draft.take("workload", workload)
            for line in messages:
                if line not in self.shown:
                    self.progress(line)
            self.shown |= set(messages)

    def _step(self, draft: Draft, control: bool = False) -> TimedStep:
        c = draft.configuration
        return partial(self.workers[_model(c)].ask, "step", c.protocol, control)

    def _complete(self, drafts: list[Draft], samples: dict[Any, Samples]) -> None:
        """Add to `drafts` the times and what is measured in passes of their own on the same batches."""
        for draft in drafts:
            draft.fields["step_s"] = samples[draft.configuration].step_s
            draft.failure = samples[draft.configuration].failure
        timed = [draft for draft in drafts if not draft.failure]
        for draft in timed:
            c, own = draft.configuration, samples[draft.configuration]
            ask = self.workers[_model(c)].ask
            others = [d.configuration for d in timed if d is not draft]
            draft.fields |= {
                "items_per_s": rate_of(own.step_s, draft.fields["workload"].batch_size),
                "timing": Timing(
                    warmup_steps=len(own.warmup_s),
                    steady=own.steady,
                    stopped=own.stopped,
                    interleaved_with=list(dict.fromkeys(other.variant for other in others)),
                    interleaved_configurations=list(map(str, others)),
                    clock=CLOCK,
                ),
                "difference": self._difference(c, others),
            }
            if control := samples.get(("control", c)):
                draft.fields["control_s"] = control.step_s
            answers = {"backend": ask("backend")}
            if self.pages:
                answers["stages"] = ask("stages", c.protocol)
            draft.fields |= {k: v for k, v in answers.items() if not isinstance(v, Failure)}
        for worker in self.workers.values():
            worker.ask("rest")

    def _difference(self, c: Configuration, others: list[Configuration]) -> Difference | None:
        """How far the token embeddings of 8-bit activations are from the same weights' 16-bit ones."""
        parents = [one for one in others if one.variant == c.variant and not one.eight_bit]
        if not c.eight_bit or not parents:
            return None
        both = [
            self.workers[_model(one)].ask("embeddings", one.protocol) for one in (c, parents[-1])
        ]
        if any(isinstance(one, Failure) for one in both):
            return None
        cosine = torch.nn.functional.cosine_similarity(*map(torch.from_numpy, both), dim=-1)
        return Difference(
            against=str(parents[-1]),
            cosine_mean=cosine.mean().item(),
            cosine_min=cosine.min().item(),
        )

    def _workload(self, batch: int) -> Workload:
        if not self.pages:
            return Workload(kind="queries", batch_size=batch, texts=self.options.texts)
        label, budget = self.pages.label, self.pages.visual_tokens
        return Workload(kind="pages", batch_size=batch, pages=label, visual_tokens=budget)

    def _card_run(self, search: BatchSearch) -> CardRun:
        assert self.card is not None
        cap_bytes, outside_bytes = self.capped
        return CardRun(
            name=self.card.name,
            nominal_bytes=self.card.nominal_bytes,
            cap_bytes=cap_bytes,
            outside_bytes=outside_bytes,
            method=METHOD,
            tried=search.tried,
            verified_runs=sum(search.runs),
        )

    @cached_property
    def _limits(self) -> Limits | None:
        """What the GPU reaches in this run; not under a card's memory."""
        if self.card or self.device.type != "cuda":
            return None
        answers = [worker.ask("limits") for worker in list(self.workers.values())[:1]]
        for worker in self.workers.values():
            worker.ask("rest")
        return next((answer for answer in answers if isinstance(answer, Limits)), None)

    def _cell(self, draft: Draft, interference: list[str], shared: dict[str, Any]) -> Cell:
        c, failure = draft.configuration, draft.failure
        checkpoint = self.checkpoints[c.variant]
        requested = Backend(requested=c.kernel, requested_dtype=c.dtype)
        fields = {"backend": self.backends.get(_model(c), requested)} | draft.fields
        swapped = spilled(fields.get("memory"), self.environment.gpu_memory_bytes)
        return Cell(
            origin="measured",
            variant=c.variant,
            size=checkpoint.size,
            weights=checkpoint.label,
            quantization=_quantization(checkpoint.quantization),
            execution=c.execution,
            protocol=c.protocol,
            status=failure.status if failure else "ok",  # type: ignore[arg-type]
            reason=failure.reason if failure else None,
            limits=self._limits,
            interference=[*interference, *swapped],
            environment=self.environment,
            **shared,
            **fields,
        )


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
    """The records file: the `output`, or one under `outputs/` that names models, sizes, workloads."""
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
    kept: dict[str, int] = {}
    new: list[Cell] = []
    results: list[Cell] = []

    @contextmanager
    def errors_of(name: str) -> Iterator[None]:
        try:
            yield
        except LabError as error:
            errors[name] = error

    try:
        for part in parts:
            with errors_of(title(part)):
                runs[title(part)] = Run(part, progress, stopping, samples, isolated)
        if not runs:
            return finish(path, [], errors, len(parts), {})
        with RecordsFile(path, Cell, progress=progress) as file:
            unmark(path)
            for name, run in runs.items():
                on_file = {} if options.fresh else run.on_file(to_keep(file.rows))
                kept[name] = len(on_file)
                for cell in on_file.values():
                    progress(line_of(cell, "on file: "))
                with errors_of(name):
                    for cells in run.work([pair for pair in run.wanted if pair not in on_file]):
                        for cell in cells:
                            file.append([cell])
                            new.append(cell)
                            progress(line_of(cell))
                run.end()
                results += run.on_file(file.rows).values()
            times = spent(start, new)
            progress(f"took {times['wall_s']} s, of which {times['timed_s']} s in timed steps")
            return finish(path, results, errors, len(parts), times)
    except OSError as error:
        raise MissingRequirement(f"the sweep ended: {error}; {RESUME}") from None
    except KeyboardInterrupt:
        wanted = sum(len(run.wanted) for run in runs.values())
        done = sum(kept.values()) + len(new)
        raise Interrupted(
            f"stopped; {done} of {wanted} cells on file, run again to resume"
        ) from None
    finally:
        for run in runs.values():
            run.end()
