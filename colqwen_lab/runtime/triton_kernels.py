"""The lab's Triton kernels, for what no library's kernel does well. They need a GPU.

`attend_short`: causal attention of short texts in one kernel, from the QKV GEMM to the input of O.
PyTorch's flash kernels use tiles of 128 tokens, mostly empty for a query of 18. Here a tile holds
the query heads that share a key head, side by side, and the kernel applies norm and rotary
positions.

`dequantised`: 4-bit weights in humming's layout (described in w4.cu) as 16-bit values.

`fp8_rows_fused`: FP8 codes of rows, with SiLU-and-mul. It reads each row once; the kernels of
torch.compile read it at least twice.

`best_products`: MaxSim of an index, up to the sum over query tokens. It reads each stored vector
once and writes a number for each page and query token. Libraries' kernels read pages once for each
query and pad 320 values to 512.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# About the number of multiprocessors of these GPUs.
ENOUGH_PROGRAMS = 128
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


@triton.jit
def _wide(at, real):
    return tl.load(at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _ready(at, real, position, weight, cos, sin, eps, SIZE: tl.constexpr):
    """Both halves of the heads at `at`, RMS-normed and rotated, in the dtype of `at`."""
    half, there = tl.arange(0, SIZE // 2)[None, :], real[:, None]
    left, right = _wide(at + half, there), _wide(at + half + SIZE // 2, there)
    scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / SIZE + eps)[:, None]
    left = left * scale * tl.load(weight + half).to(tl.float32)
    right = right * scale * tl.load(weight + half + SIZE // 2).to(tl.float32)
    angle = position[:, None] * SIZE + half
    c, s = _wide(cos + angle, there), _wide(sin + angle, there)
    kind = at.dtype.element_ty
    return (left * c - right * s).to(kind), (right * c + left * s).to(kind)


@triton.jit
def _attend(
    qkv,
    out,
    q_weight,
    k_weight,
    cos,
    sin,
    tokens,
    eps,
    factor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one text, BLOCK tokens, HEADS of the GROUP query heads that share a key head."""
    text, part, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows, size = tl.arange(0, HEADS * BLOCK), tl.arange(0, SIZE)[None, :]
    position = block * BLOCK + rows // HEADS
    real = position < tokens
    WIDTH: tl.constexpr = (GROUP + 2) * KV_HEADS * SIZE
    line = qkv + text * tokens * WIDTH
    q_head = (part * HEADS + rows % HEADS) * SIZE
    q_at = line + (position * WIDTH + q_head)[:, None]
    q_left, q_right = _ready(q_at, real, position, q_weight, cos, sin, eps, SIZE)
    k_head = (KV_HEADS * GROUP + part * HEADS // GROUP) * SIZE
    largest = tl.full([HEADS * BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEADS * BLOCK], tl.float32)
    result = tl.zeros([HEADS * BLOCK, SIZE], tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        key = start + tl.arange(0, BLOCK)
        there = key < tokens
        k_at = line + (key * WIDTH + k_head)[:, None]
        k_left, k_right = _ready(k_at, there, key, k_weight, cos, sin, eps, SIZE)
        v = tl.load(k_at + KV_HEADS * SIZE + size, mask=there[:, None], other=0.0)
        score = tl.dot(q_left, tl.trans(k_left)) + tl.dot(q_right, tl.trans(k_right))
        score = tl.where(key[None, :] <= position[:, None], score * factor, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, 1))
        share, before = tl.exp(score - higher[:, None]), tl.exp(largest - higher)
        total = total * before + tl.sum(share, 1)
        result = result * before[:, None] + tl.dot(share.to(v.dtype), v)
        largest = higher
    to = out + ((text * tokens + position) * GROUP * KV_HEADS * SIZE + q_head)[:, None] + size
    tl.store(to, (result / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])


def attend_short(
    qkv: Tensor, kv_heads: int, norms: Sequence[Tensor], eps: float, rotary: Sequence[Tensor]
) -> Tensor:
    """Causal attention [batch, tokens, heads x size] of the output of the QKV GEMM.

    qkv is [batch, tokens, (heads + 2 x kv_heads) x size]. `norms` are the weights [size] of the
    query and key norms; `rotary` is cos and sin [tokens, 1, size].
    """
    batch, tokens, width = qkv.shape
    size = norms[0].shape[0]
    group = width // size // kv_heads - 2
    block = 16 if tokens <= 16 else 32
    blocks = triton.cdiv(tokens, block)
    # With few texts, a program for all heads of a group would leave multiprocessors idle.
    heads = group if batch * kv_heads * blocks >= ENOUGH_PROGRAMS else 1
    out = qkv.new_empty(batch, tokens, group * kv_heads * size)
    _attend[batch, kv_heads * group // heads, blocks](
        *(qkv, out, *norms, *rotary, tokens, eps, size**-0.5),
        *(kv_heads, group, heads, size, block),
        num_warps=max(1, heads * block // 16),
    )
    return out


@triton.jit
def _quantise(
    x,
    codes,
    scales,
    LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a row of WIDTH codes; with GATED, of SiLU of the first half times the second."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, real = x + row * WIDTH * (2 if GATED else 1) + column, column < WIDTH
    values = _wide(at, real)
    if GATED:
        values = values * tl.sigmoid(values) * _wide(at + WIDTH, real)
    scale = tl.maximum(tl.max(tl.abs(values), 0) / LARGEST, 1e-12)
    tl.store(scales + row, scale)
    small = tl.minimum(tl.maximum(values / scale, -LARGEST), LARGEST)
    tl.store(codes + row * WIDTH + column, small.to(codes.dtype.element_ty), mask=real)


def fp8_rows_fused(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`linears.fp8_rows` of x [M, width], or of SiLU-and-mul of x [M, 2 x width]."""
    m, block = x.shape[0], triton.next_power_of_2(width)
    codes = x.new_empty(m, width, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(m, 1, dtype=torch.float32)
    sizes = LARGEST_FP8, width, x.shape[1] == 2 * width, block
    _quantise[(m,)](x.contiguous(), codes, scales, *sizes, num_warps=max(4, block // 1024))
    return codes, scales


@triton.jit
def _dequantise(codes, scales, out, OUTS: tl.constexpr, INS: tl.constexpr):
    """One program: 64 outputs of a group of 128 inputs."""
    block, group = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, 128)[None, :]
    # A word holds 8 codes of a lane's fragment of a 16 x 16 tile.
    lane = row % 8 * 4 + column % 8 // 2
    place = column % 2 * 4 + row % 16 // 8 * 2 + column % 16 // 8
    tile = (group * 8 + column // 16) * (OUTS // 64) + block
    words = tl.load(codes + tile * 128 + lane * 4 + row // 16)
    own = row % 8 * 8 + row // 8
    scale = tl.load(scales + (group * (OUTS // 64) + block) * 64 + own).to(tl.float32)
    values = ((words >> (4 * place) & 15) - 8).to(tl.float32) * scale
    to = out + (block * 64 + row) * INS + group * 128 + column
    tl.store(to, values.to(out.dtype.element_ty))


def dequantised(codes: Tensor, scales: Tensor, outs: int, ins: int) -> Tensor:
    """The weight [outs, ins] of symmetric 4-bit codes in groups of 128, in the type of scales."""
    out = scales.new_empty(outs, ins)
    _dequantise[outs // 64, ins // 128](codes.view(torch.int32), scales, out, outs, ins)
    return out


# Query tokens and vectors of a program, stages of its pipeline, warps; the first that fits runs.
MAXSIM_TILES = ((128, 64, 3, 4), (64, 64, 3, 4), (32, 64, 3, 4), (32, 32, 2, 4), (16, 16, 2, 1))


@triton.jit
def _codes(
    at,
    real,
    DIMS: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
):
    """SIZE values from FIRST on of the vectors that start `at` [rows, 1], in 16 bits."""
    if BITS:
        byte = FIRST // 8 + tl.arange(0, SIZE // 8)[None, :]
        signs = tl.load(at + byte, mask=real & (byte < (DIMS + 7) // 8), other=0).to(tl.int16)
        # The sign bit of -1 and 1 in bfloat16; the highest bit of a byte comes first.
        signs = signs[:, :, None] << (8 + tl.arange(0, 8))[None, None, :].to(tl.int16)
        ones = (signs & -0x8000) ^ -0x4080
        return tl.reshape(ones, (at.shape[0], SIZE)).to(tl.bfloat16, bitcast=True)
    column = FIRST + tl.arange(0, SIZE)[None, :]
    return tl.load(at + column, mask=real & (column < DIMS), other=0).to(KIND)


@triton.jit
def _best(
    vectors,
    scales,
    starts,
    queries,
    out,
    tokens,
    DIMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: a page, TOKENS query tokens. A vector is multiplied in two parts, LEFT first."""
    blocks = tl.cdiv(tokens, TOKENS)
    page = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    left, right = tl.arange(0, LEFT), LEFT + tl.arange(0, RIGHT)
    asked = (token < tokens)[None, :]
    kind = queries.dtype.element_ty
    q_at = queries + token[None, :] * DIMS
    q_left = tl.load(q_at + left[:, None], mask=asked & (left < DIMS)[:, None], other=0.0)
    q_right = tl.load(q_at + right[:, None], mask=asked & (right < DIMS)[:, None], other=0.0)
    first = tl.load(starts + page)
    count = (tl.load(starts + page + 1) - first).to(tl.int32)
    base = vectors + first * WIDTH
    best = tl.full([ROWS, TOKENS], float("-inf"), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        real = (row < count)[:, None]
        at = base + row[:, None] * WIDTH
        # Where a query is zero behind its last value, a product ignores the vector's value.
        products = tl.dot(_codes(at, real, DIMS, 0, LEFT, BITS, kind), q_left)
        products = tl.dot(_codes(at, real, DIMS, LEFT, RIGHT, BITS, kind), q_right, products)
        if SCALED:
            scale = tl.load(scales + first + row, mask=row < count, other=0.0)
            products = products * scale.to(tl.float32)[:, None]
        best = tl.maximum(best, tl.where(real, products, float("-inf")))
    tl.store(out + page * tokens + token, tl.max(best, 0), mask=token < tokens)


def best_products(
    vectors: Tensor, scales: Tensor | None, starts: Tensor, queries: Tensor, bits: bool
) -> Tensor:
    """The largest product [pages, tokens] of each query token with a page's vectors, in float32.

    `vectors` [vectors, values or bytes] are the stored ones of all pages, `starts` [pages + 1] the
    first of each page, `scales` [vectors, 1] of int8. `queries` [tokens, dims] are of 16 bits.
    """
    (tokens, dims), pages = queries.shape, len(starts) - 1
    left = max(16, 1 << (dims - 1).bit_length() - 1)
    right = max(16, triton.next_power_of_2(dims - left))
    limit = 2**62
    if vectors.is_cuda:
        properties: Any = torch.cuda.get_device_properties(vectors.device)
        limit = properties.shared_memory_per_block_optin
    most = max(16, triton.next_power_of_2(tokens))
    row_bytes = (left + right) * vectors.element_size()
    tile, rows, stages, warps = next(
        (tile, rows, stages, warps)
        for tile, rows, stages, warps in MAXSIM_TILES
        if tile <= most and tile * (left + right) * 2 + rows * row_bytes * stages <= limit
    )
    out = queries.new_empty(pages, tokens, dtype=torch.float32)
    _best[(pages * triton.cdiv(tokens, tile),)](
        *(
            vectors,
            vectors if scales is None else scales,
            starts,
            queries.contiguous(),
            out,
            tokens,
        ),
        *(dims, vectors.shape[1], bits, scales is not None, left, right, tile, rows),
        num_warps=warps,
        num_stages=stages,
    )
    return out
