"""The values that travel between rooms, and the append-only JSON-lines files that hold them.

A cell is one configuration at one batch size: measured, predicted or published. Reading and
comparing records never imports torch. Files hold bytes and seconds; screens show MiB.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from colqwen_lab import report_script
from colqwen_lab.errors import (
    BadInput,
    LabError,
    MissingRequirement,
    ambiguous,
    plain,
    shown,
)
from colqwen_lab.settings import DATA, locked, regular_file

MIB = 2**20
GIB = 2**30
RANDOM_TEXTS, DRAWN_TEXTS = (f"{kind} at the report's lengths" for kind in ("random ids", "drawn"))
PUBLISHED = "published"
LINE_START = b'{"schema":1,'
RESUME = "finished rows are on file; run the same command again to resume"
# A row with a million samples and as many of a control has 40 MB. The JSON of the report's script
# has a few kB; a parser takes seventy times a document's bytes.
MOST_LINE_BYTES, MOST_DOCUMENT_BYTES, MOST_TEXT = 64 * MIB, 4 * MIB, 10_000
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


def renamed(default: Any, *names: str) -> Any:
    """A field with `default` that reads the current key, named first, and the earlier ones."""
    return Field(default, validation_alias=AliasChoices(*names))


class Value(BaseModel):
    """Frozen and strict: an unknown field or a wrong type is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False
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
    skipped: Count | None = renamed(None, "skipped", "refused")
    index_bytes: Count | None = None
    preprocess_s: Figure | None = None
    shapes: list[Count] = []

    @field_validator("texts", "pages")
    @classmethod
    def _renamed(cls, value: str | None) -> str | None:
        """Today's names of synthetic pages and random ids; earlier records call both drawn."""
        if value is None or not value.startswith("drawn"):
            return value
        return {DRAWN_TEXTS: RANDOM_TEXTS}.get(value, value.replace("drawn", "synthetic", 1))

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
    kernel_configs: dict[Text, Text] = renamed({}, "kernel_configs", "schedules")


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
    min_reserved_bytes: Count | None = renamed(None, "min_reserved_bytes", "least_reserved_bytes")
    device_bytes: Count | None = None
    allocation_retries: Count | None = None
    unused_head_bytes: Count = 0
    breakdown: dict[Text, Whole] | None = renamed(None, "breakdown", "ledger")
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
    min_bytes: Positive = Field(validation_alias=AliasChoices("min_bytes", "least_bytes"))


class Limits(Value):
    """Rates measured in the same run: a large 16-bit GEMM, and a copy (bytes read + written)."""

    flops_per_s: Speed
    bytes_per_s: Speed


class Stages(Value):
    """Seconds of a step in the vision encoder and in the language model, from a separate pass."""

    vision_encoder_s: Figure = Field(validation_alias=AliasChoices("vision_encoder_s", "vision_s"))
    language_model_s: Figure = Field(validation_alias=AliasChoices("language_model_s", "decoder_s"))


class Difference(Value):
    """Cosine of token embeddings to those with 16-bit activations, on one batch."""

    against: Text
    cosine_mean: Figure
    cosine_min: Figure = Field(validation_alias=AliasChoices("cosine_min", "cosine_least"))


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
    interleaved_with: list[Text] = renamed([], "interleaved_with", "in_turn_with")
    interleaved_configurations: list[Text] = renamed(
        [], "interleaved_configurations", "ways_in_turn"
    )
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
    stages: Stages | None = renamed(None, "stages", "towers")
    card: CardRun | None = None
    timing: Timing | None = None
    gpu_state: dict[Text, dict[Text, Any]] | None = None
    interference: list[Text] = renamed([], "interference", "notes")

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
    def disturbed(self) -> list[str]:
        """The interference that withholds a verdict: other processes, throttling, spilled memory.

        A GPU at its power limit is at full load, and a display alone changes no figure.
        """
        usual = ("power limit", "a display is attached")
        return [line for line in self.interference if not any(words in line for words in usual)]

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


def alike(step_s: Sequence[float], shapes: Sequence[int]) -> list[float]:
    """Step times as if every batch were an average one: their median is the rate of the whole set.

    `shapes` numbers the shape of each batch, in their order. The time of a shape is its median;
    steps that deviate from its mean show the noise. A few large batches that take most of the time
    count as fewer samples (Kish's effective sample size). With one sample a shape only the mean is
    left.
    """
    if len(set(shapes)) < 2:
        return list(step_s)
    times: dict[int, list[float]] = {}
    for seconds, shape in zip(step_s, itertools.cycle(shapes), strict=False):
        times.setdefault(shape, []).append(seconds)
    typical = {shape: statistics.median(own) for shape, own in times.items()}
    costs = [typical[shape] for shape in shapes if shape in typical]
    noise = sorted(
        (seconds / statistics.fmean(own)) ** math.sqrt(len(own) / (len(own) - 1))  # a fitted mean
        for own in times.values()
        if len(own) > 1
        for seconds in own
    )
    effective = len(step_s) * sum(costs) ** 2 / sum(cost**2 for cost in costs) / len(costs)
    count = min(len(noise), round(effective))
    kept = [noise[int((place + 0.5) * len(noise) / count)] for place in range(count)] or [1.0]
    scale = statistics.fmean(costs) / statistics.median(kept)
    return [scale * each for each in kept]


def rate_of(step_s: Sequence[float], items: int, shapes: Sequence[int] = ()) -> Rate:
    """Items per second of `items` a step: the median and its 95 % interval from order statistics.

    The interval uses binomial ranks, so it assumes nothing of the distribution. Fewer than six
    samples give no interval. Batches of several `shapes` are first made `alike`.
    """
    times = sorted(alike(step_s, shapes))
    n = len(times)
    median = statistics.median(times)
    rank = max(0, n // 2 - 3 * math.isqrt(n))  # six deviations below the half
    tail = _half_binomial(n, rank)
    while rank < n and tail <= 0.025:
        rank += 1
        tail += _half_binomial(n, rank)
    if rank == 0:
        return Rate(median=items / median)
    return Rate(median=items / median, low=items / times[n - rank], high=items / times[rank - 1])


def _half_binomial(n: int, k: int) -> float:
    """The chance of `k` heads in `n` throws, without the huge integers of math.comb."""
    return math.exp(
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    )


# ---------------------------------------------------------------- reading

R = TypeVar("R", bound=Row)


def read_cells(source: str | Path) -> list[Cell]:
    """The cells of a records file, of the report script's JSON, or of the word `published`.

    Of several rows with one key and environment the newest counts. A torn last line is skipped
    with a warning.

    Raises:
        BadInput: no such file, or not a records file; the line is named.
    """
    if source == PUBLISHED:
        if os.path.exists(PUBLISHED):
            raise ambiguous(PUBLISHED, "the report")
        return published_cells()
    path, document = _path_of(source), None
    with suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= MOST_DOCUMENT_BYTES:
            document = json.loads(path.read_bytes())
    if isinstance(document, dict) and "results" in document:
        try:
            return [Cell.model_validate(fields) for fields in report_script.cells(document)]
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise BadInput(f"{path} is not the report script's: {field}: {first['msg']}") from None
    return read_rows(path, Cell, "sweep")


def read_rows(source: str | Path, kind: type[R], command: str) -> list[R]:
    """The newest rows of a file that `colqwen-lab command` wrote; BadInput if it holds none."""
    path = _path_of(source)
    rows, _ = _rows(path, kind, command)
    if not rows:
        raise BadInput(f"{path} holds no row; name a file written by `colqwen-lab {command}`")
    return newest(rows)


def newest(rows: Iterable[R]) -> list[R]:
    """The rows without those that a later row with the same key and environment replaces.

    A row that failed replaces no row that is ok.
    """
    kept: dict[Any, R] = {}
    for row in rows:
        key = row.identity()
        if getattr(row, "status", "ok") == "ok" or getattr(kept.get(key), "status", "") != "ok":
            kept[key] = row
    return list(kept.values())


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
            first = error.errors(include_url=False, include_input=False)[0]
            ours = rows or line.startswith(LINE_START) or LINE_START.startswith(line)
            if first["type"] == "json_invalid" and ours and not line.endswith(b"\n"):
                torn = f"{path}: the last line is torn and skipped; a run was killed while writing"
                (progress or warnings.warn)(shown(torn))
                break
            where = " ".join(".".join(str(part) for part in first["loc"]).split())[:100]
            raise BadInput(
                f"{path} line {number} is not a {kind.__name__.lower()} record: "
                f"{where or 'the line'}: {first['msg']}; name a file written by "
                f"`colqwen-lab {command}`"
            ) from None
        whole = end
    return rows, whole


# ---------------------------------------------------------------- writing


def beside(path: Path, suffix: str) -> Path:
    """The file next to a records file: for `rows.jsonl` and `result.json`, `rows.result.json`."""
    path = _real(path)
    if path.suffix == ".jsonl":
        return path.with_suffix(f".{suffix}")
    return path.with_name(f"{path.name}.{suffix}")


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise BadInput(
            f"{path} is not a file name: {error}; name a file such as rows.jsonl"
        ) from None


@contextmanager
def writing(
    path: Path, kind: type[LabError] = MissingRequirement, then: str = RESUME
) -> Iterator[None]:
    """Around a write: an OSError becomes a one-line `kind`."""
    try:
        yield
    except OSError as error:
        raise kind(f"cannot write {path}: {error.strerror or error}; {then}") from None


class RecordsFile(Generic[R]):
    """An append-only records file, held by one process; a row once written is never changed.

    `rows` are the newest of each key and environment. With `progress`, another process that holds
    the file is waited for.

    Raises:
        BadInput: not a records file, not writable, or held by another process and no `progress`.
        MissingRequirement: from `append`, when the disk is full.
    """

    def __init__(
        self,
        path: Path,
        kind: type[R],
        command: str = "sweep",
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.path = regular_file(path)
        if self.path.name.endswith((".result.json", ".lock", ".tmp")):
            raise BadInput(f"{path} is the name of a side file; name a file such as rows.jsonl")
        with writing(path, BadInput, "name a file in a folder you can write"), ExitStack() as stack:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.path, partial(_wait_for, self.path, progress)))
            self.rows: list[R] = []
            if self.path.exists():
                rows, whole = _rows(self.path, kind, command, progress)
                self.rows = newest(rows)
                _end_last_line(self.path, whole)
            self.path.touch()
            self._held = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def append(self, rows: Iterable[R]) -> None:
        """Add `rows`; they are on disk when this returns. A file that was deleted is made anew."""
        new = list(rows)
        with writing(self.path):
            deleted = not regular_file(self.path, FIRST_ROW).exists()
            append_lines(self.path, [*self.rows, *new] if deleted else new)
        self.rows = newest([*self.rows, *new])


def _end_last_line(path: Path, whole: int) -> None:
    """Cut what a killed run left of its last line, or give the last row its newline."""
    with path.open("ab+") as file:
        file.truncate(whole)
        file.seek(max(whole - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.write(b"\n")


def _wait_for(path: Path, progress: Callable[[str], None] | None) -> None:
    if progress is None:
        raise BadInput(f"another run writes to {path}; wait for it or name another") from None
    progress(f"another run writes to {path}; waiting for it")


def append_lines(path: Path, rows: Iterable[Value]) -> None:
    """Append whole lines, on disk when this returns; where that fails, none of them."""
    left = "".join(row.to_line() for row in rows).encode()
    with path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(start)
            raise


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_cells(path: Path, cells: Iterable[Cell]) -> None:
    """Write `cells` to a new records file; one that holds them already stays as it is.

    Raises:
        BadInput: the file holds other rows, or cannot be written.
    """
    cells = list(cells)
    with RecordsFile(path, Cell) as file:
        if file.rows == cells:
            return
        if file.rows:
            raise BadInput(f"{path} holds {len(file.rows)} rows already; name a new file")
        file.append(cells)


# ---------------------------------------------------------------- the published report


def published_report() -> dict[str, Any]:
    """The report's figures and claims as data (`data/a100_4b.json`)."""
    return json.loads((DATA / "a100_4b.json").read_text(encoding="utf-8"))


def published_cells() -> list[Cell]:
    """The report's sweep as cells of origin `published`: no samples, so no intervals."""
    report = published_report()
    return [
        Cell(
            **report_script.AS_REPORTED,
            origin="published",
            source=report["source"],
            variant=variant,
            size="4b",
            weights=f"hub:{report['models'][variant]['checkpoint']}",
            workload=Workload(kind="queries", batch_size=row["batch_size"], texts="report"),
            backend=Backend(requested="auto", dtype="float16"),
            items_per_s=Rate(median=float(row["items_per_s"])),
            memory=Memory(peak_bytes=row["peak_mib"] * MIB, method="published"),
            environment=Environment(
                **{name: report["environment"][name] for name in ("gpu", "cuda", "attention")}
            ),
        )
        for variant, rows in report["sweep"].items()
        for row in rows
    ]
