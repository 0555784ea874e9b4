"""The values that travel between rooms, and the append-only JSON-lines files that hold them.

A cell is one configuration at one batch size: measured, predicted or published. Reading and
comparing records never imports torch. Files hold bytes and seconds; screens show MiB.
"""

from __future__ import annotations

import codecs
import math
import os
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasGenerator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from colqwen_lab import report_script
from colqwen_lab.errors import BadInput, MissingRequirement, ambiguous, plain, shown
from colqwen_lab.sampling import alike, interval_rank
from colqwen_lab.settings import append, end_last_line, locked, regular_file, writing

MIB = 2**20
GIB = 2**30
# The fewest samples that give a 99th percentile.
LATENCY_STEPS = 200
RANDOM_TEXTS = "random ids at the report's lengths"
PUBLISHED = "published"
LINE_START = b'{"schema":1,'
RESUME = "finished rows are on file; run the same command again to resume"
# A row with a million samples and as many of a control has 40 MB.
MOST_LINE_BYTES, MOST_TEXT = 64 * MIB, 10_000
# A records file begins so; editors may put a byte-order mark or a blank line before.
FIRST_ROW = "(\ufeff)?" r"\s*(\Z|\{ *\")"

# Bounds that keep every derived figure finite.
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Figure = Annotated[float, Field(ge=-1e9, lt=1e9)]
Measured = Annotated[float, Field(gt=1e-9, lt=1e9)]  # seconds, or items per second
Speed = Annotated[float, Field(ge=1, lt=1e21)]
# One line without control characters, short enough for a table.
Text = Annotated[str, AfterValidator(lambda text: plain(text[:MOST_TEXT]))]
Origin = Literal["measured", "predicted", "published"]
# Keys of earlier records that are read as today's.
RENAMED = {
    "breakdown": "ledger",
    "cosine_min": "cosine_least",
    "interference": "notes",
    "interleaved_configurations": "ways_in_turn",
    "interleaved_with": "in_turn_with",
    "kernel_configs": "schedules",
    "language_model_s": "decoder_s",
    "min_bytes": "least_bytes",
    "min_reserved_bytes": "least_reserved_bytes",
    "skipped": "refused",
    "stages": "towers",
    "vision_encoder_s": "vision_s",
}


def _keys(name: str) -> str | AliasChoices:
    return AliasChoices(name, RENAMED[name]) if name in RENAMED else name


class Value(BaseModel):
    """Frozen and strict: an unknown field or a wrong type is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        populate_by_name=True,
        allow_inf_nan=False,
        alias_generator=AliasGenerator(validation_alias=_keys),
    )

    def to_line(self) -> str:
        """The JSON line of this value, newline included."""
        return self.model_dump_json(by_alias=True) + "\n"


class Configuration(Value):
    """How a variant runs: execution x protocol x kernel x dtype."""

    variant: Text
    execution: Text = "eager"
    protocol: Text = "lean"
    kernel: Text = "auto"
    dtype: Text | None = "bfloat16"

    @property
    def label(self) -> str:
        """EXECUTION/PROTOCOL/KERNEL, as `sweep --configuration` takes it."""
        return f"{self.execution}/{self.protocol}/{self.kernel}"

    @property
    def eight_bit(self) -> bool:
        """Whether this configuration asks for 8-bit activations."""
        return self.kernel in EIGHT_BIT_KERNELS

    def __str__(self) -> str:
        return f"{self.variant} {self.label}"


EIGHT_BIT_KERNELS = ("fp8", "w4-fp8", "w4-int8")


class Quantization(Value):
    """The scheme of packed weights, from the checkpoint's quantization_config."""

    bits: Positive
    group_size: int
    sym: bool


class Workload(Value):
    """The batches of a cell. `tokens` is the padded length of the longest batch.

    `padded_share` is the share of all tokens that is padding. For pages: `visual_tokens` is the
    budget, `distinct` the number of different pages, `skipped` the number of pages, files and
    folders that are not read, `index_bytes` the embeddings of one page, `preprocess_s` the time to
    read and process one page, outside the step. `shapes` numbers the shape of each batch: batches
    of one number cost the same.
    """

    kind: Literal["queries", "pages"]
    batch_size: Positive
    tokens: Positive | None = None
    texts: Text | None = None
    padded_share: float | None = Field(default=None, ge=0, le=1)
    visual_tokens: Positive | None = None
    pages: Text | None = None
    distinct: Count | None = None
    skipped: Count | None = None
    index_bytes: Count | None = None
    preprocess_s: Figure | None = None
    shapes: list[Count] = []

    @field_validator("texts", "pages")
    @classmethod
    def _renamed(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Earlier records call random ids and synthetic pages drawn."""
        today = "random ids" if info.field_name == "texts" else "synthetic"
        return value and re.sub("^drawn", today, value)

    @property
    def budget(self) -> str:
        """The kind, and for pages their budget of visual tokens."""
        if not self.visual_tokens:
            return self.kind
        return f"{self.kind} of {self.visual_tokens} visual tokens"


class Backend(Value):
    """The kernel requested, and the kernels used: kernel name to number of text linears.

    `kernel_configs` names the kernel config used by GEMM and M.
    """

    requested: Text
    engaged: dict[Text, Count] = {}
    dtype: Text | None = None
    requested_dtype: Text | None = None
    kept_16bit: dict[Text, Count] = {}
    kernel_configs: dict[Text, Text] = {}


class Rate(Value):
    """Items per second: the median, with its 95 % interval where samples allow one."""

    median: Measured
    low: Measured | None = None
    high: Measured | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not (self.low or 0) <= self.median * (1 + 1e-9) <= (self.high or math.inf) * (1 + 2e-9):
            raise ValueError(f"median {self.median:g} must lie within its interval, low to high")
        return self


class Memory(Value):
    """Bytes on the device. `breakdown` names the parts of the peak and adds up to it.

    `peak_bytes` comes from the CUDA allocator, from tracked tensors (CPU) or from a prediction.
    `min_reserved_bytes` (predictions): the least that torch must be allowed to reserve.
    `unused_head_bytes`: the untied language-model head, which protocol published keeps.
    """

    weights_bytes: Count | None = None
    resident_bytes: Count | None = None
    peak_bytes: Positive
    reserved_bytes: Count | None = None
    min_reserved_bytes: Count | None = None
    device_bytes: Count | None = None
    allocation_retries: Count | None = None
    unused_head_bytes: Count = 0
    breakdown: dict[Text, Whole] | None = None
    method: Literal["cuda", "tracked", "published", "predicted"]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        sizes = self.weights_bytes, self.resident_bytes, self.peak_bytes, self.reserved_bytes
        known = [size for size in sizes if size is not None]
        if known != sorted(known):
            raise ValueError("weights, resident, peak and reserved bytes must not fall")
        return self


class Work(Value):
    """What one step computes, and the fewest bytes it can move."""

    flops: Count
    min_bytes: Positive


class Limits(Value):
    """Rates measured in the same run: a large 16-bit GEMM, and a copy (bytes read + written)."""

    flops_per_s: Speed
    bytes_per_s: Speed


class Stages(Value):
    """Seconds of a step in the vision encoder and in the language model, from a separate pass."""

    vision_encoder_s: Figure
    language_model_s: Figure


class EndToEnd(Value):
    """Pages from files on disk to vectors on disk, in `seconds`, with `loaders` processes reading.

    The other times are seconds a page of a stage alone: `read_s` (read and decode) and `prepare_s`
    (resize, unless `on_device`) in one loader, `preprocess_s` and `embed_s` on the device,
    `store_s` (copy back and write).
    """

    loaders: Positive
    pages: Positive
    seconds: Measured
    on_device: bool
    read_s: Figure
    prepare_s: Figure
    preprocess_s: Figure
    embed_s: Figure
    store_s: Figure

    @property
    def items_per_s(self) -> float:
        """Pages a second, from the first file to the last vector."""
        return self.pages / self.seconds

    @property
    def stages(self) -> dict[str, float]:
        """The pages a second of each stage alone, all loaders together."""
        return {
            "reading": self.loaders / (self.read_s + self.prepare_s),
            "model": 1 / (self.preprocess_s + self.embed_s),
            "storing": 1 / self.store_s,
        }

    @property
    def bottleneck(self) -> str:
        """The slowest stage: reading, model or storing."""
        return min(self.stages, key=lambda name: self.stages[name])

    @property
    def loaders_needed(self) -> int:
        """The loaders that read as many pages as the slower of the other stages takes."""
        rates = self.stages
        return math.ceil(min(rates["model"], rates["storing"]) * (self.read_s + self.prepare_s))


class Energy(Value):
    """Joules an item by the driver's counter, over `seconds` of steps without a pause.

    `idle_w` is the power in watts of the GPU before the first models were loaded.
    """

    joules_per_item: Measured
    seconds: Measured
    idle_w: Figure


class Loading(Value):
    """Seconds until the model is on the device with its kernels, and those of the first step."""

    load_s: Measured
    first_step_s: Measured


class Latency(NamedTuple):
    """Percentiles of the time of a step in seconds."""

    p50_s: float
    p95_s: float
    p99_s: float


class Difference(Value):
    """Cosine of token embeddings to those with 16-bit activations, on one batch."""

    against: Text
    cosine_mean: Figure
    cosine_min: Figure


class CardRun(Value):
    """A cell measured under the memory cap of a smaller card: the cap, and the batches tried."""

    name: Text
    nominal_bytes: Count
    cap_bytes: Count
    outside_bytes: Count
    method: Text
    tried: dict[Count, Text]
    verified_runs: Count


class Timing(Value):
    """How the samples were taken: warm-up steps, why timing stopped, and what was interleaved.

    `min_steps` and `max_s` are the run's options. Step times repeat the batches in their order.
    """

    warmup_steps: Count
    steady: bool
    stopped: Text
    interleaved_with: list[Text] = []
    interleaved_configurations: list[Text] = []
    clock: Text
    min_steps: Count | None = None
    max_s: Figure | None = None


class Environment(Value):
    """The machine and the versions. No host, user or folder names."""

    gpu: Text | None = None
    gpu_memory_bytes: Count | None = None
    compute_capability: Text | None = None
    driver: Text | None = None
    cuda: Text | None = None
    power_limit_w: Figure | None = None
    cpu: Text | None = None
    threads: Count | None = None
    host_memory_bytes: Count | None = None
    os: Text | None = None
    python: Text | None = None
    torch: Text | None = None
    transformers: Text | None = None
    auto_round: Text | None = None
    attention: Text | None = None
    code: Text | None = None
    commit: Text | None = None
    started_at: Text | None = None

    @property
    def device(self) -> str:
        """The GPU's name, or the CPU's where there is no GPU."""
        return self.gpu or self.cpu or "unknown device"

    def identity(self) -> str:
        """What the cells of one sweep share: every field but commit, time and host memory.

        Machines of one type show host memory a few pages apart.
        """
        return self.model_dump_json(exclude={"commit", "started_at", "host_memory_bytes"})


class Row(Value):
    """A line of a records file: a value with a key and an environment."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    environment: Environment

    def key(self) -> tuple[str, ...]:
        """What identifies the row within one environment."""
        raise NotImplementedError

    def identity(self) -> tuple[object, ...]:
        """What identifies the row in a file: its key, and its environment's identity."""
        return self.key(), self.environment.identity()

    @property
    def figures(self) -> object:
        """What the row shows; None if it is to be measured again."""
        return None


class Cell(Row):
    """One configuration at one batch size, and its outcome: ok, out of memory (oom) or failed.

    `control_s` are step times of the same model a second time, interleaved as if it were another
    (A/A control). `interference` lists what may have disturbed the measurement.
    """

    origin: Origin
    source: Text = "colqwen-lab"
    variant: Text
    size: Text
    weights: Text
    quantization: Quantization | None = None
    workload: Workload
    execution: Text
    protocol: Text
    backend: Backend
    status: Literal["ok", "oom", "failed"]
    reason: Text | None = None
    step_s: Annotated[list[Measured], FailFast()] = []
    control_s: Annotated[list[Measured], FailFast()] = []
    items_per_s: Rate | None = None
    memory: Memory | None = None
    work: Work | None = None
    limits: Limits | None = None
    difference: Difference | None = None
    stages: Stages | None = None
    end_to_end: list[EndToEnd] = []
    energy: Energy | None = None
    loading: Loading | None = None
    card: CardRun | None = None
    timing: Timing | None = None
    gpu_state: dict[Text, dict[Text, Any]] | None = None
    interference: list[Text] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.step_s and self.items_per_s:
            steps = alike(self.step_s, self.workload.shapes)
            median, got = self.batch_size / statistics.median(steps), self.items_per_s.median
            if not math.isclose(median, got, rel_tol=1e-3):
                raise ValueError(
                    f"items_per_s must have the median of step_s, {median:g}, got {got:g}"
                )
        if self.variant == "base" and self.quantization:  # a folder of that name
            object.__setattr__(self, "variant", "./base")
        return self

    @property
    def batch_size(self) -> int:
        return self.workload.batch_size

    @property
    def latency(self) -> Latency | None:
        """Percentiles of the time of a single item; None with fewer than 200 samples."""
        if self.batch_size > 1 or len(self.step_s) < LATENCY_STEPS:
            return None
        parts = statistics.quantiles(self.step_s, n=100, method="inclusive")
        return Latency(parts[49], parts[94], parts[98])

    @property
    def disturbed(self) -> list[str]:
        """The interference that withholds a verdict: other processes, throttling, spilled memory.

        A GPU at its power limit is at full load, and a display alone changes no figure.
        """
        usual = ("power limit", "a display is attached")
        return [line for line in self.interference if not any(words in line for words in usual)]

    @property
    def figures(self) -> object:
        return None if self.status != "ok" or self.disturbed else (self.items_per_s, self.memory)

    @property
    def configuration(self) -> Configuration:
        """The configuration that was requested."""
        return Configuration(
            variant=self.variant,
            execution=self.execution,
            protocol=self.protocol,
            kernel=self.backend.requested,
            dtype=self.backend.requested_dtype,
        )

    def settings(self) -> tuple[str, ...]:
        """What two series must share to be compared: size, workload, execution, protocol."""
        work = self.workload
        pages = f" ({work.pages})" if work.pages else ""
        return (self.size, work.budget + pages, self.execution, self.protocol)

    def key(self) -> tuple[str, ...]:
        work, backend = self.workload, self.backend
        requested = (backend.requested, backend.requested_dtype or "", work.texts or "")
        card = self.card.name if self.card else ""
        return (
            *(self.origin, self.variant, self.weights, *self.settings()),
            *(*requested, str(work.batch_size), card),
        )


def rate_of(step_s: Sequence[float], items: int, shapes: Sequence[int] = ()) -> Rate:
    """Items per second of `items` a step: the median and its 95 % interval from order statistics.

    The interval uses binomial ranks, so it assumes nothing of the distribution. Fewer than six
    samples give no interval. Batches of several `shapes` are first made `alike`.
    """
    times = sorted(alike(step_s, shapes))
    median, rank = items / statistics.median(times), interval_rank(len(times))
    if rank == 0:
        return Rate(median=median)
    return Rate(median=median, low=items / times[-rank], high=items / times[rank - 1])


# ---------------------------------------------------------------- reading

R = TypeVar("R", bound=Row)


def read_cells(source: str | Path) -> list[Cell]:
    """The cells of a records file, of the report script's JSON, or of the word `published`.

    Of several rows with one key and environment the newest counts. A torn last line is skipped
    with a warning.
    Raises BadInput if there is no such file, or it is no records file; the line is named.
    """
    if source == PUBLISHED:
        if os.path.exists(PUBLISHED):
            raise ambiguous(PUBLISHED, "the report")
        return published_cells()
    path = _path_of(source)
    if (document := report_script.document_in(path)) is None:
        return read_rows(path, Cell, "sweep")
    try:
        return [Cell.model_validate(fields) for fields in report_script.cells(document)]
    except ValidationError as error:
        raise BadInput(f"{path} is not the report script's: {_fault_of(error)}") from None


def published_cells() -> list[Cell]:
    """The report's sweep as cells of origin `published`: no samples, so no intervals."""
    return [Cell.model_validate(fields) for fields in report_script.published()]


def read_rows(source: str | Path, kind: type[R], command: str) -> list[R]:
    """The newest rows of a file that `colqwen-lab command` wrote; BadInput if it holds none.

    A warning counts the rows that a later one replaces with other figures.
    """
    path = _path_of(source)
    rows, _ = _rows(path, kind, command)
    if not rows:
        raise BadInput(f"{path} holds no row; name a file written by `colqwen-lab {command}`")
    kept = newest(rows)
    if replaced := sum(row.figures not in (None, kept[row.identity()].figures) for row in rows):
        line = f"{path}: rows on file again with other figures: {replaced}; the last ones count"
        warnings.warn(shown(line), stacklevel=2)
    return list(kept.values())


def newest(rows: Iterable[R], kept: dict[Any, R] | None = None) -> dict[Any, R]:
    """`kept` with the newest row of each identity. One that failed replaces none that is ok."""
    kept = {} if kept is None else kept
    for row in rows:
        key = row.identity()
        if getattr(row, "status", "ok") == "ok" or getattr(kept.get(key), "status", "") != "ok":
            kept[key] = row
    return kept


def _path_of(source: str | Path) -> Path:
    if not isinstance(source, (str, Path)):
        raise BadInput(f"a records file must be named by a text, got {source!r}")
    path = Path(os.path.expanduser(source))
    regular_file(path)
    return path


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line of a file, without a byte-order mark, and the bytes up to its end."""
    try:
        with path.open("rb") as file:
            file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
            while line := file.readline(MOST_LINE_BYTES + 1):
                if len(line) > MOST_LINE_BYTES:
                    raise BadInput(f"{path} has a line of more than {MOST_LINE_BYTES} bytes")
                yield file.tell(), line
    except FileNotFoundError:
        raise BadInput(f"no records file {path}; name a file, or the word {PUBLISHED}") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read as a records file: {error}") from None


def _rows(
    path: Path, kind: type[R], command: str, progress: Callable[[str], None] | None = None
) -> tuple[list[R], int]:
    """The rows of a file, and its bytes without a torn last line."""
    rows: list[R] = []
    whole = 0
    for number, (end, line) in enumerate(_lines(path), 1):
        try:
            if line.strip():
                rows.append(kind.model_validate_json(line))
        except ValidationError as error:
            ours = rows or line.startswith(LINE_START) or LINE_START.startswith(line)
            torn = error.errors()[0]["type"] == "json_invalid" and not line.endswith(b"\n")
            if torn and ours:
                text = f"{path}: the last line is torn and skipped; a run was killed while writing"
                (progress or warnings.warn)(shown(text))
                break
            name, advice = kind.__name__.lower(), f"name a file written by `colqwen-lab {command}`"
            raise BadInput(
                f"{path} line {number} is not a {name} record: {_fault_of(error)}; {advice}"
            ) from None
        whole = end
    return rows, whole


def _fault_of(error: ValidationError) -> str:
    """The first wrong field of a row, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = " ".join(".".join(map(str, first["loc"])).split())[:100]
    return f"{where or 'the line'}: {first['msg']}"


# ---------------------------------------------------------------- writing


class RecordsFile(Generic[R]):
    """An append-only records file, held by one process; a row once written is never changed.

    With `progress`, another process that holds the file is waited for.
    Raises BadInput for another file, one that is not writable, or is held and no `progress`;
    `append` raises MissingRequirement when the disk is full.
    """

    def __init__(
        self,
        path: Path,
        kind: type[R],
        command: str = "sweep",
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.path = regular_file(path)
        self._read = partial(_rows, self.path, kind, command)
        self.newest: dict[Any, R] = {}
        if self.path.name.endswith((".result.json", ".lock", ".tmp")):
            raise BadInput(f"{path} is the name of a side file; name a file such as rows.jsonl")
        with writing(path, BadInput, "name a file in a folder you can write"), ExitStack() as stack:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.path, partial(_wait_for, self.path, progress)))
            if self.path.exists():
                rows, whole = self._read(progress)
                newest(rows, self.newest)
                end_last_line(self.path, whole)
            self.path.touch()
            self._held = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def rows(self) -> list[R]:
        """The newest row of each key and environment."""
        return list(self.newest.values())

    def append(self, rows: Sequence[R]) -> None:
        """Add `rows`; they are on disk when this returns. A file that was deleted is made anew."""
        with writing(self.path, MissingRequirement, RESUME):
            deleted = not regular_file(self.path, FIRST_ROW).exists()
            lines = [row.to_line() for row in ([*self.rows, *rows] if deleted else rows)]
            append(self.path, "".join(lines).encode())
        newest(rows, self.newest)

    def lost(self, rows: Iterable[R]) -> int:
        """How many of `rows` the file on disk no longer holds."""
        held = newest(self._read()[0] if self.path.exists() else ())
        return sum(row.identity() not in held for row in rows)


def _wait_for(path: Path, progress: Callable[[str], None] | None) -> None:
    if progress is None:
        raise BadInput(f"another run writes to {path}; wait for it or name another") from None
    progress(f"another run writes to {path}; waiting for it")


def write_cells(path: Path, cells: Iterable[Cell]) -> None:
    """Write `cells` to a new records file; one that holds them already stays as it is.

    Raises BadInput if the file holds other rows, or cannot be written.
    """
    cells = list(cells)
    with RecordsFile(path, Cell) as file:
        if file.rows == cells:
            return
        if file.rows:
            raise BadInput(f"{path} holds {len(file.rows)} rows already; name a new file")
        file.append(cells)
