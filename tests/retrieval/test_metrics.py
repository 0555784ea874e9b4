"""MaxSim against a double loop, and metrics per query by hand, by the library, at the edges."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colqwen_lab.retrieval import metrics
from colqwen_lab.retrieval.metrics import maxsim, ranking, unpadded


def test_the_worked_example_of_maxsim() -> None:
    results = doctest.testmod(metrics)
    assert (results.failed, results.attempted) == (0, 2)


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
def test_maxsim_equals_a_double_loop_in_float64(
    query_lengths: list[int], page_lengths: list[int], budget: int
) -> None:
    queries, pages = ragged(query_lengths, 1), ragged(page_lengths, 2)
    expected = torch.tensor(
        [[plain(query, page) for page in pages] for query in queries], dtype=torch.float64
    )
    torch.testing.assert_close(maxsim(queries, pages, budget), expected, rtol=1e-12, atol=1e-12)


def test_padding_never_counts() -> None:
    """The padding would be the best match of every token."""
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


def test_the_budget_limits_the_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    reduce = torch.segment_reduce

    def spy(data: Tensor, kind: str, **options: object) -> Tensor:
        sizes.append(data.nbytes)
        return reduce(data, kind, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(metrics.torch, "segment_reduce", spy)
    maxsim(ragged([5] * 40, 1, torch.float32), ragged([30] * 60, 2, torch.float32), 2**14)
    assert max(sizes) <= 2**14


def test_16_bit_embeddings_are_scored_in_float32() -> None:
    queries, pages = ragged([9], 1, torch.bfloat16), ragged([50], 2, torch.bfloat16)
    scores = maxsim(queries, pages)
    assert scores.dtype == torch.float32
    assert scores.item() == pytest.approx(plain(queries[0].double(), pages[0].double()), rel=1e-6)


def test_ndcg_and_recall_by_hand() -> None:
    top = [["p2", "p0", "p1", "p3"], ["p3", "p2", "p1", "p0"]]
    relevance = {"a": {"p0": 1}, "b": {"p3": 2, "p0": 1, "p9": 0}}
    values = metrics.retrieval(["a", "b"], top, relevance)
    assert list(values) == ["nDCG@5", "nDCG@10", "recall@5", "recall@10"]
    ideal = 2 + 1 / math.log2(3)
    assert values["nDCG@5"] == pytest.approx([1 / math.log2(3), (2 + 1 / math.log2(5)) / ideal])
    assert values["recall@10"] == [1, 1]


def test_recall_counts_only_the_first_k() -> None:
    pages = [f"p{number}" for number in range(12)]
    values = metrics.retrieval(["a"], [pages], {"a": {"p4": 1, "p5": 1, "p11": 1, "p0": 1}})
    assert values["recall@5"] == [0.5]
    assert values["recall@10"] == [0.75]


def test_ties_keep_the_page_order_whatever_the_page_ids() -> None:
    ranked = metrics.ranking(np.array([[1.0, 2.0, 2.0 + 1e-9, 1.0]]))
    assert ranked.tolist() == [[1, 2, 0, 3]]
    for names in ("abcd", "dcba"):
        top = [[names[page] for page in ranked[0]]]
        assert metrics.retrieval(["q"], top, {"q": {names[2]: 1}})["nDCG@5"] == [
            pytest.approx(1 / math.log2(3))
        ]


def test_overlap_with_fewer_pages_than_k() -> None:
    base = np.array([[0, 1, 2]])
    assert metrics.overlap(np.array([[2, 1, 0]]), base, 10) == [1]
    assert metrics.overlap(np.array([[2, 1, 0]]), base, 2) == [0.5]


def test_kendall_where_it_is_not_defined() -> None:
    base = np.array([[1.0, 2, 3, 4]])
    assert metrics.kendall(base * 3 + 1, base) == [1]
    assert metrics.kendall(-base, base) == [-1]
    flat = np.zeros((1, 4))
    assert metrics.kendall(flat, flat) == [1]
    assert metrics.kendall(flat, base) == [0]
    assert metrics.kendall(base[:, :1], base[:, :1] + 5) == [1]


def test_score_error_is_relative_and_ignores_infinite_and_zero_scores() -> None:
    base = np.array([[2.0, -4.0, -np.inf], [0.0, 0.0, 0.0]])
    ours = np.array([[2.2, -3.0, -np.inf], [0.0, 0.0, 0.0]])
    assert metrics.score_error(ours, base) == pytest.approx([(0.1 + 0.25) / 2, 0])
