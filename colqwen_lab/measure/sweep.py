"""The batch sweep: from variants and batch sizes to cells on disk, one row as soon as it is measured."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from colqwen_lab.cards import Card
from colqwen_lab.errors import BadInput, LabError, Unmet, one_of
from colqwen_lab.measure.cap import MARGIN, METHOD, VERIFIED_RUNS, largest_running, set_cap
from colqwen_lab.measure.clock import CLOCK, Patience, Samples, time_in_turn, time_towers
from colqwen_lab.measure.environment import environment, gpu_state, pick_device
from colqwen_lab.measure.limits import measured_limits
from colqwen_lab.measure.memory import free, measure
from colqwen_lab.model.architecture import check_size, resolve_size
from colqwen_lab.model.loading import DTYPES, Loaded, load
from colqwen_lab.model.pages import VISUAL_TOKENS
from colqwen_lab.model.quantize import source_of
from colqwen_lab.model.texts import TEXTS
from colqwen_lab.model.variants import Variant, resolve_variant
from colqwen_lab.model.weights import WEIGHTS, Source
from colqwen_lab.records import (
    MIB,
    Backend,
    CardRun,
    Cell,
    Difference,
    Limits,
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
from colqwen_lab.runtime.fast import bucket, load_fast
from colqwen_lab.runtime.kernels import EIGHT_BIT
from colqwen_lab.runtime.workloads import WORKLOADS, Pages, query_batches
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
        if self.execution == "fast" and PROTOCOLS[self.protocol].use_cache:
            raise BadInput(f"protocol {self.protocol!r} keeps a KV cache, which execution fast has not; valid: lean")
        if self.backend in EIGHT_BIT and self.execution != "fast":
            raise BadInput(f"backend {self.backend!r} runs in execution fast only; valid: --execution fast")

    @classmethod
    def of(cls, text: str, device: str) -> Way:
        """The way of `report`, `best`, or EXECUTION[/PROTOCOL[/BACKEND]]. Raises BadInput."""
        parts = {"report": REPORT_WAY[device], "best": BEST_WAY}.get(text.strip(), text.strip()).split("/")
        if len(parts) > 3:
            raise BadInput(f"way {text!r}; valid: report, best, or EXECUTION/PROTOCOL/BACKEND such as fast/lean/auto")
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
        return f"{self.variant} {self.way.execution}/{self.way.protocol}/{self.way.backend}"


@dataclass(frozen=True)
class Request:
    """What a sweep was asked for, checked. `output` None is a file named after the variants under `outputs/`."""

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
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        check_size(self.size)
        one_of("workload", self.workload, WORKLOADS)
        one_of("texts", self.texts, TEXTS)
        one_of("dtype", self.dtype, DTYPES)
        if self.workload == "pages" and any(way.execution == "fast" for way in self.ways):
            raise BadInput("execution fast embeds queries only; valid for workload pages: eager")
        if self.workload != "pages" and (self.pages or self.visual_tokens != VISUAL_TOKENS):
            raise BadInput(f"pages and visual_tokens are of workload pages, not {self.workload}; valid: workload pages")
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
    model: str | Sequence[str], batch_sizes: str | int | Iterable[int] = "auto", device: str = "", **options: Any
) -> Request:
    """A checked request; `model` is a variant's name, several of them, or "base,awq".

    `batch_sizes` auto are those of the workload.

    `options` are a Request's; instead of `ways` it takes their texts, or one `execution`, `protocol` and `backend`.
    `device` is cuda or cpu where the sweep runs; by default this machine's.

    Raises:
        BadInput: a wrong value.
    """
    variants = tuple(resolve_variant(str(name).strip()) for name in listed(model))
    one = Way(**{name: options.pop(name) for name in ("execution", "protocol", "backend") if name in options})
    named = [way for way in listed(options.pop("ways", "")) if way]
    if named and one != Way():
        raise BadInput("ways name execution, protocol and backend; give these or ways, not both")
    ways = tuple(Way.of(way, device or pick_device().type) for way in named) or (one,)
    if batch_sizes == "auto":
        batch_sizes = WORKLOADS[one_of("workload", options.get("workload", "queries"), WORKLOADS)].batch_sizes
    return Request(variants=variants, batch_sizes=tuple(batch_sizes_of(batch_sizes)), ways=ways, **options)


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

    def __init__(
        self, asked: Request, progress: Callable[[str], None], emit: Callable[[Cell], object] | None = None
    ) -> None:
        self.asked, self.progress, self.emit = asked, progress, emit
        self.started = time.perf_counter()
        self.device = pick_device()
        self.size = resolve_size(asked.size, self.device.type == "cuda")
        self.sources = {
            variant.name: _checked(variant, source_of(variant, self.size, asked.weights, self.device), asked.size)
            for variant in asked.variants
        }
        self.pages = Pages(asked.pages, asked.visual_tokens) if asked.workload == "pages" else None
        self.entries = self._entries()
        self.environment = environment(self.device)
        self.memories: dict[tuple[Entry, int], Memory | Failure] = {}
        name = f"sweep-{'-'.join(v.name.replace('/', '-') for v in asked.variants)}-{self.size}-{asked.workload}.jsonl"
        self.path = asked.output or outputs_folder() / name

    def _entries(self) -> list[Entry]:
        """Every variant in every way that its weights can go."""
        found: list[Entry] = []
        for way in self.asked.ways:
            packed = {name: source.quantization is not None for name, source in self.sources.items()}
            going = [Entry(name, one) for name in self.sources if (one := way.of_weights(packed[name]))]
            if not going or (way.backend not in ("auto", "torch", *EIGHT_BIT) and not any(packed.values())):
                kind = "packed" if not any(packed.values()) else "16-bit"
                raise BadInput(
                    f"backend {way.backend!r} multiplies {kind} weights; valid for 16-bit weights: auto, torch, and in "
                    "execution fast fp8"
                )
            found += [entry for entry in going if entry not in found]
        return found

    def run(self) -> list[Cell]:
        """The cells of the request, those already in the file among them, in the order asked."""
        done_mark = neighbour(self.path, "result.json")
        with Store(self.path, self._keeps, self.emit) as store:
            done_mark.unlink(missing_ok=True)
            if store.superseded:
                self.progress(f"{len(store.superseded)} earlier rows moved beside the file, to *.superseded.jsonl")
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
                cells = [known[entry, batch] for batch in self.asked.batch_sizes for entry in self.entries]
            fresh = [cell for cell in cells if cell.timing and cell not in found.values()]
            spent = {
                "wall_s": round(time.perf_counter() - self.started, 1),
                "timed_s": round(sum(sum(cell.step_s) + sum(cell.control_s) for cell in fresh), 1),
            }
            self.progress(f"{spent['wall_s']} s in all, {spent['timed_s']} s of them in timed steps")
            write_result(done_mark, self.path, cells, spent)
        return cells

    def _on_card(self, entry: Entry, card: Card, store: Store) -> Cell:
        """The cell of the largest batch of a model under the cap of `card`, found by trying, and run several times."""
        known = [cell for (one, _), cell in self._found(store.cells).items() if one == entry]
        if known:
            return known[0]
        cap_bytes, outside_bytes = set_cap(card, self.device)
        tried: dict[int, str] = {}
        broken: list[Failure] = []

        def outcome_of(batch: int) -> str:
            assert isinstance(loaded, Loaded)
            outcome = self._memory(entry, loaded, batch)
            if isinstance(outcome, Failure) and outcome.status == "failed":
                broken.append(outcome)  # a defect, which says nothing of the memory
            return outcome.status if isinstance(outcome, Failure) else "ok"

        def runs(batch: int) -> bool:
            tried[batch] = outcome_of(batch)
            return tried[batch] == "ok"

        loaded = self._load(entry)
        found = largest_running(runs) if isinstance(loaded, Loaded) else 0
        batch, verified = max(1, int(found * (1 - MARGIN))), 0
        while found and verified < VERIFIED_RUNS:
            verified = sum(outcome_of(batch) == "ok" for _ in range(VERIFIED_RUNS))
            if verified == VERIFIED_RUNS or batch == 1:
                break
            batch = max(1, min(batch - 1, int(batch * (1 - MARGIN))))
        if broken:
            loaded = broken[0]
        if isinstance(loaded, Loaded):
            (cell,) = self._cells({entry: loaded}, batch)
        else:
            cell = self._lost_cell(entry, batch, loaded)
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
        entries = [entry for entry in self.entries if any(entry in wanted for wanted in todo.values())]
        firsts = list({entry.model: entry for entry in entries}.values())
        if not entries:
            return
        models: dict[Any, Loaded] = {}
        lost: dict[Any, Failure] = {}
        if self.device.type == "cuda" and len(firsts) > 1:
            # The allocator counts all models of a process, so each one's memory is measured while it is alone.
            for first in firsts:
                alone = self._load(first)
                if isinstance(alone, Failure):
                    lost[first.model] = alone
                else:
                    of_it = [entry for entry in entries if entry.model == first.model]
                    self.memories |= {
                        (entry, b): self._memory(entry, alone, b) for entry in of_it for b in todo if entry in todo[b]
                    }
                del alone
                free(self.device)
        for first in (first for first in firsts if first.model not in lost):
            loaded = self._load(first)
            if isinstance(loaded, Loaded):
                models[first.model] = loaded
            elif loaded.status == "oom" and models:
                self.progress(f"the models do not fit together ({loaded.reason}); each is timed alone")
                models.clear()
                free(self.device)
                for one in firsts:
                    alone_todo = {batch: [e for e in todo[batch] if e.model == one.model] for batch in todo}
                    self._measure({batch: wanted for batch, wanted in alone_todo.items() if wanted}, store)
                    free(self.device)
                return
            else:
                lost[first.model] = loaded
        for batch, wanted in todo.items():
            store.add(self._lost_cell(entry, batch, lost[entry.model]) for entry in wanted if entry.model in lost)
            store.add(self._cells({entry: models[entry.model] for entry in wanted if entry.model in models}, batch))

    def _load(self, entry: Entry) -> Loaded | Failure:
        source, way = self.sources[entry.variant], entry.way
        how = load_fast if way.execution == "fast" else load
        loaded = attempt(lambda: how(source, self.device, way.backend, self.asked.dtype), self.device)
        if isinstance(loaded, Loaded):
            kernels = ", ".join(f"{kernel} x {count}" for kernel, count in loaded.engaged.items())
            unused = f"; left out, never called: {', '.join(loaded.left_out)}" if loaded.left_out else ""
            self.progress(
                f"{entry}: {loaded.weights}; {loaded.dtype}; text linears on {kernels}; "
                f"{self.environment.device}{unused}"
            )
        return loaded

    def _lost_cell(self, entry: Entry, batch: int, outcome: Failure) -> Cell:
        """The row of a model that does not load."""
        cell = self._cell(entry, None, self._plain_workload(batch), outcome, None, [], None)
        self.progress(_line(cell))
        return cell

    def _batches(self, loaded: Loaded, batch: int) -> Any:
        asked, config, tokenizer = self.asked, loaded.model.config, loaded.tokenizer
        if self.pages:
            return self.pages.batches(config, tokenizer, batch, asked.samples, self.device, self.progress)
        return query_batches(config, tokenizer, batch, asked.texts, asked.samples, self.device)

    def _memory(self, entry: Entry, loaded: Loaded, batch: int) -> Memory | Failure:
        def work() -> Memory:
            # A peak is that of the longest batch, which a cycle through all batches meets.
            inputs = [max(self._batches(loaded, batch).inputs, key=lambda one: one["input_ids"].shape[1])]
            return measure(loaded, inputs, self._steps(entry, loaded, inputs))

        return attempt(work, self.device)

    def _steps(self, entry: Entry, loaded: Loaded, inputs: Any) -> Steps:
        return Steps(loaded.model, inputs, entry.way.execution, entry.way.protocol)

    def _cells(self, models: dict[Entry, Loaded], batch: int) -> list[Cell]:
        """The row of each model at this batch size: memory first, then all that fit timed in turn."""
        before = gpu_state(self.device)
        memories = {
            entry: self.memories.get((entry, batch)) or self._memory(entry, loaded, batch)
            for entry, loaded in models.items()
        }
        fitting = {entry: models[entry] for entry, memory in memories.items() if isinstance(memory, Memory)}
        batches = {}
        for entry, loaded in tuple(fitting.items()):
            made = attempt(lambda loaded=loaded: self._batches(loaded, batch), self.device)  # type: ignore[misc]
            if isinstance(made, Failure):
                memories[entry] = made
                del fitting[entry]
            else:
                batches[entry] = made
        steps: dict[Any, Steps] = {
            entry: self._steps(entry, loaded, batches[entry].inputs) for entry, loaded in fitting.items()
        }
        # The first model of each way a second time: an A/A control, which must come out as the same.
        first = next(iter(self.sources))
        twice = [entry for entry in fitting if entry.variant == first and entry.way.backend not in EIGHT_BIT]
        for entry in twice if self.asked.control else ():
            steps[_control(entry)] = self._steps(entry, fitting[entry], batches[entry].inputs)
        samples = time_in_turn(steps, self.device, self.asked.patience)
        in_turn = [entry for entry in fitting if samples[entry].error is None]
        for entry in set(fitting) - set(in_turn) if len(samples) > 1 else ():
            # It may be the others that took the room: once more, alone.
            for step in steps.values():
                step.output = None
            free(self.device)
            samples |= time_in_turn({entry: steps[entry]}, self.device, self.asked.patience)
        del steps
        free(self.device)
        states = None if before is None else {"before": before, "after": gpu_state(self.device) or {}}
        cells = []
        for entry, loaded in models.items():
            workload = batches[entry].workload if entry in batches else self._plain_workload(batch)
            control = samples.get(_control(entry))
            cell = self._cell(entry, loaded, workload, memories[entry], samples.get(entry), in_turn, states)
            if cell.status == "ok":
                more: dict[str, Any] = {"control_s": control.step_s if control else []}
                if self.pages:
                    step = self._steps(entry, loaded, batches[entry].inputs)
                    more["towers"] = time_towers(step, loaded.model.vlm.model.visual, self.device)
                parent = _parent(entry, fitting)
                if parent:
                    more["difference"] = self._difference(entry, parent, fitting, batches[entry].inputs[0])
                cell = cell.model_copy(update=more)
            self.progress(_line(cell))
            cells.append(cell)
        return cells

    @torch.no_grad()
    def _difference(self, entry: Entry, parent: Entry, models: dict[Entry, Loaded], inputs: Any) -> Difference:
        """How far the token embeddings of `entry` are from those of `parent`, on the same batch."""
        both = []
        for one in (entry, parent):
            step = self._steps(one, models[one], [inputs])
            step()
            both.append(step.output.embeddings[inputs["attention_mask"].bool()].float())
        cosine = torch.nn.functional.cosine_similarity(both[0], both[1], dim=-1)
        return Difference(against=str(parent), cosine_mean=cosine.mean().item(), cosine_least=cosine.min().item())

    def _plain_workload(self, batch: int) -> Workload:
        if self.pages:
            label, budget = self.pages.label, self.pages.visual_tokens
            return Workload(kind="pages", batch_size=batch, pages=label, visual_tokens=budget)
        return Workload(kind="queries", batch_size=batch, texts=self.asked.texts)

    @cached_property
    def limits(self) -> Limits | None:
        return None if self.asked.card else measured_limits(self.device)

    def _cell(
        self,
        entry: Entry,
        loaded: Loaded | None,
        workload: Workload,
        memory: Memory | Failure,
        samples: Samples | None,
        in_turn: list[Entry],
        states: dict[str, dict[str, Any]] | None,
    ) -> Cell:
        outcome = memory if isinstance(memory, Failure) else None
        if samples is not None and samples.error is not None:
            outcome = failure_of(samples.error)
        timed = samples is not None and outcome is None
        others = [other for other in in_turn if other != entry and entry in in_turn]
        schedules = getattr(getattr(loaded and loaded.model, "fast", None), "chosen", {})
        rows = workload.batch_size * bucket(workload.tokens or 1)
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
                engaged=loaded.engaged if loaded else {},
                dtype=loaded.dtype if loaded else None,
                requested_dtype=self.asked.dtype,
                kept_16bit=loaded.kept_16bit if loaded else {},
                schedules={name: one for name, one in schedules.items() if name.endswith(f" x {rows}")},
            ),
            status=outcome.status if outcome else "ok",  # type: ignore[arg-type]
            reason=outcome.reason if outcome else None,
            step_s=samples.step_s if samples else [],
            items_per_s=rate_of(samples.step_s, workload.batch_size) if timed and samples else None,
            memory=memory if isinstance(memory, Memory) else None,
            limits=self.limits,
            timing=Timing(
                warmup_steps=samples.warmup_steps,
                steady=samples.steady,
                stopped=samples.stopped,
                in_turn_with=list(dict.fromkeys(other.variant for other in others)),
                ways_in_turn=[str(other) for other in others],
                clock=CLOCK,
            )
            if timed and samples
            else None,
            gpu_state=states,
            environment=self.environment,
        )


def _control(entry: Entry) -> tuple[str, Entry]:
    """The name of the A/A control of `entry` among what is timed in turn."""
    return "control", entry


def _parent(entry: Entry, among: Iterable[Entry]) -> Entry | None:
    """For a kernel with 8-bit activations, the same variant run with 16-bit ones; None for others, or without one."""
    if entry.way.backend not in EIGHT_BIT:
        return None
    plain = [one for one in among if one.variant == entry.variant and one.way.backend not in EIGHT_BIT]
    return plain[-1] if plain else None


def _checked(variant: Variant, source: Source, asked_size: str) -> Source:
    """`source`, if it is what the variant and the size say."""
    if variant.folder is None and "/" not in variant.name and bool(variant.scheme) != bool(source.quantization):
        found = "quantised" if source.quantization else "16-bit"
        raise Unmet(f"{source.label} holds {found} weights, which is not {variant.name}; name it as a model instead")
    if asked_size != "auto" and source.size != asked_size:
        raise BadInput(f"{source.label} is of size {source.size}, not {asked_size}; valid: auto, or that size")
    return source


def _asked_for(cell: Cell) -> tuple[str | None, ...]:
    work = cell.workload
    texts = "report" if work.texts and work.texts.startswith("drawn") else work.texts
    return work.budget, work.pages or texts, cell.backend.requested_dtype, cell.card.name if cell.card else None


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
    steps = f"{len(cell.step_s)} steps, {cell.timing.stopped}"
    return f"{head}{cell.items_per_s.median:.1f} items/s, peak {cell.memory.peak_bytes / MIB:.1f} MiB ({steps})"


def write_result(path: Path, records: Path, cells: list[Cell], spent: dict[str, float]) -> None:
    """The mark of a sweep that ended: its counts and its file, written last and whole."""
    counts = {status: sum(cell.status == status for cell in cells) for status in ("ok", "oom", "failed")}
    text = json.dumps({"complete": True, "records": records.name, "cells": len(cells), **counts, **spent}, indent=1)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def sweep(
    asked: Request, progress: Callable[[str], None] = to_stderr, emit: Callable[[Cell], object] | None = None
) -> list[Cell]:
    """The cells of `asked`, measured on this machine's device; those in its file already are kept.

    `emit` is called with each new cell as soon as it is on file.

    Raises:
        BadInput: a wrong value, or a file that cannot be written.
        Unmet: no weights, or no kernel for them.
    """
    return Sweep(asked, progress, emit).run()
