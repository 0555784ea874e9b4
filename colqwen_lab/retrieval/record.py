"""The record of one variant on one data set, BASE's included: what its rankings are, and how near BASE's. No torch.

A file is JSON lines, BASE's first. Values are kept by query, so every interval and verdict follows from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from colqwen_lab.records import Backend, Environment, Rate, Row, Value, rate_of, read_rows
from colqwen_lab.retrieval.metrics import NAMES


class Cosines(Value):
    """Cosine of each token's embedding to BASE's on the same input: how many, the least, quantiles, and the mean."""

    tokens: int
    least: float
    q01: float
    q05: float
    q25: float
    median: float
    mean: float


class Fidelity(Row):
    """One variant on one data set.

    `values` holds by metric one figure a query, in the order of `query_ids`; `top` each query's best pages. `iters` is
    of variants that were quantised here. `refused` pages could not be read. `page_step_s` are the times of forwards
    over `page_batch` pages, the first one thrown away; variants are not timed in turn.
    """

    kind: Literal["fidelity"] = "fidelity"
    variant: str
    size: str
    weights: str
    iters: int | None = None
    data: str
    pages: int = Field(gt=0)
    skipped: int = Field(default=0, ge=0, validation_alias=AliasChoices("skipped", "refused"))
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
        lengths = {"top": len(self.top)} | {
            name: len(values) for name, values in self.values.items()
        }
        for name, length in lengths.items():
            if length != len(self.query_ids):
                raise ValueError(f"{name} of {length} queries, and there are {len(self.query_ids)}")
        return self

    def key(self) -> tuple[str, ...]:
        return (self.label, self.weights, str(self.inputs))

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


def read(path: str | Path) -> list[Fidelity]:
    """The newest record of each variant in a file; raises BadInput if it holds none."""
    return read_rows(Path(path), Fidelity, "fidelity")
