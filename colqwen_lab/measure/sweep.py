"""The batch sweep: from variants and batch sizes to cells on disk, one row as soon as it is measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from colqwen_lab.cards import Card
from colqwen_lab.errors import BadInput, LabError, Unmet, one_of
from colqwen_lab.measure.cap import MARGIN, METHOD, VERIFIED_RUNS, largest_running, set_cap
from colqwen_lab.measure.clock import CLOCK, Patience, Samples, time_in_turn
from colqwen_lab.measure.environment import environment, gpu_state, pick_device
from colqwen_lab.measure.memory import free, measure
from colqwen_lab.model.architecture import check_size, resolve_size
from colqwen_lab.model.loading import DTYPES, Loaded, load
from colqwen_lab.model.quantize import source_of
from colqwen_lab.model.texts import TEXTS
from colqwen_lab.model.variants import Variant, resolve_variant
from colqwen_lab.model.weights import WEIGHTS, Source
from colqwen_lab.records import (
    MIB,
    Backend,
    CardRun,
    Cell,
    Memory,
    Store,
    Timing,
    Workload,
    batch_sizes_of,
    listed,
    neighbour,
    rate_of,
)
from colqwen_lab.runtime.execution import EXECUTIONS, PROTOCOLS, Steps
from colqwen_lab.runtime.workloads import WORKLOADS, query_batches
from colqwen_lab.settings import outputs_folder

BATCH_SIZES = "8,16,32,64,128,256"


@dataclass(frozen=True)
class Request:
    """What a sweep was asked for, checked. `output` None is a file named after the variants under `outputs/`."""

    variants: tuple[Variant, ...]
    batch_sizes: tuple[int, ...]
    size: str = "auto"
    workload: str = "queries"
    texts: str = "report"
    samples: int = 64
    weights: str = "auto"
    execution: str = "eager"
    backend: str = "auto"
    protocol: str = "lean"
    dtype: str = "bfloat16"
    card: Card | None = None
    output: Path | None = None
    fresh: bool = False
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        check_size(self.size)
        one_of("workload", self.workload, WORKLOADS)
        one_of("execution", self.execution, EXECUTIONS)
        one_of("protocol", self.protocol, PROTOCOLS)
        one_of("texts", self.texts, TEXTS)
        one_of("dtype", self.dtype, DTYPES)
        if self.weights != "auto" and any(v.folder or "any" in v.hub for v in self.variants):
            raise BadInput("weights go with a named model; a folder or a hub id as model holds its own")
        if self.weights not in WEIGHTS and not Path(self.weights).is_dir():
            raise BadInput(f"unknown weights {self.weights!r}; valid: {', '.join(WEIGHTS)}, or a checkpoint folder")
        if self.weights not in WEIGHTS and len(self.variants) > 1:
            raise BadInput("a weights folder goes with one model; name folders as models instead: -m DIR1 -m DIR2")
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise BadInput(f"models {', '.join(names) or 'none'}; valid: one or more different ones, such as base,awq")


def request(
    model: str | Sequence[str], batch_sizes: str | int | Iterable[int] = BATCH_SIZES, **options: Any
) -> Request:
    """A checked request; `model` is a variant's name, several of them, or "base,awq". Raises BadInput."""
    variants = tuple(resolve_variant(str(name).strip()) for name in listed(model))
    return Request(variants=variants, batch_sizes=tuple(batch_sizes_of(batch_sizes)), **options)


@dataclass(frozen=True)
class Failure:
    """An outcome that is no figure: out of memory, or failed, and why."""

    status: str
    reason: str


def failure_of(error: BaseException) -> Failure:
    """The outcome of an exception: `oom` where the device or the host ran out of memory, else `failed`."""
    text = " ".join(str(error).split())[:300]
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
    return Failure("oom" if memory else "failed", f"{type(error).__name__}: {text}")


def attempt(work: Callable[[], Any], device: torch.device) -> Any:
    """What `work` returns, or a Failure. Its frames are let go first, then memory is freed."""
    try:
        return work()
    except LabError:
        raise
    except Exception as error:  # every outcome of a cell is a row
        outcome = failure_of(error)
    free(device)
    return outcome


class Sweep:
    """One run of a request on a device."""

    def __init__(self, asked: Request, progress: Callable[[str], None]) -> None:
        self.asked, self.progress = asked, progress
        self.device = pick_device()
        self.size = resolve_size(asked.size, self.device.type == "cuda")
        self.sources = {
            variant.name: _checked(variant, source_of(variant, self.size, asked.weights, self.device), asked.size)
            for variant in asked.variants
        }
        if asked.backend not in ("auto", "torch") and not any(s.quantization for s in self.sources.values()):
            raise BadInput(
                f"backend {asked.backend!r} multiplies packed weights; valid for 16-bit weights: auto, torch"
            )
        self.environment = environment(self.device)
        self.memories: dict[tuple[str, int], Memory | Failure] = {}
        name = f"sweep-{'-'.join(v.name.replace('/', '-') for v in asked.variants)}-{self.size}-{asked.workload}.jsonl"
        self.path = asked.output or outputs_folder() / name

    def run(self) -> list[Cell]:
        """The cells of the request, those already in the file among them, in the order asked."""
        done_mark = neighbour(self.path, "result.json")
        with Store(self.path, self._keeps) as store:
            done_mark.unlink(missing_ok=True)
            if store.superseded:
                self.progress(f"{len(store.superseded)} earlier rows moved beside the file, to *.superseded.jsonl")
            for cell in (found := self._found(store.cells)).values():
                self.progress(_line(cell, "kept, "))
            todo = {
                batch: names
                for batch in self.asked.batch_sizes
                if (names := [name for name in self.sources if (name, batch) not in found])
            }
            if self.asked.card:
                cells = [self._on_card(name, self.asked.card, store) for name in self.sources]
            else:
                self._measure(todo, store)
                cells = [
                    self._found(store.cells)[name, batch] for batch in self.asked.batch_sizes for name in self.sources
                ]
            _write_result(done_mark, self.path, cells)
        return cells

    def _on_card(self, name: str, card: Card, store: Store) -> Cell:
        """The cell of the largest batch of a model under the cap of `card`, found by trying, and run several times."""
        known = [cell for (variant, _), cell in self._found(store.cells).items() if variant == name]
        if known:
            return known[0]
        cap_bytes, outside_bytes = set_cap(card, self.device)
        tried: dict[int, str] = {}

        def runs(batch: int) -> bool:
            assert isinstance(loaded, Loaded)
            outcome = self._memory(name, loaded, batch)
            tried[batch] = outcome.status if isinstance(outcome, Failure) else "ok"
            return isinstance(outcome, Memory)

        loaded = self._load(name)
        found = largest_running(runs) if isinstance(loaded, Loaded) else 0
        batch = max(1, int(found * (1 - MARGIN)))
        verified = sum(runs(batch) for _ in range(VERIFIED_RUNS)) if found else 0
        if isinstance(loaded, Loaded):
            (cell,) = self._cells({name: loaded}, batch)
        else:
            cell = self._lost_cell(name, batch, loaded)
        run = CardRun(
            name=card.name,
            nominal_bytes=card.nominal_bytes,
            cap_bytes=cap_bytes,
            outside_bytes=outside_bytes,
            method=METHOD,
            tried=tried,
            verified_runs=verified,
        )
        cell = cell.model_copy(update={"card": run})
        store.add([cell])
        return cell

    def _keeps(self, cell: Cell) -> bool:
        """Whether a row of the file stays: same weights, environment and code, and no failure to be tried again."""
        if cell.origin != "measured" or cell.environment.identity() != self.environment.identity():
            return False
        source = self.sources.get(cell.variant)
        if source is None or source.size != cell.size:
            return True
        asked_for = bool(self._found([cell]))
        return source.label == cell.weights and not (asked_for and (self.asked.fresh or cell.status == "failed"))

    def _found(self, cells: Iterable[Cell]) -> dict[tuple[str, int], Cell]:
        """The cells that the request asks for."""
        asked = self.asked
        card = asked.card.name if asked.card else None
        same = (asked.workload, asked.texts, asked.execution, asked.protocol, asked.backend, asked.dtype, card)
        return {
            (cell.variant, cell.batch_size): cell
            for cell in cells
            if (source := self.sources.get(cell.variant))
            and (cell.size, cell.weights) == (source.size, source.label)
            and (asked.card or cell.batch_size in asked.batch_sizes)
            and _asked_for(cell) == same
        }

    def _measure(self, todo: dict[int, list[str]], store: Store) -> None:
        names = [name for name in self.sources if any(name in wanted for wanted in todo.values())]
        if not names:
            return
        models: dict[str, Loaded] = {}
        lost: dict[str, Failure] = {}
        if self.device.type == "cuda" and len(names) > 1:
            # The allocator counts all models of a process, so each one's memory is measured while it is alone.
            for name in names:
                alone = self._load(name)
                if isinstance(alone, Failure):
                    lost[name] = alone
                else:
                    self.memories |= {(name, b): self._memory(name, alone, b) for b in todo if name in todo[b]}
                del alone
                free(self.device)
        for name in (name for name in names if name not in lost):
            loaded = self._load(name)
            if isinstance(loaded, Loaded):
                models[name] = loaded
            elif loaded.status == "oom" and models:
                self.progress(f"the models do not fit together ({loaded.reason}); each is timed alone")
                models.clear()
                free(self.device)
                for one in names:
                    self._measure({batch: [one] for batch in todo if one in todo[batch]}, store)
                    free(self.device)
                return
            else:
                lost[name] = loaded
        for batch, wanted in todo.items():
            store.add(self._lost_cell(name, batch, lost[name]) for name in wanted if name in lost)
            store.add(self._cells({name: models[name] for name in wanted if name in models}, batch))

    def _load(self, name: str) -> Loaded | Failure:
        source = self.sources[name]
        backend = self.asked.backend if source.quantization else "auto"
        loaded = attempt(lambda: load(source, self.device, backend, self.asked.dtype), self.device)
        if isinstance(loaded, Loaded):
            kernels = ", ".join(f"{kernel} x {count}" for kernel, count in loaded.engaged.items())
            unused = f"; left out, never called: {', '.join(loaded.left_out)}" if loaded.left_out else ""
            self.progress(
                f"{name}: {loaded.weights}; {loaded.dtype}; text linears on {kernels}; "
                f"{self.environment.device}{unused}"
            )
        return loaded

    def _lost_cell(self, name: str, batch: int, outcome: Failure) -> Cell:
        """The row of a model that does not load."""
        cell = self._cell(name, None, self._plain_workload(batch), outcome, None, [], None)
        self.progress(_line(cell))
        return cell

    def _batches(self, loaded: Loaded, batch: int) -> Any:
        asked = self.asked
        return query_batches(loaded.model.config, loaded.tokenizer, batch, asked.texts, asked.samples, self.device)

    def _memory(self, name: str, loaded: Loaded, batch: int) -> Memory | Failure:
        def work() -> Memory:
            # A peak is that of the longest batch, which a cycle through all batches meets.
            inputs = [max(self._batches(loaded, batch).inputs, key=lambda one: one["input_ids"].shape[1])]
            return measure(loaded, inputs, Steps(loaded.model, inputs, self.asked.execution, self.asked.protocol))

        return attempt(work, self.device)

    def _cells(self, models: dict[str, Loaded], batch: int) -> list[Cell]:
        """The row of each model at this batch size: memory first, then all that fit timed in turn."""
        before = gpu_state(self.device)
        memories = {
            name: self.memories.get((name, batch)) or self._memory(name, loaded, batch)
            for name, loaded in models.items()
        }
        fitting = {name: models[name] for name, memory in memories.items() if isinstance(memory, Memory)}
        batches = {}
        for name, loaded in tuple(fitting.items()):
            made = attempt(lambda loaded=loaded: self._batches(loaded, batch), self.device)  # type: ignore[misc]
            if isinstance(made, Failure):
                memories[name] = made
                del fitting[name]
            else:
                batches[name] = made
        steps = {
            name: Steps(loaded.model, batches[name].inputs, self.asked.execution, self.asked.protocol)
            for name, loaded in fitting.items()
        }
        samples = time_in_turn(steps, self.device, self.asked.patience)
        in_turn = [name for name in samples if samples[name].error is None]
        for name in set(samples) - set(in_turn) if len(samples) > 1 else ():
            # It may be the others that took the room: once more, alone.
            for step in steps.values():
                step.output = None
            free(self.device)
            samples |= time_in_turn({name: steps[name]}, self.device, self.asked.patience)
        del steps
        free(self.device)
        states = None if before is None else {"before": before, "after": gpu_state(self.device) or {}}
        cells = []
        for name, loaded in models.items():
            workload = batches[name].workload if name in batches else self._plain_workload(batch)
            cell = self._cell(name, loaded, workload, memories[name], samples.get(name), in_turn, states)
            self.progress(_line(cell))
            cells.append(cell)
        return cells

    def _plain_workload(self, batch: int) -> Workload:
        return Workload(kind="queries", batch_size=batch, texts=self.asked.texts)

    def _cell(
        self,
        name: str,
        loaded: Loaded | None,
        workload: Workload,
        memory: Memory | Failure,
        samples: Samples | None,
        in_turn: list[str],
        states: dict[str, dict[str, Any]] | None,
    ) -> Cell:
        outcome = memory if isinstance(memory, Failure) else None
        if samples is not None and samples.error is not None:
            outcome = failure_of(samples.error)
        timed = samples is not None and outcome is None
        return Cell(
            origin="measured",
            variant=name,
            size=self.sources[name].size,
            weights=self.sources[name].label,
            workload=workload,
            execution=self.asked.execution,
            protocol=self.asked.protocol,
            backend=Backend(
                requested=self.asked.backend,
                engaged=loaded.engaged if loaded else {},
                dtype=loaded.dtype if loaded else None,
                requested_dtype=self.asked.dtype,
                kept_16bit=loaded.kept_16bit if loaded else {},
            ),
            status=outcome.status if outcome else "ok",  # type: ignore[arg-type]
            reason=outcome.reason if outcome else None,
            step_s=samples.step_s if samples else [],
            items_per_s=rate_of(samples.step_s, workload.batch_size) if timed and samples else None,
            memory=memory if isinstance(memory, Memory) else None,
            timing=Timing(
                warmup_steps=samples.warmup_steps,
                steady=samples.steady,
                stopped=samples.stopped,
                in_turn_with=[other for other in in_turn if other != name and name in in_turn],
                clock=CLOCK,
            )
            if timed and samples
            else None,
            gpu_state=states,
            environment=self.environment,
        )


def _checked(variant: Variant, source: Source, asked_size: str) -> Source:
    """`source`, if it is what the variant and the size say."""
    if variant.folder is None and "/" not in variant.name and bool(variant.scheme) != bool(source.quantization):
        found = "quantised" if source.quantization else "16-bit"
        raise Unmet(f"{source.label} holds {found} weights, which is not {variant.name}; name it as a model instead")
    if asked_size != "auto" and source.size != asked_size:
        raise BadInput(f"{source.label} is of size {source.size}, not {asked_size}; valid: auto, or that size")
    return source


def _asked_for(cell: Cell) -> tuple[str | None, ...]:
    texts = "report" if cell.workload.texts and cell.workload.texts.startswith("drawn") else cell.workload.texts
    backend = cell.backend
    card = cell.card.name if cell.card else None
    return cell.workload.kind, texts, cell.execution, cell.protocol, backend.requested, backend.requested_dtype, card


def _line(cell: Cell, prefix: str = "") -> str:
    """One line of progress, readable in a headless log."""
    head = f"{prefix}{cell.variant} batch {cell.batch_size}: "
    if cell.items_per_s is None or cell.memory is None or cell.timing is None:
        return f"{head}{cell.status}: {cell.reason}"
    steps = f"{len(cell.step_s)} steps, {cell.timing.stopped}"
    return f"{head}{cell.items_per_s.median:.1f} items/s, peak {cell.memory.peak_bytes / MIB:.1f} MiB ({steps})"


def _write_result(path: Path, records: Path, cells: list[Cell]) -> None:
    """The mark of a sweep that ended: its counts and its file, written last and whole."""
    counts = {status: sum(cell.status == status for cell in cells) for status in ("ok", "oom", "failed")}
    text = json.dumps({"complete": True, "records": records.name, "cells": len(cells), **counts}, indent=1)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def sweep(asked: Request, progress: Callable[[str], None] = to_stderr) -> list[Cell]:
    """The cells of `asked`, measured on this machine's device; those in its file already are kept.

    Raises:
        BadInput: a wrong value, or a file that cannot be written.
        Unmet: no weights, or no kernel for them.
    """
    return Sweep(asked, progress).run()
