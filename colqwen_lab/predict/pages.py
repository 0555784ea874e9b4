"""Pages on fake tensors: the vision tower asks for the values of its grid, so small integers stay real beside fakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from colqwen_lab.errors import BadInput
from colqwen_lab.model.config import Variant, resolve_variant
from colqwen_lab.model.inputs import (
    VISUAL_TOKENS,
    batch_of,
    check_visual_tokens,
    prompt_ids,
    visual_tokens_of,
)
from colqwen_lab.model.synthetic import HEIGHT, WIDTH
from colqwen_lab.predict.predictor import A100, LARGEST_BATCH, Asked, Predictor, Target, Trace
from colqwen_lab.records import Cell, Memory, Value, Work, Workload
from colqwen_lab.runtime.batches import INDEX_VALUE_BYTES, Pages

# The larger is the largest batch that is run as it is; beyond, figures lie on the line through these two. How much of
# the reserved memory lies in pieces goes up and down with the batch, and this line is on the upper side of it.
ANCHORS = (4, 32)


class Beside(FakeTensorMode):
    """Fake tensors beside real ones: what follows from real ones alone is computed, all the rest is fake.

    So ids, masks and grids, given as real tensors, keep their values, and a mask that selects rows of a fake tensor
    says how many. Weights, made before `values` is set, and what follows from them are fake.
    """

    values = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.values:
            return super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        self.values = False  # what a fake operation is made of is fake
        try:
            if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
                args, kwargs = tree_map_only(Tensor, self._fake, (_masks_as_rows(args), kwargs))
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.values = True

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)


def _masks_as_rows(args: Any) -> Any:
    """Arguments with every list of indices free of real masks: the rows that a mask selects in its place."""

    def rows(index: Any) -> list[Any]:
        mask = (
            isinstance(index, Tensor)
            and not isinstance(index, FakeTensor)
            and index.dtype == torch.bool
        )
        return list(index.nonzero(as_tuple=True)) if mask else [index]

    return tuple(
        [row for one in arg for row in rows(one)] if isinstance(arg, list) else arg for arg in args
    )


class PagePredictor(Predictor):
    """Predicts cells of one variant that embed pages of one size: A4 at 150 dpi, or of so many tokens."""

    multiplied = (*Predictor.multiplied, "vision tower", "mergers")

    def __init__(
        self,
        variant: Variant,
        size: str,
        dtype: str,
        kernel: str,
        visual_tokens: int = VISUAL_TOKENS,
    ) -> None:
        self.visual_tokens = check_visual_tokens(visual_tokens)
        super().__init__(variant, size, dtype, kernel)
        # Now that the weights are fake.
        setattr(self.mode, "values", True)  # noqa: B010
        self._cells: dict[tuple[Any, ...], Cell] = {}
        self._runs: dict[tuple[int, Asked], Trace] = {}

    def fake_mode(self) -> Beside:
        return Beside()

    def cell(
        self,
        batch_size: int,
        protocol: str = "lean",
        target: Target = A100,
        tokens: int | None = None,
        padded: bool = False,
        ahead: Sequence[str] | None = None,
    ) -> Cell:
        """The predicted cell of `batch_size` pages of `tokens` tokens, or A4 ones.

        The tower takes image by image, so a run of many is long: beyond `ANCHORS` figures follow from two runs.
        """
        if batch_size > LARGEST_BATCH:
            raise BadInput(f"batch {batch_size}; valid for a prediction: up to {LARGEST_BATCH}")
        key = batch_size, protocol, target, tokens
        if key not in self._cells and batch_size <= ANCHORS[1]:
            self._cells[key] = super().cell(batch_size, protocol, target, tokens)
        elif key not in self._cells:
            first, second = (self.cell(batch, protocol, target, tokens) for batch in ANCHORS)
            share = Fraction(batch_size - ANCHORS[0], ANCHORS[1] - ANCHORS[0])
            self._cells[key] = second.model_copy(
                update={
                    "workload": second.workload.model_copy(update={"batch_size": batch_size}),
                    "memory": _at(share, first.memory, second.memory, Memory),
                    "work": _at(share, first.work, second.work, Work),
                }
            )
        return self._cells[key]

    def _trace(self, batch_size: int, asked: Asked) -> Trace:
        """The run itself: image by image, it has another shape at every batch."""
        if (batch_size, asked) not in self._runs:
            self._runs[batch_size, asked] = self._run(batch_size, asked)
        return self._runs[batch_size, asked]

    def _workload(self, batch_size: int, tokens: int | None, padded: bool) -> tuple[Workload, bool]:
        beside = len(prompt_ids(self.tokenizer, self.config, 0))
        pages = Pages().label if tokens is None else None
        if tokens is None:
            tokens = beside + visual_tokens_of(WIDTH, HEIGHT, self.config, self.visual_tokens)
        longest = self.config.text_config.max_position_embeddings
        if not beside < tokens <= longest:
            raise BadInput(
                f"tokens {tokens} a page; valid at size {self.size}: {beside + 1} to {longest}"
            )
        workload = Workload(
            kind="pages",
            batch_size=batch_size,
            tokens=tokens,
            padded_share=0.0,
            visual_tokens=self.visual_tokens,
            pages=pages,
            index_bytes=tokens * self.config.embed_dim * INDEX_VALUE_BYTES,
        )
        return workload, True

    def _inputs(self, batch_size: int, tokens: int, masked: bool) -> dict[str, Tensor]:
        """As a run has them: ids, mask and grid with their values. A grid's shape alone does not tell in memory."""
        vision = self.config.vision_config
        side = vision.spatial_merge_size
        grid = (1, side, side * (tokens - len(prompt_ids(self.tokenizer, self.config, 0))))
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        weight = next(self.model.parameters())
        with self.mode:
            pixels = weight.new_empty((math.prod(grid), values), dtype=torch.float32)
            return batch_of([(pixels, grid)] * batch_size, self.tokenizer, self.config)


def _at(share: Fraction, first: Value | None, second: Value | None, kind: type[Value]) -> Value:
    """The value on the straight line through two, `share` of the way, in every number of it."""

    def between(one: Any, other: Any) -> Any:
        if isinstance(other, dict):
            return {name: between(one.get(name, 0), more) for name, more in other.items()}
        return round(one + share * (other - one)) if isinstance(other, int) else other

    assert first is not None
    assert second is not None
    return kind.model_validate(between(first.model_dump(), second.model_dump()))


@lru_cache(maxsize=8)
def page_predictor(
    model: str,
    size: str,
    dtype: str = "bfloat16",
    kernel: str = "tritonv2",
    visual_tokens: int = VISUAL_TOKENS,
) -> PagePredictor:
    """As `memory.predictor`, of pages. Raises BadInput."""
    return PagePredictor(resolve_variant(model), size, dtype, kernel, visual_tokens)
