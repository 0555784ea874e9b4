"""Late-interaction scores: for every token of a query its best token of the page, summed over the query.

Queries and pages are ragged, so padding never counts. A query without tokens scores 0 against every page (a sum over
nothing), a page without tokens scores -inf against any other query (a best of nothing) and so comes last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BUDGET_BYTES = 256 * 2**20


def unpadded(embeddings: Tensor, mask: Tensor) -> list[Tensor]:
    """Each row's [tokens, dim] of padded [rows, tokens, dim], without the tokens whose `mask` [rows, tokens] is 0."""
    return [row[keep] for row, keep in zip(embeddings, mask.bool(), strict=True)]


def maxsim(
    queries: Sequence[Tensor], pages: Sequence[Tensor], budget_bytes: int = BUDGET_BYTES
) -> Tensor:
    """Scores [queries, pages] in float32, or in float64 for float64 embeddings, on the device of the queries.

    Source: ColBERT (Khattab and Zaharia 2020), equation 3.

    >>> query, page = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    >>> maxsim([query], [page])
    tensor([[1.8000]])

    Args:
        queries: [tokens, dim] each.
        pages: [tokens, dim] each, on any device.
        budget_bytes: the most that similarities between tokens take at once, or those of one query and one page.
    """
    if not queries or not pages:
        return torch.zeros(len(queries), len(pages))
    device = queries[0].device
    dtype = torch.promote_types(queries[0].dtype, torch.float32)
    scores = torch.empty(len(queries), len(pages), dtype=dtype, device=device)
    # The shapes of the two sides weigh the same: a block of b tokens a side takes b * b * itemsize bytes.
    side = int((budget_bytes / dtype.itemsize) ** 0.5)
    for rows in _blocks(queries, side):
        query = torch.cat(list(queries[rows])).to(dtype)
        query_lengths = _lengths(queries[rows], device)
        for columns in _blocks(pages, budget_bytes // (dtype.itemsize * max(1, len(query)))):
            page = torch.cat(list(pages[columns])).to(device, dtype)
            best = torch.segment_reduce(
                page @ query.T, "max", lengths=_lengths(pages[columns], device), initial=-torch.inf
            )
            summed = torch.segment_reduce(
                best.T.contiguous(), "sum", lengths=query_lengths, initial=0
            )
            scores[rows, columns] = summed
    return scores


def _lengths(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([len(row) for row in rows], device=device)


def _blocks(rows: Sequence[Tensor], tokens: int) -> Iterator[slice]:
    """Slices of consecutive rows with at most so many tokens in all, at least one row each."""
    start, held = 0, 0
    for number, row in enumerate(rows):
        if number > start and held + len(row) > tokens:
            yield slice(start, number)
            start, held = number, 0
        held += len(row)
    yield slice(start, len(rows))
