"""MaxSim against a plain double loop, in any chunking, and where there is nothing to score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colqwen_lab.retrieval import maxsim as module
from colqwen_lab.retrieval.maxsim import maxsim, unpadded
from colqwen_lab.retrieval.metrics import ranking


def ragged(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, 16, generator=generator, dtype=torch.float64).to(dtype)
        for length in lengths
    ]


def plain(query: Tensor, page: Tensor) -> float:
    total = 0.0
    for ours in query.tolist():
        total += max(
            (
                math.fsum(a * b for a, b in zip(ours, theirs, strict=True))
                for theirs in page.tolist()
            ),
            default=-math.inf,
        )
    return total


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.lists(st.integers(0, 9), min_size=1, max_size=7),
    st.sampled_from([1, 400, 3000, 2**28]),
)
def test_a_plain_double_loop_in_float64(
    query_lengths: list[int], page_lengths: list[int], budget: int
) -> None:
    queries, pages = ragged(query_lengths, 1), ragged(page_lengths, 2)
    expected = torch.tensor(
        [[plain(query, page) for page in pages] for query in queries], dtype=torch.float64
    )
    torch.testing.assert_close(maxsim(queries, pages, budget), expected, rtol=1e-12, atol=1e-12)


def test_padding_never_counts() -> None:
    """Padding that would be every token's best, on either side."""
    embeddings = torch.nn.functional.normalize(
        torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    expected = maxsim(unpadded(embeddings, mask), unpadded(embeddings, mask))
    embeddings[mask == 0] = 1e3
    assert torch.equal(maxsim(unpadded(embeddings, mask), unpadded(embeddings, mask)), expected)


def test_nothing_to_score() -> None:
    (query, empty), pages = ragged([3, 0], 1), ragged([0, 4], 2)
    scores = maxsim([query, empty], pages)
    assert scores[0, 0] == -math.inf
    assert scores[0, 1] == pytest.approx(plain(query, pages[1]))
    assert scores[1].tolist() == [0, 0]
    assert ranking(scores.numpy()).tolist() == [[1, 0], [0, 1]]
    assert maxsim([], pages).shape == (0, 2)
    assert maxsim([query], []).shape == (1, 0)


def test_duplicate_pages_rank_in_their_order_in_any_chunking() -> None:
    pages = ragged([1, 7, 3], 3, torch.float32) * 11
    queries = ragged([4, 11], 4, torch.float32)
    rows = {budget: ranking(maxsim(queries, pages, budget).numpy()) for budget in (1, 4096, 2**28)}
    assert all(np.array_equal(row, rows[1]) for row in rows.values())
    for row in rows[1]:
        for first in range(3):
            copies = [page for page in row if page % 3 == first]
            assert copies == sorted(copies)


def test_the_budget_bounds_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    reduce = torch.segment_reduce

    def spy(data: Tensor, kind: str, **options: object) -> Tensor:
        held.append(data.nbytes)
        return reduce(data, kind, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module.torch, "segment_reduce", spy)
    maxsim(ragged([5] * 40, 1, torch.float32), ragged([30] * 60, 2, torch.float32), 2**14)
    assert max(held) <= 2**14


def test_16_bit_embeddings_are_scored_in_float32() -> None:
    queries, pages = ragged([9], 1, torch.bfloat16), ragged([50], 2, torch.bfloat16)
    scores = maxsim(queries, pages)
    assert scores.dtype == torch.float32
    assert scores.item() == pytest.approx(plain(queries[0].double(), pages[0].double()), rel=1e-6)
