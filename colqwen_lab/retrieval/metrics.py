"""Late-interaction scores (MaxSim), and metrics of rankings and scores: one value per query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import ir_measures
import numpy as np
import torch
from ir_measures import R, nDCG
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor

BUDGET_BYTES = 256 * 2**20
RETRIEVAL = {nDCG @ 5: "nDCG@5", nDCG @ 10: "nDCG@10", R @ 5: "recall@5", R @ 10: "recall@10"}

Scores = NDArray[np.floating]  # [queries, pages]
T = TypeVar("T")
Ranking = NDArray[np.intp]  # [queries, pages], page numbers, best first
Relevance = Mapping[str, Mapping[str, int]]


def unpadded(embeddings: Tensor, mask: Tensor) -> list[Tensor]:
    """The [tokens, dim] of each row of [rows, tokens, dim] where `mask` [rows, tokens] is not 0."""
    return [row[keep] for row, keep in zip(embeddings, mask.bool(), strict=True)]


def maxsim(
    queries: Sequence[Tensor], pages: Sequence[Tensor], budget_bytes: int = BUDGET_BYTES
) -> Tensor:
    """Scores [queries, pages]: for each query token the best page token, summed over the query.

    The result is float32 (float64 for float64 embeddings), on the queries' device. A query without
    tokens scores 0; a page without tokens scores -inf. Source: ColBERT (Khattab and Zaharia 2020),
    equation 3.

    >>> query, page = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    >>> maxsim([query], [page])
    tensor([[1.8000]])

    Args:
        queries: [tokens, dim] each.
        pages: [tokens, dim] each, on any device.
        budget_bytes: memory for the similarities between tokens, unless one pair needs more.
    """
    if not queries or not pages:
        return torch.zeros(len(queries), len(pages))
    device, dtype = queries[0].device, torch.promote_types(queries[0].dtype, torch.float32)
    budget = budget_bytes // dtype.itemsize
    scores = []
    for some in batches(queries, int(budget**0.5) // _longest(queries)):
        query, lengths = torch.cat(list(some)).to(dtype), _lengths(some, device)
        parts = []
        for others in batches(pages, budget // (_longest(pages) * max(1, len(query)))):
            page = torch.cat(list(others)).to(device, dtype)
            best = torch.segment_reduce(
                page @ query.T, "max", lengths=_lengths(others, device), initial=-torch.inf
            )
            best = best.T.contiguous()
            parts.append(torch.segment_reduce(best, "sum", lengths=lengths, initial=0))
        scores.append(torch.cat(parts, dim=1))
    return torch.cat(scores)


def batches(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive rows in batches of `size`, or of one if `size` is below 1."""
    return [rows[start : start + max(1, size)] for start in range(0, len(rows), max(1, size))]


def _lengths(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.tensor(list(map(len, rows)), device=device)


def _longest(rows: Sequence[Tensor]) -> int:
    return max(1, *map(len, rows))


def ranking(scores: Scores) -> Ranking:
    """Page numbers [queries, pages], best first; pages with equal scores keep their order.

    Scores are rounded to five decimals: a GEMM may round identical pages differently.
    """
    return np.argsort(-np.round(scores, 5), axis=-1, kind="stable")


def retrieval(
    query_ids: Sequence[str], top: Sequence[Sequence[str]], relevance: Relevance
) -> dict[str, list[float]]:
    """nDCG and recall of each query, from the ids of its ten best pages, by ir-measures.

    Every query must have a relevant page.
    """
    # Scored by rank: the library breaks ties by page id.
    run = {
        query: {page: float(-place) for place, page in enumerate(pages)}
        for query, pages in zip(query_ids, top, strict=True)
    }
    judged = {query: dict(relevance[query]) for query in query_ids}
    values = {
        (value.measure, value.query_id): float(value.value)
        for value in ir_measures.iter_calc(list(RETRIEVAL), judged, run)
    }
    return {
        name: [values[measure, query] for query in query_ids] for measure, name in RETRIEVAL.items()
    }


def overlap(ranked: Ranking, base: Ranking, k: int) -> list[float]:
    """The share of BASE's best k pages (or of all, if fewer) among the best k of `ranked`."""
    return [float(np.isin(*pair).mean()) for pair in zip(ranked[:, :k], base[:, :k], strict=True)]


def kendall(scores: Scores, base: Scores) -> list[float]:
    """Kendall's tau-b of each query's scores to BASE's, over all pages.

    Constant scores have no tau-b: the value is 1 if both sides are constant, 0 if only one is.
    """

    def tau(ours: Scores, theirs: Scores) -> float:
        constant = [(side == side[0]).all() for side in (ours, theirs)]
        return float(all(constant) if any(constant) else kendalltau(ours, theirs).statistic)

    return list(map(tau, scores, base))


def score_error(scores: Scores, base: Scores) -> list[float]:
    """The mean over pages of |score - BASE's| / |BASE's|; infinite and zero scores do not count."""
    ours, theirs = np.ma.masked_invalid(scores), np.ma.masked_invalid(base)
    return (abs(ours - theirs) / abs(theirs)).mean(axis=1).filled(0).tolist()
