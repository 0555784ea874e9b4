"""One value a query: by hand, by the library, and where there is no ranking to speak of."""

from __future__ import annotations

import math

import numpy as np
import pytest

from colqwen_lab.retrieval import metrics

PAGES = [f"p{number}" for number in range(4)]


def test_ndcg_and_recall_by_hand() -> None:
    ranked = np.array([[2, 0, 1, 3], [3, 2, 1, 0]])
    relevance = {"a": {"p0": 1}, "b": {"p3": 2, "p0": 1, "p9": 0}}
    values = metrics.retrieval(ranked, ["a", "b"], PAGES, relevance)
    assert list(values) == ["nDCG@5", "nDCG@10", "recall@5", "recall@10"]
    ideal = 2 + 1 / math.log2(3)
    assert values["nDCG@5"] == pytest.approx([1 / math.log2(3), (2 + 1 / math.log2(5)) / ideal])
    assert values["recall@10"] == [1, 1]


def test_recall_counts_only_the_first_k() -> None:
    pages = [f"p{number}" for number in range(12)]
    values = metrics.retrieval(
        np.arange(12)[None], ["a"], pages, {"a": {"p4": 1, "p5": 1, "p11": 1, "p0": 1}}
    )
    assert values["recall@5"] == [0.5]
    assert values["recall@10"] == [0.75]


def test_ties_go_by_page_order_whatever_the_pages_are_called() -> None:
    ranked = metrics.ranking(np.array([[1.0, 2.0, 2.0 + 1e-9, 1.0]]))
    assert ranked.tolist() == [[1, 2, 0, 3]]
    for names in (["a", "b", "c", "d"], ["d", "c", "b", "a"]):
        assert metrics.retrieval(ranked, ["q"], names, {"q": {names[2]: 1}})["nDCG@5"] == [
            pytest.approx(1 / math.log2(3))
        ]


def test_overlap_of_more_than_there_are_pages() -> None:
    base = np.array([[0, 1, 2]])
    assert metrics.overlap(np.array([[2, 1, 0]]), base, 10) == [1]
    assert metrics.overlap(np.array([[2, 1, 0]]), base, 2) == [0.5]


def test_kendall_and_where_it_is_not_defined() -> None:
    base = np.array([[1.0, 2, 3, 4]])
    assert metrics.kendall(base * 3 + 1, base) == [1]
    assert metrics.kendall(-base, base) == [-1]
    flat = np.zeros((1, 4))
    assert metrics.kendall(flat, flat) == [1]
    assert metrics.kendall(flat, base) == [0]
    assert metrics.kendall(base[:, :1], base[:, :1] + 5) == [1]


def test_score_error_is_relative_and_passes_over_what_has_no_score() -> None:
    base = np.array([[2.0, -4.0, -np.inf], [0.0, 0.0, 0.0]])
    ours = np.array([[2.2, -3.0, -np.inf], [0.0, 0.0, 0.0]])
    assert metrics.score_error(ours, base) == pytest.approx([(0.1 + 0.25) / 2, 0])
