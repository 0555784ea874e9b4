"""The vision encoder of execution `fast`: images of one grid, [images, patches], in one batch.

The images share their positions, so nothing is gathered image by image, and a layer's attention is
one call. GEMMs are those of the loaded network; the small functions between them are fused on a
GPU. Source of the steps: transformers' Qwen3VLVisionModel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def layer_normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_normed(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`(x + delta, its LayerNorm)`."""
    total = x + delta
    return total, layer_normed(total, weight, bias, eps)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return functional.gelu(x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """GELU, exact."""
    return functional.gelu(x)


def vision_heads(qkv: Tensor, size: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [images, heads, patches, size] of qkv [images, patches, 3 x width].

    cos and sin are [patches, 1, size]; queries and keys are rotated in float32.
    """
    q, k, v = (part.unflatten(-1, (-1, size)) for part in qkv.chunk(3, dim=-1))
    q, k = (_rotated(part.float(), cos, sin).to(part.dtype) for part in (q, k))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every patch to every patch of its image, [images x patches, width]."""
    result = functional.scaled_dot_product_attention(q, k, v)
    return result.transpose(1, 2).flatten(2).flatten(0, 1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def in_blocks(values: Tensor, merge: int) -> Tensor:
    """values [rows, columns, ...] as [patches, ...] in the order of patches: merged blocks."""
    rows, columns = values.shape[:2]
    blocks = values.unflatten(1, (columns // merge, merge)).unflatten(0, (rows // merge, merge))
    return blocks.transpose(1, 2).flatten(0, 3)


def position_embeddings(visual: Any, rows: int, columns: int) -> Tensor:
    """The learned embeddings [patches, width] of a grid, bilinear between those of the network."""
    table = visual.pos_embed.weight
    side = round(table.shape[0] ** 0.5)
    result: Any = 0
    axes = [_between(count, side, table.device) for count in (rows, columns)]
    for row, row_share in axes[0]:
        for column, column_share in axes[1]:
            share = row_share[:, None] * column_share
            result = result + table[row[:, None] * side + column] * share.unsqueeze(-1)
    return in_blocks(result, visual.config.spatial_merge_size).to(table.dtype)


def _between(count: int, side: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The two neighbours of each of `count` places over `side` points, and their shares."""
    place = torch.linspace(0, side - 1, count, device=device)
    low = place.long()
    share = place - low
    return [(low, 1 - share), ((low + 1).clamp(max=side - 1), share)]


def rotary(visual: Any, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """`(cos, sin)`, each [patches, 1, size of a head] in float32: the angles of row and column."""
    frequencies = visual.rotary_pos_emb.inv_freq.float()
    counts = (rows, columns)
    row, column = (
        torch.arange(n, device=frequencies.device)[:, None] * frequencies for n in counts
    )
    width = len(frequencies)
    both = row[:, None].expand(-1, columns, width), column[None].expand(rows, -1, width)
    angles = in_blocks(torch.cat([*both, *both], dim=-1), visual.config.spatial_merge_size)
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


class Vision(nn.Module):
    """The vision encoder `visual` of a loaded network, without the network's own forward.

    `small` wraps each function between GEMMs as the device runs it, `attend` each attention.
    """

    def __init__(self, visual: Any, small: Wrap, attend: Wrap) -> None:
        super().__init__()
        self.parts: Any = (visual,)  # a tuple: its tensors belong to the loaded network
        self.small, self.attend = small, attend

    def forward(self, pixels: Tensor, rows: int, columns: int) -> list[Tensor]:
        """The image embeddings, then the deepstack features, each [visual tokens, hidden].

        `pixels` is [images x patches, 1536], of images of one grid of `rows` x `columns` patches.
        """
        (visual,), small, shape = self.parts, self.small, (-1, rows * columns)
        patch, blocks = visual.patch_embed.proj, visual.blocks
        x = functional.linear(pixels.to(patch.weight.dtype), patch.weight.flatten(1), patch.bias)
        x = (x.unflatten(0, shape) + position_embeddings(visual, rows, columns)).flatten(0, 1)
        angles, size = rotary(visual, rows, columns), x.shape[-1] // blocks[0].attn.num_heads
        mergers = dict(
            zip(visual.deepstack_visual_indexes, visual.deepstack_merger_list, strict=True)
        )
        features = []
        y = small(layer_normed)(x, *_norm(blocks[0].norm1))
        next_norms = [*[block.norm1 for block in blocks][1:], visual.merger.norm]
        for number, (block, next_norm) in enumerate(zip(blocks, next_norms, strict=True)):
            qkv = block.attn.qkv(y).unflatten(0, shape)
            attention = self.attend(attended)(*small(vision_heads)(qkv, size, *angles))
            del qkv
            x, y = small(add_layer_normed)(x, block.attn.proj(attention), *_norm(block.norm2))
            del attention
            mlp = block.mlp.linear_fc2(small(gelu_tanh)(block.mlp.linear_fc1(y)))
            x, y = small(add_layer_normed)(x, mlp, *_norm(next_norm))
            del mlp
            if merger := mergers.get(number):
                wide = _joined(x, merger)
                wide = small(layer_normed)(wide, *_norm(merger.norm))
                features.append(self._merged(merger, wide))
        return [self._merged(visual.merger, _joined(y, visual.merger)), *features]

    def _merged(self, merger: Any, x: Tensor) -> Tensor:
        return merger.linear_fc2(self.small(gelu)(merger.linear_fc1(x)))


def _joined(x: Tensor, merger: Any) -> Tensor:
    """Patches x [patches, width] as [visual tokens, 4 x width]."""
    return x.view(-1, merger.hidden_size)


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps
