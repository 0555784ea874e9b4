"""Late-interaction scores (MaxSim), and metrics of rankings and scores: one value per query."""

from __future__ import annotations

from collections.abc import Sequence

import ir_measures
import numpy as np
import torch
from ir_measures import R, nDCG
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor

RETRIEVAL = {nDCG @ 5: "nDCG@5", nDCG @ 10: "nDCG@10", R @ 5: "recall@5", R @ 10: "recall@10"}

Scores = NDArray[np.floating]  # [queries, pages]
Ranking = NDArray[np.intp]  # [queries, pages], page numbers, best first


def unpadded(embeddings: Tensor, mask: Tensor) -> list[Tensor]:
    """The [tokens, dim] of each row of [rows, tokens, dim] where `mask` [rows, tokens] is not 0."""
    return [row[keep] for row, keep in zip(embeddings, mask.bool(), strict=True)]


def maxsim(queries: Sequence[Tensor], pages: Sequence[Tensor], budget_bytes: int = 2**28) -> Tensor:
    """Scores [queries, pages]: for each query token the best page token, summed over the query.

    Queries and pages are [tokens, dim] each. The result is float32 (float64 for float64), on the
    queries' device. A query without tokens scores 0; a page without tokens scores -inf.
    `budget_bytes` limits the similarities between tokens in memory, unless one pair needs more.
    Source: ColBERT (Khattab and Zaharia 2020), equation 3.

    >>> query, page = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.75], [1.0, 0]])
    >>> maxsim([query], [page]).tolist()
    [[1.75]]
    """
    if not queries or not pages:
        return torch.zeros(len(queries), len(pages))
    device, dtype = queries[0].device, torch.promote_types(queries[0].dtype, torch.float32)
    needed_bytes = sum(map(len, queries)) * sum(map(len, pages)) * dtype.itemsize
    if needed_bytes > budget_bytes and len(pages) > 1:
        halves = pages[: len(pages) // 2], pages[len(pages) // 2 :]
        return torch.cat([maxsim(queries, half, budget_bytes) for half in halves], dim=1)
    if needed_bytes > budget_bytes and len(queries) > 1:
        halves = queries[: len(queries) // 2], queries[len(queries) // 2 :]
        return torch.cat([maxsim(half, pages, budget_bytes) for half in halves])
    query, page = torch.cat(list(queries)).to(dtype), torch.cat(list(pages)).to(device, dtype)
    lengths = [torch.tensor(list(map(len, rows)), device=device) for rows in (queries, pages)]
    best = torch.segment_reduce(page @ query.T, "max", lengths=lengths[1], initial=-torch.inf)
    return torch.segment_reduce(best.T.contiguous(), "sum", lengths=lengths[0], initial=0)


def ranking(scores: Scores) -> Ranking:
    """Page numbers [queries, pages], best first; pages with equal scores keep their order.

    Scores are rounded to five decimals: a GEMM may round identical pages differently.
    """
    return np.argsort(-np.round(scores, 5), axis=-1, kind="stable")


def retrieval(
    query_ids: Sequence[str], top: Sequence[Sequence[str]], relevance: dict[str, dict[str, int]]
) -> dict[str, list[float]]:
    """A dict, metric to one value (0 to 1) a query, from the ids of its ten best pages.

    Every query must have a relevant page.
    """
    # Scored by rank: the library breaks ties by page id.
    run = {
        query: {page: float(-place) for place, page in enumerate(pages)}
        for query, pages in zip(query_ids, top, strict=True)
    }
    rows = ir_measures.iter_calc(list(RETRIEVAL), relevance, run)
    values = {(row.measure, row.query_id): float(row.value) for row in rows}
    return {name: [values[of, query] for query in query_ids] for of, name in RETRIEVAL.items()}


def overlap(ranked: Ranking, base: Ranking, k: int) -> list[float]:
    """One share (0 to 1) a query: BASE's best k pages, or all, among the best k of `ranked`."""
    return [float(np.isin(*pair).mean()) for pair in zip(ranked[:, :k], base[:, :k], strict=True)]


def kendall(scores: Scores, base: Scores) -> list[float]:
    """Kendall's tau-b of each query's scores to BASE's, over all pages.

    Constant scores have no tau-b: the value is 1 if both sides are constant, 0 if only one is.
    """
    constant = [(side == side[:, :1]).all(axis=1) for side in (scores, base)]
    defined = ~(constant[0] | constant[1])
    taus = np.where(constant[0] & constant[1], 1.0, 0.0)
    if defined.any():
        taus[defined] = kendalltau(scores[defined], base[defined], axis=1).statistic
    return taus.tolist()


def score_error(scores: Scores, base: Scores) -> list[float]:
    """One mean a query of |score - BASE's| / |BASE's|; infinite and zero scores do not count."""
    ours, theirs = np.ma.masked_invalid(scores), np.ma.masked_invalid(base)
    return (abs(ours - theirs) / abs(theirs)).mean(axis=1).filled(0).tolist()
