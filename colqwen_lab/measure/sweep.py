"""The batch sweep: from variants and batch sizes to cells on disk, one row as soon as it is measured."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from colqwen_lab.errors import BadInput, MissingRequirement, one_of, shown
from colqwen_lab.hardware import Card
from colqwen_lab.measure.cap import MARGIN, METHOD, VERIFIED_RUNS, largest_running
from colqwen_lab.measure.environment import environment, gpu_state, pick_device
from colqwen_lab.measure.interference import InterferenceMonitor, spilled
from colqwen_lab.measure.timing import CLOCK, Samples, StoppingRule, Turn, time_interleaved
from colqwen_lab.measure.worker import About, Failure, Remote, Setting, Worker, attempt, failure_of
from colqwen_lab.model.checkpoint import WEIGHTS, Checkpoint
from colqwen_lab.model.config import Variant, check_size, resolve_size, resolve_variant
from colqwen_lab.model.inputs import TEXTS, VISUAL_TOKENS
from colqwen_lab.model.loading import DTYPES
from colqwen_lab.model.quantize import checkpoint_of
from colqwen_lab.records import (
    GOES_ON,
    MIB,
    Backend,
    CardRun,
    Cell,
    Difference,
    Limits,
    Memory,
    Stages,
    Store,
    Timing,
    Workload,
    batch_sizes_of,
    listed,
    neighbour,
    rate_of,
    writing,
)
from colqwen_lab.runtime.batches import WORKLOADS, Batches, Pages, query_batches
from colqwen_lab.runtime.eager import EXECUTIONS, PROTOCOLS
from colqwen_lab.runtime.linears import EIGHT_BIT
from colqwen_lab.settings import outputs_folder

# The report's way with its fallback kernel, by device, and the best there is.
REPORT_WAY = {"cuda": "eager/published/tritonv2", "cpu": "eager/published/torch"}
BEST_WAY = "fast/lean/auto"


@dataclass(frozen=True)
class Way:
    """How a model is run: execution, protocol, and the backend asked for."""

    execution: str = "eager"
    protocol: str = "lean"
    backend: str = "auto"

    def __post_init__(self) -> None:
        one_of("execution", self.execution, EXECUTIONS)
        one_of("protocol", self.protocol, PROTOCOLS)
        if not isinstance(self.backend, str):
            raise BadInput(f"backend {self.backend!r}; valid: a kernel's name, such as auto")
        if self.execution == "fast" and PROTOCOLS[self.protocol].use_cache:
            raise BadInput(
                f"protocol {self.protocol!r} keeps a KV cache, which execution fast has not; valid: lean"
            )
        if self.backend in EIGHT_BIT and self.execution != "fast":
            raise BadInput(
                f"backend {self.backend!r} runs in execution fast only; valid: --execution fast"
            )

    def __str__(self) -> str:
        return f"{self.execution}/{self.protocol}/{self.backend}"

    @classmethod
    def of(cls, text: str, device: str) -> Way:
        """The way of `report`, `best`, or EXECUTION[/PROTOCOL[/BACKEND]]. Raises BadInput."""
        parts = {"report": REPORT_WAY[device], "best": BEST_WAY}.get(
            text.strip(), text.strip()
        ).split("/")
        if len(parts) > 3:
            raise BadInput(
                f"way {text!r}; valid: report, best, or EXECUTION/PROTOCOL/BACKEND such as fast/lean/auto"
            )
        return cls(*parts)

    def of_weights(self, packed: bool) -> Way | None:
        """This way as weights that are packed, or not, go it; None where its kernel is for the other kind."""
        if self.backend in EIGHT_BIT:
            return self if (self.backend == "fp8") is not packed else None
        return self if packed else replace(self, backend="auto")


@dataclass(frozen=True)
class Entry:
    """A variant run in one way: what is timed in turn with others."""

    variant: str
    way: Way

    @property
    def model(self) -> tuple[str, str, str]:
        """What tells loaded models apart: ways that differ in the protocol alone share one."""
        return self.variant, self.way.execution, self.way.backend

    def __str__(self) -> str:
        return f"{self.variant} {self.way}"


@dataclass(frozen=True)
class Request:
    """What a sweep was asked for, checked. `output` None is a file named after the variants under `outputs/`.

    Each model is `isolated` in a process of its own; without that all run in this one, as a debugger wants it.
    """

    variants: tuple[Variant, ...]
    batch_sizes: tuple[int, ...]
    size: str = "auto"
    workload: str = "queries"
    texts: str = "report"
    visual_tokens: int = VISUAL_TOKENS
    pages: str = ""
    samples: int = 0
    weights: str = "auto"
    ways: tuple[Way, ...] = (Way(),)
    dtype: str = "bfloat16"
    control: bool = False
    card: Card | None = None
    output: Path | None = None
    fresh: bool = False
    isolated: bool = True
    patience: StoppingRule = field(default_factory=StoppingRule)

    def __post_init__(self) -> None:
        check_size(self.size)
        one_of("workload", self.workload, WORKLOADS)
        one_of("texts", self.texts, TEXTS)
        one_of("dtype", self.dtype, DTYPES)
        if self.workload == "pages" and any(way.execution == "fast" for way in self.ways):
            raise BadInput("execution fast embeds queries only; valid for workload pages: eager")
        if self.workload != "pages" and (self.pages or self.visual_tokens != VISUAL_TOKENS):
            raise BadInput(
                f"pages and visual_tokens are of workload pages, not {self.workload}; valid: workload pages"
            )
        if self.workload != "queries" and self.texts != "report":
            raise BadInput(
                f"texts are of workload queries, not {self.workload}; valid: workload queries"
            )
        if self.weights != "auto" and any(v.folder or "any" in v.hub for v in self.variants):
            raise BadInput(
                "weights go with a named model; a folder or a hub id as model holds its own"
            )
        if self.weights not in WEIGHTS and not os.path.isdir(self.weights):
            raise BadInput(
                f"unknown weights {self.weights!r}; valid: {', '.join(WEIGHTS)}, or a checkpoint folder"
            )
        if self.weights not in WEIGHTS and len(self.variants) > 1:
            raise BadInput(
                "a weights folder goes with one model; name folders as models instead: -m DIR1 -m DIR2"
            )
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise BadInput(
                f"models {', '.join(names) or 'none'}; valid: one or more different ones, such as base,awq"
            )


def request(
    model: str | Sequence[str],
    batch_sizes: str | int | Iterable[int] = "auto",
    device: str = "",
    **options: Any,
) -> Request:
    """A checked request; `model` is a variant's name, several of them, or "base,awq".

    `batch_sizes` auto are those of the workload.

    `options` are a Request's; instead of `ways` it takes their texts, or one `execution`, `protocol` and `backend`.
    `device` is cuda or cpu where the sweep runs; by default this machine's.

    Raises:
        BadInput: a wrong value.
    """
    variants = tuple(resolve_variant(str(name).strip()) for name in listed(model))
    one = Way(
        **{
            name: options.pop(name)
            for name in ("execution", "protocol", "backend")
            if name in options
        }
    )
    named = [str(way) for way in listed(options.pop("ways", "")) if way]
    if named and one != Way():
        raise BadInput("ways name execution, protocol and backend; give these or ways, not both")
    ways = tuple(Way.of(way, device or pick_device().type) for way in named) or (one,)
    if batch_sizes == "auto":
        batch_sizes = WORKLOADS[
            one_of("workload", options.get("workload", "queries"), WORKLOADS)
        ].batch_sizes
    return Request(
        variants=variants, batch_sizes=tuple(batch_sizes_of(batch_sizes)), ways=ways, **options
    )


class Sweep:
    """One run of a request on a device. It leaves the mark that it ended, unless it is a `part` of more."""

    def __init__(
        self,
        asked: Request,
        progress: Callable[[str], None],
        emit: Callable[[Cell], object] | None = None,
        part: bool = False,
    ) -> None:
        self.asked, self.progress, self.emit, self.part = asked, progress, emit, part
        self.started = time.perf_counter()
        self.device = pick_device()
        self.size = resolve_size(asked.size, self.device.type == "cuda")
        self.sources = {
            variant.name: _checked(
                variant, checkpoint_of(variant, self.size, asked.weights, self.device), asked.size
            )
            for variant in asked.variants
        }
        self.pages = Pages(asked.pages, asked.visual_tokens) if asked.workload == "pages" else None
        self.entries = self._entries()
        self.environment = environment(self.device)
        if (
            not asked.isolated
            and self.device.type == "cuda"
            and len({entry.model for entry in self.entries}) > 1
        ):
            raise BadInput(
                "one process counts the memory of one model on a GPU; valid for several models: isolated"
            )
        self.workers: dict[
            Any, tuple[Any, About]
        ] = {}  # of Worker or Remote, by what tells models apart
        self.capped: tuple[int, int] | None = None
        self.said: set[str] = set()
        name = f"sweep-{'-'.join(v.name.replace('/', '-') for v in asked.variants)}-{self.size}-{asked.workload}.jsonl"
        self.path = asked.output or outputs_folder() / name

    def _entries(self) -> list[Entry]:
        """Every variant in every way that its weights can go."""
        found: list[Entry] = []
        for way in self.asked.ways:
            packed = {
                name: source.quantization is not None for name, source in self.sources.items()
            }
            going = [
                Entry(name, one) for name in self.sources if (one := way.of_weights(packed[name]))
            ]
            if not going or (
                way.backend not in ("auto", "torch", *EIGHT_BIT) and not any(packed.values())
            ):
                kind = "packed" if not any(packed.values()) else "16-bit"
                raise BadInput(
                    f"backend {way.backend!r} multiplies {kind} weights; valid for 16-bit weights: auto, torch, and in "
                    "execution fast fp8"
                )
            found += [entry for entry in going if entry not in found]
        return found

    def run(self) -> list[Cell]:
        """The cells of the request, those already in the file among them, in the order asked.

        Raises:
            MissingRequirement: the file cannot be written any more, or the system refuses something else outside a cell; what was
                measured before is on file.
        """
        try:
            return self._run()
        except OSError as error:
            raise MissingRequirement(f"the sweep ended: {error}; {GOES_ON}") from None
        finally:
            self._end()

    def _run(self) -> list[Cell]:
        with Store(self.path, self._keeps, self.emit, self.progress) as store:
            unmark(self.path)
            if store.superseded:
                self.progress(
                    f"{len(store.superseded)} earlier rows moved beside the file, to *.superseded.jsonl"
                )
            for cell in (found := self._found(store.cells)).values():
                self.progress(_line(cell, "kept, "))
            todo = {
                batch: entries
                for batch in self.asked.batch_sizes
                if (entries := [entry for entry in self.entries if (entry, batch) not in found])
            }
            if self.asked.card:
                cells = [self._on_card(entry, self.asked.card, store) for entry in self.entries]
            else:
                self._measure(todo, store)
                known = self._found(store.cells)
                cells = [
                    known[entry, batch]
                    for batch in self.asked.batch_sizes
                    for entry in self.entries
                ]
            fresh = [cell for cell in cells if cell.timing and cell not in found.values()]
            spent = {
                "wall_s": round(time.perf_counter() - self.started, 1),
                "timed_s": round(sum(sum(cell.step_s) + sum(cell.control_s) for cell in fresh), 1),
            }
            self.progress(
                f"{spent['wall_s']} s in all, {spent['timed_s']} s of them in timed steps"
            )
            if not self.part:
                mark(self.path, cells, spent)
        return cells

    def _on_card(self, entry: Entry, card: Card, store: Store) -> Cell:
        """The cell of the largest batch of a model under the cap of `card`, found by trying, and run several times."""
        known = [cell for (one, _), cell in self._found(store.cells).items() if one == entry]
        if known:
            return known[0]
        tried: dict[int, str] = {}
        broken: list[Failure] = []

        def outcome_of(batch: int) -> str:
            outcome = self._load(entry) or self._memory(entry, batch)
            if isinstance(outcome, Failure) and outcome.status == "failed":
                broken.append(outcome)  # a defect, which says nothing of the memory
            return outcome.status if isinstance(outcome, Failure) else "ok"

        def runs(batch: int) -> bool:
            tried[batch] = outcome_of(batch)
            return tried[batch] == "ok"

        lost = self._load(entry)
        found = 0 if lost else largest_running(runs)
        batch, verified = max(1, int(found * (1 - MARGIN))), 0
        while found and verified < VERIFIED_RUNS:
            verified = sum(outcome_of(batch) == "ok" for _ in range(VERIFIED_RUNS))
            if verified == VERIFIED_RUNS or batch == 1:
                break
            batch = max(1, min(batch - 1, int(batch * (1 - MARGIN))))
        lost = broken[0] if broken else lost
        (cell,) = [self._lost_cell(entry, batch, lost)] if lost else self._cells([entry], batch)
        assert self.capped is not None
        cap_bytes, outside_bytes = self.capped
        self._end()
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
        return source.label == cell.weights and not (
            asked_for and (self.asked.fresh or cell.status == "failed")
        )

    def _found(self, cells: Iterable[Cell]) -> dict[tuple[Entry, int], Cell]:
        """The cells that the request asks for."""
        asked = self.asked
        card = asked.card.name if asked.card else None
        plain = self._plain_workload(1)
        same = (plain.budget, plain.pages or plain.texts, asked.dtype, card)
        return {
            (entry, cell.batch_size): cell
            for cell in cells
            if (source := self.sources.get(cell.variant))
            and (cell.size, cell.weights) == (source.size, source.label)
            and (asked.card or cell.batch_size in asked.batch_sizes)
            and _asked_for(cell) == same
            and (entry := _entry_of(cell)) in self.entries
        }

    def _measure(self, todo: dict[int, list[Entry]], store: Store) -> None:
        entries = [
            entry for entry in self.entries if any(entry in wanted for wanted in todo.values())
        ]
        firsts = {entry.model: entry for entry in entries}
        lost: dict[Any, Failure] = {}
        for model, first in firsts.items():
            failure = self._load(first)
            if failure and failure.status == "oom" and self.workers:
                self.progress(
                    f"the models do not fit together ({failure.reason}); each is timed alone"
                )
                for one in firsts:
                    self._end()
                    alone = {
                        batch: [entry for entry in todo[batch] if entry.model == one]
                        for batch in todo
                    }
                    self._measure(
                        {batch: wanted for batch, wanted in alone.items() if wanted}, store
                    )
                return
            if failure and not failure.ended:
                lost[model] = failure
            elif not failure:
                batches = [
                    batch
                    for batch, wanted in todo.items()
                    if any(entry.model == model for entry in wanted)
                ]
                compiled = attempt(lambda: self._worker(first).compile(batches), self.device)  # noqa: B023
                if isinstance(compiled, Failure):
                    self.progress(
                        f"{first}: kernels compile at their first use ({compiled.reason})"
                    )
        for batch, wanted in todo.items():
            store.add(
                self._lost_cell(entry, batch, lost[entry.model])
                for entry in wanted
                if entry.model in lost
            )
            for cell in self._cells([entry for entry in wanted if entry.model not in lost], batch):
                store.add([cell])

    def _load(self, entry: Entry) -> Failure | None:
        """Have the model of `entry` in a worker that lives; the failure, where it does not load."""
        if entry.model in self.workers and self.workers[entry.model][0].alive:
            return None
        self._end(entry.model)
        way, asked = entry.way, self.asked
        setting = Setting(
            self.sources[entry.variant],
            self.device,
            way.execution,
            way.backend,
            asked.dtype,
            self._batches(),
        )
        worker: Any = attempt(lambda: (Remote if asked.isolated else Worker)(setting), self.device)
        if isinstance(worker, Failure):
            return worker
        try:
            self.capped = worker.cap(asked.card) if asked.card else None
            about = attempt(worker.load, self.device)
        except BaseException:
            worker.end()
            raise
        if isinstance(about, Failure):
            worker.end()
            return about
        self.workers[entry.model] = (worker, about)
        kernels = ", ".join(f"{kernel} x {count}" for kernel, count in about.engaged.items())
        unused = f"; left out, never called: {', '.join(about.left_out)}" if about.left_out else ""
        self.progress(
            f"{entry}: {about.weights}; {about.dtype}; text linears on {kernels}; {self.environment.device}{unused}"
        )
        return None

    def _end(self, model: Any = None) -> None:
        """End the worker of `model`, or all."""
        for one in [model] if model else list(self.workers):
            if one in self.workers:
                self.workers.pop(one)[0].end()

    def _worker(self, entry: Entry) -> Any:
        return self.workers[entry.model][0]

    def _lost_cell(self, entry: Entry, batch: int, outcome: Failure) -> Cell:
        """The row of a model that does not load."""
        cell = self._cell(entry, self._plain_workload(batch), outcome, None, [], None, [])
        self.progress(_line(cell))
        return cell

    def _batches(self) -> Callable[..., Batches]:
        """What makes the batches of a size in a worker."""
        if self.pages:
            return partial(self.pages.batches, samples=self.asked.samples)
        return partial(query_batches, texts=self.asked.texts, samples=self.asked.samples)

    def _memory(self, entry: Entry, batch: int) -> Memory | Failure:
        alone = len(self.workers) == 1
        return attempt(
            lambda: self._worker(entry).memory(batch, entry.way.protocol, alone), self.device
        )

    def _prepare(self, entries: list[Entry], batch: int) -> dict[Entry, Workload | Failure]:
        """Have each worker make its batches, and the steps of its entries and of their controls."""
        made: dict[Entry, Workload | Failure] = {}
        for model in dict.fromkeys(entry.model for entry in entries):
            of_it = [entry for entry in entries if entry.model == model]
            wanted = [(entry.way.protocol, control) for entry in of_it for control in (False, True)]
            found = attempt(lambda: self._worker(of_it[0]).prepare(batch, wanted), self.device)  # noqa: B023
            if not isinstance(found, Failure):
                found, said = found
                for line in (line for line in said if line not in self.said):
                    self.progress(line)
                self.said |= set(said)
            made |= dict.fromkeys(of_it, found)
        return made

    def _turn(self, entry: Entry, control: bool = False) -> Turn:
        return partial(self._worker(entry).turn, entry.way.protocol, control)

    def _cells(self, entries: list[Entry], batch: int) -> Iterator[Cell]:
        """The row of each model at this batch size: memory first, then all that fit timed in turn.

        Those that come once more, alone, come last: the others are on file by then.
        """
        before = gpu_state(self.device)
        memories = {entry: self._load(entry) or self._memory(entry, batch) for entry in entries}
        prepared = self._prepare(
            [e for e, memory in memories.items() if isinstance(memory, Memory)], batch
        )
        memories |= {entry: made for entry, made in prepared.items() if isinstance(made, Failure)}
        workloads = {entry: made for entry, made in prepared.items() if isinstance(made, Workload)}
        turns: dict[Any, Turn] = {entry: self._turn(entry) for entry in workloads}
        # The first model of each way a second time: an A/A control, which must come out as the same.
        first = next(iter(self.sources))
        twice = [
            entry
            for entry in workloads
            if entry.variant == first and entry.way.backend not in EIGHT_BIT
        ]
        turns |= {
            ("control", entry): self._turn(entry, control=True)
            for entry in twice
            if self.asked.control
        }
        noticing = InterferenceMonitor(
            self.device, (worker.pid for worker, _ in self.workers.values())
        )
        samples = time_interleaved(turns, self.asked.patience)
        states = (
            None if before is None else {"before": before, "after": gpu_state(self.device) or {}}
        )
        notes = noticing.notes(states)
        in_turn = [entry for entry in workloads if samples[entry].error is None]
        more = {entry: self._more(entry, in_turn) for entry in in_turn}
        self._rest()
        # It may be the others that took the room, or its process.
        lost = {entry: error for entry in workloads if (error := samples[entry].error)}
        again = [
            entry
            for entry, error in lost.items()
            if len(samples) > 1 and not failure_of(error).ended
        ]
        failed = []
        for entry in [*(entry for entry in entries if entry not in again), *again]:
            if entry in again:
                if not self._load(entry) and isinstance(
                    self._prepare([entry], batch)[entry], Workload
                ):
                    samples |= time_interleaved({entry: self._turn(entry)}, self.asked.patience)
                    more[entry] = self._more(entry, [entry])
                self._rest()
            workload = workloads.get(entry, self._plain_workload(batch))
            control = samples.get(("control", entry))
            cell = self._cell(
                entry, workload, memories[entry], samples.get(entry), in_turn, states, notes
            )
            if cell.status == "ok":
                cell = cell.model_copy(
                    update={"control_s": control.step_s if control else [], **more[entry]}
                )
            elif cell.status == "failed" and self.asked.isolated:
                failed.append(entry.model)
            self.progress(_line(cell))
            yield cell
        for model in failed:
            self._end(model)  # a CUDA context that crashed fails whatever comes after

    def _rest(self) -> None:
        for worker, _ in self.workers.values():
            attempt(worker.rest, self.device)

    def _more(self, entry: Entry, among: list[Entry]) -> dict[str, Any]:
        """What a cell says beside its times, measured in passes of their own on the same batches."""
        more: dict[str, Any] = {"difference": self._difference(entry, among)}
        if self.pages:
            towers = attempt(lambda: self._worker(entry).towers(entry.way.protocol), self.device)
            more["stages"] = towers if isinstance(towers, Stages) else None
        return more

    def _difference(self, entry: Entry, among: list[Entry]) -> Difference | None:
        """How far the token embeddings of 8-bit activations are from those of the same variant's 16-bit ones."""
        parents = [
            one
            for one in among
            if one.variant == entry.variant and one.way.backend not in EIGHT_BIT
        ]
        if entry.way.backend not in EIGHT_BIT or not parents:
            return None
        both = [
            attempt(lambda one=one: self._worker(one).embeddings(one.way.protocol), self.device)  # type: ignore[misc]
            for one in (entry, parents[-1])
        ]
        if any(isinstance(one, Failure) for one in both):
            return None
        own, theirs = map(torch.from_numpy, both)
        cosine = torch.nn.functional.cosine_similarity(own, theirs, dim=-1)
        return Difference(
            against=str(parents[-1]),
            cosine_mean=cosine.mean().item(),
            cosine_min=cosine.min().item(),
        )

    def _plain_workload(self, batch: int) -> Workload:
        if self.pages:
            label, budget = self.pages.label, self.pages.visual_tokens
            return Workload(kind="pages", batch_size=batch, pages=label, visual_tokens=budget)
        return Workload(kind="queries", batch_size=batch, texts=self.asked.texts)

    @cached_property
    def limits(self) -> Limits | None:
        if self.asked.card or self.device.type != "cuda":
            return None
        found = [
            attempt(worker.limits, self.device) for worker, _ in list(self.workers.values())[:1]
        ]
        self._rest()
        return next((one for one in found if isinstance(one, Limits)), None)

    def _cell(
        self,
        entry: Entry,
        workload: Workload,
        memory: Memory | Failure,
        samples: Samples | None,
        in_turn: list[Entry],
        states: dict[str, dict[str, Any]] | None,
        notes: list[str],
    ) -> Cell:
        outcome = memory if isinstance(memory, Failure) else None
        if samples is not None and samples.error is not None:
            outcome = failure_of(samples.error)
        timed = samples if outcome is None else None
        others = [other for other in in_turn if other != entry and entry in in_turn]
        worker, loaded = self.workers.get(entry.model, (None, None))
        chosen = attempt(worker.chosen, self.device) if worker and timed else None
        engaged, schedules = (
            chosen if isinstance(chosen, tuple) else (loaded.engaged if loaded else {}, {})
        )
        found = memory if isinstance(memory, Memory) else None
        return Cell(
            origin="measured",
            variant=entry.variant,
            size=self.sources[entry.variant].size,
            weights=self.sources[entry.variant].label,
            workload=workload,
            execution=entry.way.execution,
            protocol=entry.way.protocol,
            backend=Backend(
                requested=entry.way.backend,
                engaged=engaged,
                dtype=loaded.dtype if loaded else None,
                requested_dtype=self.asked.dtype,
                kept_16bit=loaded.kept_16bit if loaded else {},
                kernel_configs=schedules,
            ),
            status=outcome.status if outcome else "ok",  # type: ignore[arg-type]
            reason=outcome.reason if outcome else None,
            step_s=samples.step_s if samples else [],
            items_per_s=rate_of(timed.step_s, workload.batch_size) if timed else None,
            memory=found,
            limits=self.limits,
            timing=Timing(
                warmup_steps=timed.warmup_steps,
                steady=timed.steady,
                stopped=timed.stopped,
                interleaved_with=list(dict.fromkeys(other.variant for other in others)),
                interleaved_configurations=[str(other) for other in others],
                clock=CLOCK,
            )
            if timed
            else None,
            gpu_state=states,
            interference=[*notes, *spilled(found, self.environment.gpu_memory_bytes)],
            environment=self.environment,
        )


def _checked(variant: Variant, source: Checkpoint, asked_size: str) -> Checkpoint:
    """`source`, if it is what the variant and the size say."""
    if (
        variant.folder is None
        and "/" not in variant.name
        and bool(variant.scheme) != bool(source.quantization)
    ):
        found = "quantised" if source.quantization else "16-bit"
        raise MissingRequirement(
            f"{source.label} holds {found} weights, which is not {variant.name}; name it as a model instead"
        )
    if asked_size != "auto" and source.size != asked_size:
        raise BadInput(
            f"{source.label} is of size {source.size}, not {asked_size}; valid: auto, or that size"
        )
    return source


def _asked_for(cell: Cell) -> tuple[str | None, ...]:
    work = cell.workload
    texts = "report" if work.texts and work.texts.startswith("drawn") else work.texts
    return (
        work.budget,
        work.pages or texts,
        cell.backend.requested_dtype,
        cell.card.name if cell.card else None,
    )


def _entry_of(cell: Cell) -> Entry | None:
    try:
        return Entry(cell.variant, Way(cell.execution, cell.protocol, cell.backend.requested))
    except BadInput:
        return None


def _line(cell: Cell, prefix: str = "") -> str:
    """One line of progress, readable in a headless log."""
    way = f"{cell.execution}/{cell.protocol}/{cell.backend.requested}"
    head = f"{prefix}{cell.variant} {way} batch {cell.batch_size}: "
    if cell.items_per_s is None or cell.memory is None or cell.timing is None:
        return f"{head}{cell.status}: {cell.reason}"
    steps = "; ".join([f"{len(cell.step_s)} steps, {cell.timing.stopped}", *cell.interference])
    return f"{head}{cell.items_per_s.median:.1f} items/s, peak {cell.memory.peak_bytes / MIB:.1f} MiB ({steps})"


def mark(records: Path, cells: list[Cell], spent: dict[str, float]) -> None:
    """The mark of a sweep that ended: its counts and its file, written last and whole."""
    counts = {
        status: sum(cell.status == status for cell in cells) for status in ("ok", "oom", "failed")
    }
    text = json.dumps(
        {"complete": True, "records": records.name, "cells": len(cells), **counts, **spent},
        indent=1,
    )
    path = neighbour(records, "result.json")
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)


def unmark(records: Path) -> None:
    with writing(records), suppress(FileNotFoundError, NotADirectoryError):
        neighbour(records, "result.json").unlink()


def to_stderr(line: str) -> None:
    print(shown(line), file=sys.stderr, flush=True)


def sweep(
    asked: Request,
    progress: Callable[[str], None] = to_stderr,
    emit: Callable[[Cell], object] | None = None,
    part: bool = False,
) -> list[Cell]:
    """The cells of `asked`, measured on this machine's device; those in its file already are kept.

    `emit` is called with each new cell as soon as it is on file. A `part` of more leaves the mark to who runs them all.

    Raises:
        BadInput: a wrong value, or a file that cannot be written.
        MissingRequirement: no weights, or no kernel for them.
    """
    return Sweep(asked, progress, emit, part).run()
