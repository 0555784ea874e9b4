"""What a query's scores say, one value a query: how good its ranking is, and how near it is to BASE's. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

#: By the name that ir-measures gives it, the name that a table shows.
RETRIEVAL = {"nDCG@5": "nDCG@5", "nDCG@10": "nDCG@10", "R@5": "recall@5", "R@10": "recall@10"}
OVERLAP_AT = (5, 10)
#: All that a record holds by query.
NAMES = (
    *RETRIEVAL.values(),
    *(f"overlap@{k}" for k in OVERLAP_AT),
    "Kendall's tau",
    "score error",
    "query cosine",
)

Relevance = Mapping[str, Mapping[str, int]]


def ranking(scores: NDArray[np.floating]) -> NDArray[np.intp]:
    """Page numbers [queries, pages], best first; pages of equal score in their own order.

    Scores are equal to five decimals: a product may round a page's twin differently, by its place in the block.
    """
    return np.argsort(-np.round(scores, 5), axis=-1, kind="stable")


def retrieval(
    ranked: NDArray[np.intp],
    query_ids: Sequence[str],
    page_ids: Sequence[str],
    relevance: Relevance,
) -> dict[str, list[float]]:
    """nDCG and recall of each query, by ir-measures. Every query has a relevant page; `ranked` [queries, pages]."""
    import ir_measures

    # By rank, not by score: the library would break ties by the pages' names.
    run = {
        query: {page_ids[page]: float(-place) for place, page in enumerate(row)}
        for query, row in zip(query_ids, ranked, strict=True)
    }
    judged = {query: dict(relevance[query]) for query in query_ids}
    measures = {ir_measures.parse_measure(name): shown for name, shown in RETRIEVAL.items()}
    values = ir_measures.iter_calc(list(measures), judged, run)
    found = {(value.query_id, measures[value.measure]): float(value.value) for value in values}
    return {shown: [found[query, shown] for query in query_ids] for shown in measures.values()}


def overlap(ranked: NDArray[np.intp], base: NDArray[np.intp], k: int) -> list[float]:
    """The share of BASE's best k pages that are among the best k here; of all pages where there are fewer."""
    k = min(k, base.shape[1])
    return [
        len(set(ours[:k]) & set(theirs[:k])) / k for ours, theirs in zip(ranked, base, strict=True)
    ]


def kendall(scores: NDArray[np.floating], base: NDArray[np.floating]) -> list[float]:
    """Kendall's tau-b of each query's scores to BASE's, over all pages, by scipy.

    Where all scores are equal (one page, a query without tokens) it is not defined: 1 if they are on both sides,
    else 0.
    """
    from scipy.stats import kendalltau

    def tau(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> float:
        flat = [bool((side == side[0]).all()) for side in (ours, theirs)]
        return float(all(flat)) if any(flat) else float(kendalltau(ours, theirs).statistic)

    return [tau(ours, theirs) for ours, theirs in zip(scores, base, strict=True)]


def score_error(scores: NDArray[np.floating], base: NDArray[np.floating]) -> list[float]:
    """The mean over pages of |score - BASE's| / |BASE's|; pages without tokens and queries without any add nothing."""
    counted = np.isfinite(base) & np.isfinite(scores) & (base != 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = np.where(counted, np.abs(scores - base) / np.abs(base), 0.0)
    return [float(value) for value in errors.sum(axis=1) / np.maximum(1, counted.sum(axis=1))]
