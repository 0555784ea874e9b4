"""The record of one variant on one data set: its rankings, and how near they are to BASE's.

BASE has a record too. Values are kept per query, so intervals and verdicts follow from the file.
Searches of a synthetic index have records of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, model_validator

from colqwen_lab.records import (
    Backend,
    Count,
    Limits,
    Measured,
    Positive,
    Rate,
    Row,
    Text,
    Value,
    rate_of,
    read_rows,
)

#: The metrics of a record, in the order of its tables.
NAMES = (
    *("nDCG@5", "nDCG@10", "recall@5", "recall@10", "overlap@5", "overlap@10"),
    *("Kendall's tau", "score error", "query cosine"),
)


class Cosines(Value):
    """Cosines of each token's embedding to BASE's on the same input: count, quantiles, mean."""

    tokens: int
    least: float
    q01: float
    q05: float
    q25: float
    median: float
    mean: float


class Fidelity(Row):
    """One variant on one data set.

    `values` holds one figure per query for each metric, in the order of `query_ids`. `top` holds
    the best page ids of each query. `iters` are the tuning steps of a variant quantised for this
    run. Queries of one number in `query_groups` have the same relevant pages: they are one sample.
    `index_format` names how pages are stored, "" as the model gives them, in 16 bits;
    `page_bytes` is what a stored page takes. `skipped` counts unreadable pages. `cut` counts texts
    of more than 2048 tokens, which lost their end; in an earlier record it is None, and they lost
    their beginning. `page_step_s` are the times of forwards over `page_batch` pages, without the
    first; variants are not interleaved.
    """

    kind: Literal["fidelity"] = "fidelity"
    variant: Text
    size: Text
    weights: Text
    iters: int | None = None
    index_format: Text = ""
    page_bytes: float | None = None
    data: Text
    pages: Positive
    skipped: Count = 0
    cut: Count | None = None
    visual_tokens: int
    backend: Backend
    weights_bytes: Positive
    query_cosine: Cosines
    page_cosine: Cosines
    page_batch: Positive
    page_step_s: list[Measured]
    query_ids: list[str] = Field(min_length=1)
    query_groups: list[Count] | None = None
    values: dict[str, list[float]]
    top: list[list[str]]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if missing := set(NAMES) - self.values.keys():
            raise ValueError(f"values lack the metrics {', '.join(sorted(missing))}")
        columns: dict[str, Sequence[Any]] = {"top": self.top, **self.values}
        columns |= {"query_groups": self.query_groups} if self.query_groups else {}
        for name, column in columns.items():
            if len(column) != (count := len(self.query_ids)):
                raise ValueError(f"{name} must have {count} queries, got {len(column)}")
        return self

    def key(self) -> tuple[str, ...]:
        return (self.label, self.weights, str(self.inputs))

    @property
    def inputs(self) -> tuple[object, ...]:
        """What two records must share to be compared: data, queries, size and visual tokens."""
        return self.data, self.pages, self.query_ids, self.size, self.visual_tokens

    @property
    def label(self) -> str:
        """The variant's name, `plain` where it was rounded without tuning, and the index format."""
        plain = "plain" if self.iters == 0 else ""
        return " ".join(filter(None, (self.variant, plain, self.index_format)))

    @property
    def is_base(self) -> bool:
        """Whether others are compared with it: BASE, and pages as it gives them."""
        return self.label == "base"

    @property
    def pages_per_s(self) -> Rate | None:
        """Pages per second of the forward, if a batch was timed."""
        return rate_of(self.page_step_s, self.page_batch) if self.page_step_s else None


def read(path: str | Path) -> list[Fidelity]:
    """The newest record of each variant, inputs and machine. Raises BadInput if there is none."""
    return read_rows(path, Fidelity, "fidelity")


class SearchTime(Row):
    """The times of one search over a synthetic index, from query vectors to the best pages.

    `vectors` of `dims` values make a page before `index_format` stores it. `bytes_read` is the size
    of stored vectors and scales, which a search reads at least once. `limits` were measured in the
    same run, on a GPU. `interference` lists what may have disturbed the measurement.
    """

    kind: Literal["search"] = "search"
    index_format: Text
    pages: Positive
    vectors: Positive
    dims: Positive
    queries: Positive
    query_tokens: Positive
    kernel: Text
    page_bytes: float
    bytes_read: Positive
    step_s: Annotated[list[Measured], FailFast()] = Field(min_length=1)
    limits: Limits | None = None
    interference: list[Text] = Field([])

    def key(self) -> tuple[str, ...]:
        shape = self.pages, self.vectors, self.dims, self.queries, self.query_tokens
        return (self.index_format, self.kernel, *map(str, shape))

    @property
    def run(self) -> tuple[object, ...]:
        """What the records of one run share: the shape of a page and a query, and the machine."""
        return self.vectors, self.dims, self.query_tokens, self.environment.identity()

    @property
    def rate(self) -> Rate:
        """Searches per second."""
        return rate_of(self.step_s, 1)

    @property
    def bytes_per_s(self) -> float:
        """Bytes of the index per second."""
        return self.bytes_read * self.rate.median

    @property
    def limit_share(self) -> float | None:
        """Bytes of the index per second, over those of a copy in the same run."""
        return self.bytes_per_s / self.limits.bytes_per_s if self.limits else None
