"""The lab's Triton kernels, for what no library's kernel does well. They need a GPU.

`attend_short`: causal attention of short texts in one kernel, from the QKV GEMM to the input of O.
PyTorch's flash kernels use tiles of 128 tokens, mostly empty for a query of 18. Here a tile holds
the query heads that share a key head, side by side, and the kernel applies norm and rotary
positions.

`dequantised`: 4-bit weights in humming's layout (described in w4.cu) as 16-bit values.

`fp8_rows_fused`: FP8 codes of rows, with SiLU-and-mul. It reads each row once; the kernels of
torch.compile read it at least twice.
"""

from __future__ import annotations

from collections.abc import Sequence

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
