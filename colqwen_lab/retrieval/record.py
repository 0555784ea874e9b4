"""The record of one variant on one data set, BASE's included: what its rankings are, and how near BASE's. No torch.

A file is JSON lines, BASE's first. Values are kept by query, so every interval and verdict follows from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from colqwen_lab.errors import BadInput
from colqwen_lab.records import (
    Backend,
    Environment,
    Rate,
    Value,
    append,
    locked,
    neighbour,
    opening,
    own_file,
    rate_of,
    read_line,
    replace,
)
from colqwen_lab.retrieval.metrics import NAMES
from colqwen_lab.settings import writable_folder


class Cosines(Value):
    """Cosine of each token's embedding to BASE's on the same input: how many, the least, quantiles, and the mean."""

    tokens: int
    least: float
    q01: float
    q05: float
    q25: float
    median: float
    mean: float


class Fidelity(Value):
    """One variant on one data set.

    `values` holds by metric one figure a query, in the order of `query_ids`; `top` each query's best pages. `iters` is
    of variants that were quantised here. `refused` pages could not be read. `page_step_s` are the times of forwards
    over `page_batch` pages, the first one thrown away; variants are not timed in turn.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    kind: Literal["fidelity"] = "fidelity"
    variant: str
    size: str
    weights: str
    iters: int | None = None
    data: str
    pages: int = Field(gt=0)
    refused: int = Field(default=0, ge=0)
    visual_tokens: int
    backend: Backend
    weights_bytes: int = Field(gt=0)
    query_cosine: Cosines
    page_cosine: Cosines
    page_batch: int = Field(gt=0)
    page_step_s: list[Annotated[float, Field(gt=0)]]
    query_ids: list[str] = Field(min_length=1)
    values: dict[str, list[float]]
    top: list[list[str]]
    environment: Environment

    @model_validator(mode="after")
    def _by_query(self) -> Self:
        if missing := set(NAMES) - self.values.keys():
            raise ValueError(f"no values of {', '.join(sorted(missing))}")
        lengths = {"top": len(self.top)} | {name: len(values) for name, values in self.values.items()}
        for name, length in lengths.items():
            if length != len(self.query_ids):
                raise ValueError(f"{name} of {length} queries, and there are {len(self.query_ids)}")
        return self

    @property
    def inputs(self) -> tuple[object, ...]:
        """What two records must share to be compared: what was embedded, at which size and budget."""
        return self.data, self.pages, self.query_ids, self.size, self.visual_tokens

    @property
    def label(self) -> str:
        """The variant; plainly rounded ones say so."""
        return f"{self.variant} plain" if self.iters == 0 else self.variant

    @property
    def pages_per_s(self) -> Rate | None:
        return rate_of(self.page_step_s, self.page_batch) if self.page_step_s else None


@contextmanager
def writing(path: Path, say: Callable[[str], object]) -> Iterator[Callable[[Sequence[Fidelity]], None]]:
    """The function that writes a run's records so far to a file, which is whole at any moment and this run's alone.

    Its first call moves what was in the file to `NAME.superseded.jsonl` beside it; `say` hears of waiting for another.

    Raises:
        BadInput: the file is of something else, or cannot be written.
    """
    path = own_file(path)
    writable_folder(path.parent)
    with ExitStack() as held:
        with opening(path):
            held.enter_context(locked(path, "another run", say))
            old = read(path) if path.exists() and path.stat().st_size else []

        def write(records: Sequence[Fidelity]) -> None:
            with opening(path):
                if old:
                    append(neighbour(path, "superseded.jsonl"), old)
                replace(path, records)
            old.clear()

        yield write


def read(path: str | Path) -> list[Fidelity]:
    """The records of a file.

    Raises:
        BadInput: no such file, or a line that is no such record; it is named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as fidelity records: {error}") from None
    numbered = enumerate(lines, 1)
    return [read_line(Fidelity, line, f"{path} line {number} is no fidelity", "fidelity`") for number, line in numbered]
