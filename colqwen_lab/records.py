"""The values that travel: a cell is what was measured, predicted or published of one variant at one batch size.

Cells live in JSON-lines files, one a line, appended and flushed as they are measured. This module knows nobody:
reading, writing and comparing records never imports torch. Bytes are bytes, seconds are seconds; MiB are for screens.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from colqwen_lab.errors import BadInput, LabError, Unmet, shown
from colqwen_lab.settings import DATA

MIB = 2**20
GIB = 2**30
PUBLISHED = "published"
HEAD = '{"schema":1,'  # how each line of a records file begins
GOES_ON = "what was measured is on file, and the same command goes on from there"

# Bounds within which every figure that a report derives is finite, and a table can hold it.
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Figure = Annotated[float, Field(ge=-1e9, lt=1e9)]
Measured = Annotated[float, Field(gt=1e-9, lt=1e9)]  # seconds, or items a second
Speed = Annotated[float, Field(ge=1, lt=1e21)]
Origin = Literal["measured", "predicted", "published"]


class Value(BaseModel):
    """Frozen, and strict: an unknown field or a wrong type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False)

    def to_line(self) -> str:
        return self.model_dump_json(by_alias=True) + "\n"


V = TypeVar("V", bound=Value)


class Workload(Value):
    """What one step embeds. `tokens` is the padded length of the longest batch, `padded_share` of all tokens.

    Of pages: the budget of `visual_tokens`, what `pages` they are, how many `distinct` ones, how many files were
    `refused`, the bytes of index of one, and the seconds that reading and processing one take, outside the step.
    """

    kind: Literal["queries", "pages"]
    batch_size: Positive
    tokens: Positive | None = None
    texts: str | None = None
    padded_share: float | None = Field(default=None, ge=0, le=1)
    visual_tokens: Positive | None = None
    pages: str | None = None
    distinct: Count | None = None
    refused: Count | None = None
    index_bytes: Count | None = None
    preprocess_s: Figure | None = None

    @property
    def budget(self) -> str:
        """What tells the pages of one budget from those of another; "queries" where there is none."""
        return f"{self.kind} of {self.visual_tokens} visual tokens" if self.visual_tokens else self.kind


class Backend(Value):
    """The kernel asked for, and the kernels that engaged: how many text linears each multiplies.

    `schedules` says, by product and rows, which of a kernel's schedules was fastest and is used.
    """

    requested: str
    engaged: dict[str, Count] = {}
    dtype: str | None = None
    requested_dtype: str | None = None
    kept_16bit: dict[str, Count] = {}
    schedules: dict[str, str] = {}


class Rate(Value):
    """Items per second: the median, with a 95 % interval of it where samples allow one."""

    median: Measured
    low: Measured | None = None
    high: Measured | None = None


class Memory(Value):
    """Bytes on the device. `peak` is the allocator's on CUDA, tracked from the tensors on a CPU, or predicted.

    `ledger` names the parts of the peak; they add up to it. `least_reserved`, of a prediction, is what torch must be
    allowed to reserve for the run to go through: the peak, and the free pieces between.
    """

    weights_bytes: Count | None = None
    resident_bytes: Count | None = None
    peak_bytes: Positive
    reserved_bytes: Count | None = None
    least_reserved_bytes: Count | None = None
    device_bytes: Count | None = None
    allocation_retries: Count | None = None
    ledger: dict[str, Whole] | None = None
    method: Literal["cuda", "tracked", "published", "predicted"]


class Work(Value):
    """What one step computes and the fewest bytes it can move, counted on the prediction's own run."""

    flops: Count
    least_bytes: Positive


class Limits(Value):
    """What the device reached in the same run: a large 16-bit product, and a copy, counting bytes read and written."""

    flops_per_s: Speed
    bytes_per_s: Speed


class Towers(Value):
    """Seconds of a step within the vision tower, and in all the rest; measured in a pass of its own."""

    vision_s: Figure
    decoder_s: Figure


class Difference(Value):
    """Cosine of the token embeddings to those of the same weights at 16-bit activations, on one batch."""

    against: str
    cosine_mean: Figure
    cosine_least: Figure


class CardRun(Value):
    """A cell measured under the cap of a smaller card: which, the bytes torch might take, and what was tried."""

    name: str
    nominal_bytes: Count
    cap_bytes: Count
    outside_bytes: Count
    method: str
    tried: dict[Count, str]
    verified_runs: Count


class Timing(Value):
    """How the samples were taken: steps thrown away first, why it stopped, and who was timed in turn with it."""

    warmup_steps: Count
    steady: bool
    stopped: str
    in_turn_with: list[str] = []
    ways_in_turn: list[str] = []
    clock: str


class Environment(Value):
    """The machine and the versions. No host, user or folder names."""

    gpu: str | None = None
    gpu_memory_bytes: Count | None = None
    compute_capability: str | None = None
    driver: str | None = None
    cuda: str | None = None
    power_limit_w: Figure | None = None
    cpu: str | None = None
    threads: Count | None = None
    host_memory_bytes: Count | None = None
    os: str | None = None
    python: str | None = None
    torch: str | None = None
    transformers: str | None = None
    auto_round: str | None = None
    attention: str | None = None
    code: str | None = None
    commit: str | None = None
    started_at: str | None = None

    @property
    def device(self) -> str:
        """The GPU, or the CPU where there is none: the name a figure carries."""
        return self.gpu or self.cpu or "unknown device"

    def identity(self) -> dict[str, Any]:
        """All that must be equal for two cells to belong to one sweep: everything but the commit and the hour.

        Host memory is left out too: machines of one type show it a few pages apart.
        """
        return self.model_dump(exclude={"commit", "started_at", "host_memory_bytes"})


class Cell(Value):
    """One variant at one batch size, and its outcome: ok, out of memory (oom) or failed, each with its reason.

    `control_s` are step times of the very same model, timed in turn with it as if it were another (A/A). `notes` say
    what was noticed meanwhile that may have disturbed it.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    origin: Origin
    source: str = "colqwen-lab"
    variant: str
    size: str
    weights: str
    workload: Workload
    execution: str
    protocol: str
    backend: Backend
    status: Literal["ok", "oom", "failed"]
    reason: str | None = None
    step_s: list[Measured] = []
    control_s: list[Measured] = []
    items_per_s: Rate | None = None
    memory: Memory | None = None
    work: Work | None = None
    limits: Limits | None = None
    difference: Difference | None = None
    towers: Towers | None = None
    card: CardRun | None = None
    timing: Timing | None = None
    gpu_state: dict[str, dict[str, Any]] | None = None
    notes: list[str] = []
    environment: Environment

    @property
    def batch_size(self) -> int:
        return self.workload.batch_size

    def settings(self) -> tuple[str, ...]:
        """What two series must share to be compared at equal batch: size, workload, pages, execution, protocol."""
        work = self.workload
        what = f"{work.budget} ({work.pages})" if work.pages else work.budget
        return (self.size, what, self.execution, self.protocol)

    def key(self) -> tuple[str, ...]:
        """What makes this cell this cell, within one environment. A sweep holds each key once."""
        work = self.workload
        asked = (self.backend.requested, self.backend.requested_dtype or "", work.texts or "", str(work.batch_size))
        return (self.variant, self.weights, *self.settings(), *asked, self.card.name if self.card else "")


def rate_of(step_s: Sequence[float], items: int) -> Rate:
    """Items per second of `items` a step from the step times: the median and its 95 % interval.

    The interval is the distribution-free one from order statistics (binomial ranks), so it assumes nothing of the
    samples' shape; below six samples no pair of ranks covers 95 % and it is left out.
    """
    times = sorted(step_s)
    n = len(times)
    median = statistics.median(times)
    tail, rank = 0.0, 0
    while rank < n and tail + math.comb(n, rank) / 2**n <= 0.025:
        tail += math.comb(n, rank) / 2**n
        rank += 1
    if rank == 0:
        return Rate(median=items / median)
    return Rate(median=items / median, low=items / times[n - rank], high=items / times[rank - 1])


def listed(value: Any) -> list[Any]:
    """The items of "a,b", of a list, or of one value."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, Iterable) else [value]


def batch_sizes_of(value: str | int | Iterable[int]) -> list[int]:
    """Batch sizes from "8,16", 8 or [8, 16].

    Raises:
        BadInput: not positive whole numbers, none at all, or one twice.
    """
    try:
        parts = value.strip("[ ]").split(",") if isinstance(value, str) else listed(value)
        sizes = [int(str(part).strip()) for part in parts if str(part).strip() or len(parts) > 1]
    except (TypeError, ValueError):
        sizes = []
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise BadInput(f"batch sizes {value!r}; valid: different whole numbers of 1 or more, such as 8,16,32")
    return sizes


# ---------------------------------------------------------------- files


def read_cells(source: str | Path) -> list[Cell]:
    """The cells of a file, or of the report for the word `published`.

    Takes JSON lines written here and the JSON document that the report's own script writes. A torn last line (a
    sweep killed while writing) is left out, with a warning.

    Raises:
        BadInput: no such file, or one that is not a records file; the line is named.
    """
    if str(source) == PUBLISHED:
        return published_cells()
    path = Path(source)
    cells = _cells_of(path)
    if not cells:
        raise BadInput(f"{path} holds no cell; a records file is JSON lines written by `colqwen-lab sweep`")
    return cells


def _cells_of(path: Path, say: Callable[[str], None] | None = None, own: bool = False) -> list[Cell]:
    """The cells of a file; `own` refuses another tool's JSON, which a sweep would overwrite."""
    try:
        whole, newline, torn = path.read_bytes().rpartition(b"\n")
        text = (whole + newline).decode() + torn.decode(errors="replace")  # torn within a character, perhaps
    except FileNotFoundError:
        raise BadInput(f"no records file {path}; name one that a sweep wrote, or the word {PUBLISHED}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as a records file: {error}") from None
    document = None
    with suppress(ValueError, RecursionError):
        document = json.loads(text)
    if isinstance(document, dict) and "results" in document:
        if own:
            raise BadInput(f"{path} is another tool's JSON, which a sweep would overwrite; name another file")
        return _script_cells(document)
    *complete, last = text.split("\n")
    cells: list[Cell] = []
    for number, line in enumerate([*complete, last] if last else complete, 1):
        try:
            cells.append(read_line(Cell, line, f"{path} line {number} is not a", f"sweep`, or {PUBLISHED}"))
        except BadInput:
            if number <= len(complete) or not (cells or last.startswith(HEAD) or HEAD.startswith(last)):
                raise
            said = f"{path}: the last line is torn and left out; a sweep was killed while it wrote it"
            (say or warnings.warn)(shown(said))
    return cells


def read_line(kind: type[V], line: str, what: str, valid: str) -> V:
    """The record of this kind in one line. Raises BadInput, which names the first wrong field."""
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(".".join(str(part) for part in first["loc"]).split())[:100] or "the line"
        said = f"{what} record: {where}: {first['msg']}; valid: JSON lines by `colqwen-lab {valid}"
        raise BadInput(said) from None


def neighbour(path: Path, kind: str) -> Path:
    """The file of this kind beside a records file: beside `rows.jsonl`, `rows.result.json`."""
    path = _real(path)
    return path.with_suffix(f".{kind}") if path.suffix == ".jsonl" else path.with_name(f"{path.name}.{kind}")


def _real(path: Path) -> Path:
    """`path` without links. Raises BadInput where no file can have this name."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise BadInput(f"{path} is no name of a file: {error}; valid: another name, such as rows.jsonl") from None


def own_file(path: Path) -> Path:
    """The file behind `path`, which is locked and replaced under its own name.

    Raises:
        BadInput: the name of what lies beside another records file, or that no file can have.
    """
    found = _real(path)
    if found.name.endswith((".superseded.jsonl", ".result.json", ".lock", ".tmp")):
        raise BadInput(f"{path} is named as what lies beside a records file; valid: another name, such as rows.jsonl")
    return found


@contextmanager
def writing(path: Path, kind: type[LabError] = Unmet, do: str = GOES_ON) -> Iterator[None]:
    """Around each write to a records file, or beside it. Raises `kind` where it cannot be written any more."""
    try:
        yield
    except OSError as error:
        raise kind(f"cannot write {path}: {error.strerror or error}; {do}") from None


opening = partial(writing, kind=BadInput, do="name a file in a folder you can write")  # the same before a run


@contextmanager
def locked(path: Path, who: str, say: Callable[[str], object] | None = None, then: str = "") -> Iterator[None]:
    """While a records file is this process's alone; another is waited for, and `say` hears of it.

    Raises:
        BadInput: another holds it, and there is no `say`.
    """
    lock = FileLock(f"{own_file(path)}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        if say is None:
            raise BadInput(f"{who} writes to {path}; wait for it or name another file") from None
        say(f"{who} writes to {path}; waiting for it{then}")
        held = lock.acquire()
    with held:
        yield


class Store:
    """The records file of one sweep: what is kept of it, and an append that survives a kill and a full disk.

    Only rows for which `keep` holds stay; the others (another environment, a failure to be tried again, everything
    with `fresh`) move to `NAME.superseded.jsonl` beside it, so nothing measured is ever lost. A context manager: one
    process at a time holds the file; with `say`, which takes a line for a person, another one is waited for. `emit` is
    called with each new row once it is on disk.

    Raises:
        BadInput: the file is not a records file or not named as one, its folder cannot be written, or another sweep
            holds it.
        Unmet: the disk is full; also of `add` and `set_aside`.
    """

    def __init__(
        self,
        path: Path,
        keep: Callable[[Cell], bool],
        emit: Callable[[Cell], object] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.path, self._emit = own_file(path), emit
        with opening(path), ExitStack() as held:  # released now: a traceback that a notebook keeps would hold it
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path, "another sweep", say, ", then going on from its rows"))
            self.cells = _cells_of(path, say, own=True) if path.exists() else []
            self.superseded = self.set_aside(lambda cell: not keep(cell))
            self._held = held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def add(self, cells: Iterable[Cell]) -> None:
        """Append `cells`; they are on disk when this returns."""
        new = list(cells)
        with writing(self.path):
            append(self.path, new)
        self.cells.extend(new)
        if self._emit:
            for cell in new:
                self._emit(cell)

    def set_aside(self, gone: Callable[[Cell], bool]) -> list[Cell]:
        """Move the rows for which `gone` holds to the file beside this one; they are what is returned."""
        aside = [cell for cell in self.cells if gone(cell)]
        kept = [cell for cell in self.cells if not gone(cell)]
        with writing(self.path):
            if aside:
                append(neighbour(self.path, "superseded.jsonl"), aside)
            replace(self.path, kept)
        self.cells = kept
        return aside


def append(path: Path, records: Iterable[Value]) -> None:
    """Append whole lines, on disk when this returns; where that fails, none of them."""
    left = "".join(one.to_line() for one in records).encode()
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def sync(path: Path) -> None:
    """What a file or a folder holds, on disk when this returns; of a folder the names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def replace(path: Path, records: Iterable[Value]) -> None:
    """The file of these lines alone, on disk when this returns; where that fails, the file as it was."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        append(temporary, records)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_cells(path: Path, cells: Iterable[Cell]) -> None:
    """The file of these cells alone; where that fails, the file as it was.

    Raises:
        BadInput: a sweep holds the file, it cannot be written, or it is named as what lies beside one.
    """
    with writing(path, BadInput, "name a file that can be written"), locked(path, "a sweep"):
        replace(own_file(path), cells)


# ---------------------------------------------------------------- figures from elsewhere


AS_REPORTED: Any = {"execution": "eager", "protocol": "published", "status": "ok"}


def published_report() -> dict[str, Any]:
    """The report's figures and claims as data (`data/a100_4b.json`)."""
    return json.loads((DATA / "a100_4b.json").read_text(encoding="utf-8"))


def published_cells() -> list[Cell]:
    """The report's sweep as cells of origin `published`. It gives no samples, so no intervals."""
    report = published_report()
    machine = report["environment"]
    environment = Environment(gpu=machine["gpu"], cuda=machine["cuda"], attention=machine["attention"])
    return [
        Cell(
            origin="published",
            source=report["source"],
            variant=variant,
            size="4b",
            weights=f"hub:{report['models'][variant]['checkpoint']}",
            workload=Workload(kind="queries", batch_size=row["batch_size"], texts="report"),
            backend=Backend(requested="auto", dtype="float16"),
            items_per_s=Rate(median=float(row["items_per_s"])),
            memory=Memory(peak_bytes=row["peak_mib"] * MIB, method="published"),
            environment=environment,
            **AS_REPORTED,
        )
        for variant, rows in report["sweep"].items()
        for row in rows
    ]


SCRIPT_NAMES = {"base": "BASE", "awq": "AWQ"}


def script_json(cells: Iterable[tuple[str, Cell]], metadata: dict[str, Any]) -> dict[str, Any]:
    """The document that the report's `benchmark.py` writes, from named cells. Its MB are MiB, as the report's are."""
    results = {}
    for name, cell in cells:
        if cell.items_per_s is None or cell.memory is None or not cell.step_s:
            continue
        times = cell.step_s
        results[name] = {
            "scenario": name,
            "total_items": cell.batch_size * len(times),
            "total_time_s": sum(times),
            "throughput_items_per_s": cell.batch_size * len(times) / sum(times),
            "latency_mean_ms_per_batch": 1000 * statistics.fmean(times),
            "latency_std_ms_per_batch": 1000 * statistics.pstdev(times),
            "cuda_memory_allocated_MB": (cell.memory.resident_bytes or 0) / MIB,
            "cuda_max_memory_allocated_MB": cell.memory.peak_bytes / MIB,
            "cuda_max_memory_reserved_MB": (cell.memory.reserved_bytes or 0) / MIB,
        }
    return {"metadata": metadata, "results": results}


def _script_cells(document: dict[str, Any]) -> list[Cell]:
    """Cells of a document by the report's script. It keeps no samples: only the mean rate, and no interval."""
    cells = []
    variants = {label: variant for variant, label in SCRIPT_NAMES.items()}
    try:
        metadata = document.get("metadata", {})
        for name, row in document["results"].items():
            head, _, tail = name.rpartition("_bs")
            prefix = name.split("_", 1)[0]
            pages = "image" in name
            batch = int(tail) if head else int(metadata[f"{'image' if pages else 'text'}_batch_size"])
            variant = variants.get(prefix, prefix.lower())
            weights = metadata.get("weights", "hub")
            peak_bytes = round(float(row["cuda_max_memory_allocated_MB"]) * MIB)
            machine = {"gpu": metadata.get("gpu"), "cuda": metadata.get("cuda_version"), "cpu": metadata.get("cpu")}
            cells.append(
                Cell(
                    origin="measured",
                    source="the report's script",
                    variant=variant,
                    size=str(metadata.get("size", "4b")),
                    weights=weights[variant] if isinstance(weights, dict) else str(weights),
                    workload=Workload(kind="pages" if pages else "queries", batch_size=batch, texts="report"),
                    backend=Backend(requested="auto"),
                    items_per_s=Rate(median=float(row["throughput_items_per_s"])),
                    memory=Memory(peak_bytes=peak_bytes, method=metadata.get("memory_method") or "cuda"),
                    environment=Environment(**machine),
                    **AS_REPORTED,
                )
            )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadInput(f"not a document of the report's script: {type(error).__name__}: {str(error)[:80]}") from None
    return cells
