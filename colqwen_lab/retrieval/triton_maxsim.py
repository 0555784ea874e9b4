"""MaxSim of stored pages in one Triton kernel, for a GPU: each stored byte is read once a query.

Similarities between tokens stay on chip, and 8-bit codes and signs are decoded there. The library
`late-interaction-kernels` does this for 16-bit vectors only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTORS, VALUES = 64, 64  # of a tile
PLAIN, SCALED, SIGNS = 0, 1, 2


@triton.jit
def _maxsim(
    queries,
    query_ends,
    vectors,
    scales,
    ends,
    scores,
    width,
    pages,
    DIMS: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    VECTORS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One program: one page and one query of at most TOKENS tokens."""
    page, query = tl.program_id(0), tl.program_id(1)
    start = tl.load(ends + page - 1, mask=page > 0, other=0)
    end = tl.load(ends + page)
    first = tl.load(query_ends + query - 1, mask=query > 0, other=0)
    last = tl.load(query_ends + query)
    token, value = tl.arange(0, TOKENS), tl.arange(0, VALUES)
    real = first + token < last
    best = tl.full([TOKENS], float("-inf"), tl.float32)
    for at in range(start, end, VECTORS):
        row = at + tl.arange(0, VECTORS)
        there = row < end
        sums = tl.zeros([VECTORS, TOKENS], tl.float32)
        for column in tl.static_range(0, DIMS, VALUES):
            place = column + value
            within = place < DIMS
            both = there[:, None] & within[None, :]
            if KIND == 2:
                line = row.to(tl.int64)[:, None] * width + (place // 8)[None, :]
                bits = tl.load(vectors + line, mask=both, other=0).to(tl.int32)
                tile = (((bits >> (7 - place % 8)[None, :]) & 1) * 2 - 1).to(tl.bfloat16)
            else:
                line = row.to(tl.int64)[:, None] * width + place[None, :]
                tile = tl.load(vectors + line, mask=both, other=0.0).to(queries.dtype.element_ty)
            q_line = (first + token)[None, :] * DIMS + place[:, None]
            q = tl.load(queries + q_line, mask=real[None, :] & within[:, None], other=0.0)
            sums = tl.dot(tile, q, sums)
        if KIND == 1:
            sums *= tl.load(scales + row, mask=there, other=0.0).to(tl.float32)[:, None]
        best = tl.maximum(best, tl.max(tl.where(there[:, None], sums, float("-inf")), 0))
    total = tl.sum(tl.where(real, best, 0.0), 0)
    tl.store(scores + query * pages + page, total)


def maxsim_stored(
    queries: list[Tensor], vectors: Tensor, scales: Tensor | None, lengths: Tensor, dims: int
) -> Tensor:
    """Scores [queries, pages] in float32 of pages as `retrieval.index` stores them.

    Queries [tokens, dims] are rounded to 16 bits: to float16 for float16 pages, else bfloat16.
    """
    kind = SCALED if scales is not None else SIGNS if vectors.dtype == torch.uint8 else PLAIN
    dtype = torch.float16 if vectors.dtype == torch.float16 else torch.bfloat16
    device = vectors.device
    joined = torch.cat(queries).to(device, dtype).contiguous()
    query_ends = torch.tensor([len(query) for query in queries]).cumsum(0).to(device)
    ends = lengths.cumsum(0).to(device)
    scores = torch.empty(len(queries), len(lengths), device=device)
    tokens = max(16, triton.next_power_of_2(max(map(len, queries))))
    _maxsim[len(lengths), len(queries)](
        *(joined, query_ends, vectors, scales, ends, scores, vectors.shape[1], len(lengths)),
        *(dims, kind, tokens, VECTORS, VALUES),
    )
    return scores * dims**-0.5 if kind == SIGNS else scores
