"""Execution `fast`: the forward, in the order in which it runs.

1. Padding moves to the right, whichever side it was on. Attention is causal, so no real token sees
   padding, and no mask is needed.
2. The length is rounded up to a bucket, so that few shapes occur.
3. A layer is four GEMMs (QKV and gate/up are one each), attention, and three small functions that
   torch.compile fuses on a GPU.
4. On a GPU the forward of a bucket is captured once as a CUDA graph and replayed: one launch, no
   Python, no synchronisation. All graphs share one memory pool. A CPU runs the same functions.

Pages of one grid have equal lengths and positions: they need no padding, and their visual tokens
stand at the same places. They run without a graph. There is no KV cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.model.checkpoint import Checkpoint
from colqwen_lab.model.loading import Loaded, load
from colqwen_lab.model.network import ColQwen3, ColQwen3Output
from colqwen_lab.model.packing import gptq_packed
from colqwen_lab.runtime import tune
from colqwen_lab.runtime.graphs import capture_stream, captured
from colqwen_lab.runtime.kernels import KERNELS, Build, dense_linear, pick
from colqwen_lab.runtime.linears import (
    AsLoaded,
    Dense,
    FusedLinear,
    compiled,
)
from colqwen_lab.runtime.tune import Paths
from colqwen_lab.runtime.vision import Vision

__all__ = ["KINDS", "SHORT_TOKENS", "Fast", "bucket", "capture_stream", "load_fast"]

MAX_GRAPHS = 64
# Up to this length PyTorch's attention kernels leave most of a tile empty. Above it the lab's
# kernel would norm and rotate keys too often.
SHORT_TOKENS = 128
# The GEMMs of a layer, in their order: where their linears are.
LINEARS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}
KINDS = tuple(LINEARS)


def bucket(tokens: int) -> int:
    """The length at which `tokens` are computed: rounded up by less than a sixteenth."""
    step = max(1, 2 ** (tokens.bit_length() - 5))
    return -(-tokens // step) * step


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_normed(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(x + delta, its RMSNorm)`."""
    total = x + delta
    return total, normed(total, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SiLU of the first half times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, tokens, heads, size] with rotary positions; cos and sin are [tokens, 1, size]."""
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-right, left), dim=-1), sin)


def heads_of(
    qkv: Tensor,
    sizes: Sequence[int],
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, tokens, size] of qkv [batch, tokens, all heads]."""
    size = q_weight.shape[0]
    q, k, v = (part.unflatten(-1, (-1, size)) for part in qkv.split(sizes, dim=-1))
    q, k = rotated(normed(q, q_weight, eps), cos, sin), rotated(normed(k, k_weight, eps), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, [batch, tokens, heads x size]."""
    if q.device.type == "cpu" and q.shape[2] <= SHORT_TOKENS:
        result = _attended_short(q, k, v)
    else:
        if q.device.type == "cpu":  # no enable_gqa: the CPU's flash kernel does not support it
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        result = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    return result.transpose(1, 2).flatten(2)


def _attended_short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in two GEMMs over all heads that share a key head."""
    tokens, size = q.shape[2:]
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ k.transpose(-1, -2)).float().unflatten(2, (-1, tokens)) * size**-0.5
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill_(later, -torch.inf).softmax(-1).to(v.dtype)
    return (weights.flatten(2, 3) @ v).unflatten(2, (-1, tokens)).flatten(1, 2)


def real_first(mask: Tensor) -> Tensor:
    """The new position of each token of mask [batch, tokens]: real tokens first, in their order."""
    real = mask.cumsum(1)
    return torch.where(mask.bool(), real - 1, real[:, -1:] + (1 - mask).cumsum(1) - 1)


class PageShape(NamedTuple):
    """What pages of one batch must share: their real tokens, and the place and grid of the image.

    `padding` stands on the left; `before` tokens precede the `image` tokens, of a grid of
    `rows` x `columns` patches. A page of text has no image.
    """

    padding: int
    tokens: int
    before: int
    image: int
    rows: int
    columns: int


def page_shapes(
    mask: Tensor, images: Tensor, grids: Tensor
) -> Iterator[tuple[PageShape, int, int]]:
    """`(shape, first, last)` of each run of neighbouring pages of one shape."""
    counts = mask.argmax(1), mask.sum(1), images.argmax(1), images.sum(1)
    every, grid = torch.stack([each.long() for each in counts], 1).tolist(), iter(grids.tolist())
    shapes = []
    for padding, tokens, place, image in every:
        _, rows, columns = next(grid) if image else (1, 0, 0)
        before = place - padding if image else 0
        shapes.append(PageShape(padding, tokens, before, image, rows, columns))
    first = 0
    for shape, run in groupby(shapes):
        last = first + len(list(run))
        yield shape, first, last
        first = last


def page_positions(shape: PageShape, merge: int) -> Tensor:
    """The rotary positions [3, 1, tokens]: time, row and column of each token of a page.

    Text after the image continues behind the longer side of its grid.
    """
    rows, columns = shape.rows // merge, shape.columns // merge
    grid = torch.zeros(rows, columns, dtype=torch.long)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    image = shape.before + torch.stack(
        [each.flatten() for each in (grid, grid + row, grid + column)]
    )
    after = torch.arange(shape.tokens - shape.before - shape.image)
    start = torch.arange(shape.before).expand(3, -1)
    end = (shape.before + max(rows, columns) + after).expand(3, -1)
    return torch.cat([start, image, end], 1).unsqueeze(1)


class Layer(nn.Module):
    """The four fused linears of a decoder layer, and its norms."""

    qkv: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear

    def __init__(self, layer: Any, dense: Build, packed: Build) -> None:
        super().__init__()
        attention = layer.self_attn
        self.head_norms = [attention.q_norm.weight, attention.k_norm.weight]
        self.norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        self.eps = layer.input_layernorm.variance_epsilon
        for kind, (part, names) in LINEARS.items():
            parent = getattr(layer, part)
            linears = [getattr(parent, name) for name in names]
            build = dense if all(isinstance(one, nn.Linear) for one in linears) else packed
            fused = build(linears)
            self.add_module(kind, fused)
            if not isinstance(fused, Dense):
                for name in names:  # the fused linear holds their weights now
                    setattr(parent, name, None)
        self.gate_up.gated = not self.down.accepts_gate_up
        self.sizes = self.qkv.sizes
        self.kv_heads = self.sizes[1] // attention.head_dim


class Fast(nn.Module):
    """The forward of a ColQwen3. It takes over the model's linears, so the model's own
    forward must not be called again.

    The linears of a kind share their kernel configs.
    """

    def __init__(self, model: ColQwen3, dense: Build, packed: Build) -> None:
        super().__init__()
        text: Any = model.vlm.model.language_model
        head = model.embedding_proj_layer
        self.parts: Any = (text.embed_tokens, text.rotary_emb, text.norm, head)
        self.layers: Any = nn.ModuleList(Layer(layer, dense, packed) for layer in text.layers)
        for kind in KINDS:
            linears = self.of_kind(kind)
            for linear in linears:
                linear.configs = linears[0].configs
        self.vision = Vision(model.vlm.model.visual, self.small, self.plain)
        self.merge = model.config.vision_config.spatial_merge_size
        self.paths, self.tunes = Paths(), True
        self.graphs: dict[tuple[int, int], tuple[Any, torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def chosen(self) -> dict[str, str]:
        """The kernel configs that timing chose, by "KIND x M"."""
        return {
            f"{kind} x {m}": config
            for kind in KINDS
            for m, config in self.of_kind(kind)[0].configs.items()
        }

    def engaged(self, m: int = 0) -> dict[str, int]:
        """How many text linears each kernel multiplies, at M or as loaded."""
        counts: Counter[str] = Counter()
        for linear in self.linears():
            counts[linear.kernel_at(m)] += len(linear.sizes)
        return dict(counts)

    def of_kind(self, kind: str) -> list[FusedLinear]:
        """The fused linears of a kind, layer by layer."""
        return [getattr(layer, kind) for layer in self.layers]

    def linears(self) -> list[FusedLinear]:
        """All fused linears, layer by layer."""
        return [getattr(layer, kind) for layer in self.layers for kind in KINDS]

    def forward(
        self, model: ColQwen3, inputs: dict[str, Tensor], use_cache: bool = False
    ) -> ColQwen3Output:
        """Unit vectors [batch, tokens, 320] of a batch of queries or pages, zero at padding.

        Raises:
            MissingRequirement: a KV cache.
        """
        if use_cache:
            raise MissingRequirement("execution fast keeps no KV cache; valid otherwise: eager")
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if "pixel_values" in inputs:
            return ColQwen3Output(embeddings=self.pages(inputs, ids, mask))
        return ColQwen3Output(embeddings=self.texts(ids, mask))

    def texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The embeddings [batch, tokens, 320] of queries, or of pages of text."""
        tokens = ids.shape[1]
        length = bucket(tokens)
        if ids.device.type == "cuda":
            return self.replay(ids, mask, length)
        ids, mask = (functional.pad(each, (0, length - tokens)) for each in (ids, mask))
        return self.embed(ids, mask)[:, :tokens]

    def pages(self, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        """The embeddings [batch, tokens, 320] of pages with at most one image each.

        Neighbours of one shape run as one batch.
        """
        pixels, images = inputs["pixel_values"], inputs["mm_token_type_ids"]
        head, start = self.parts[3], 0
        result = head.weight.new_zeros(*ids.shape, head.out_features)
        for shape, first, last in page_shapes(mask, images, inputs["image_grid_thw"]):
            real = slice(first, last), slice(shape.padding, shape.padding + shape.tokens)
            if shape.image:
                end = start + (last - first) * shape.rows * shape.columns
                if ids.device.type == "cuda":
                    self.tune(ids[real].numel())
                places = page_positions(shape, self.merge).to(ids.device)
                at = slice(shape.before, shape.before + shape.image)
                # Named here, the features would stay in memory during the layers.
                result[real] = self.decode(
                    ids[real], places, self.vision(pixels[start:end], shape.rows, shape.columns), at
                )
                start = end
            else:
                result[real] = self.texts(ids[real], mask[real])
        return result

    def replay(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """The embeddings [batch, tokens, 320] by a captured forward of `length` tokens."""
        batch, tokens = ids.shape
        if (batch, length) not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                self.forget()
            self.tune(batch * length)
            inputs = ids.new_zeros(batch, length), ids.new_ones(batch, length)
            pool = next((graph.pool() for _, graph, _ in self.graphs.values()), None)
            graph, result = captured(lambda: self.embed(*inputs), pool)
            self.graphs[batch, length] = inputs, graph, result
        inputs, graph, result = self.graphs[batch, length]
        inputs[1].zero_()
        for static, each in zip(inputs, (ids, mask), strict=True):
            static[:, :tokens].copy_(each)
        graph.replay()
        return result[:, :tokens].clone()

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The forward at a bucket's length, [batch, length, 320]; a GPU captures it as a graph."""
        position = real_first(mask)
        places = torch.arange(ids.shape[1], device=ids.device).view(1, 1, -1).expand(3, 1, -1)
        vectors = self.decode(torch.zeros_like(ids).scatter(1, position, ids), places)
        back = vectors.gather(1, position.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))
        return back * mask.unsqueeze(-1)

    def decode(
        self, ids: Tensor, places: Tensor, features: Sequence[Tensor] = (), at: slice = slice(0)
    ) -> Tensor:
        """Unit vectors [batch, tokens, 320] of ids at the rotary positions `places` [3, 1, tokens].

        `features` are those of the vision encoder for the tokens `at`: the first stand in place of
        word embeddings, the others are added after the first layers. Each is freed when used.
        """
        embed_tokens, rotary, norm, head = self.parts
        shape = ids.shape
        left = [each.unflatten(0, (len(ids), -1)) for each in features]
        x = embed_tokens(ids)
        del ids, features
        if left:
            x[:, at] = left.pop(0)
        x = x.flatten(0, 1)
        cos, sin = (part[0].unsqueeze(1) for part in rotary(x, places))
        y = self.small(normed)(x, self.layers[0].norms[0], self.layers[0].eps)
        next_norms = [*[layer.norms[0] for layer in self.layers][1:], norm.weight]
        add_then_norm = self.small(add_normed)
        for layer, next_norm in zip(self.layers, next_norms, strict=True):
            qkv = layer.qkv(y)
            attention = self.attention(layer, qkv.unflatten(0, shape), cos, sin).flatten(0, 1)
            x, y = add_then_norm(x, layer.o(attention), layer.norms[1], layer.eps)
            gate_up = self.gemm(layer.gate_up, y)
            mlp = layer.down(gate_up)
            if left:
                mlp.unflatten(0, shape)[:, at] += left.pop(0)
            x, y = add_then_norm(x, mlp, next_norm, layer.eps)
            del gate_up, mlp
        return functional.normalize(head(y), dim=-1).unflatten(0, shape)

    def gemm(self, linear: FusedLinear, x: Tensor) -> Tensor:
        """The result [M, out] of a GEMM; of gate/up after SiLU-and-mul, [M, out / 2]."""
        result = linear(x)
        if not linear.gated or result.shape[1] < linear.out_features:
            return result
        return self.small(silu_and_mul)(result)

    def small(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One of the small functions as this device runs it: fused on a GPU."""
        return compiled(function, self.parts[0].weight.device.type == "cuda")

    def plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as it is: a library's kernel, which torch.compile would not improve."""
        return function

    def attention(self, layer: Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal attention [batch, tokens, heads x size] of the output of the QKV GEMM."""
        short = self.paths.short_attention and qkv.shape[1] <= SHORT_TOKENS
        if qkv.device.type == "cuda" and short:
            from colqwen_lab.runtime.triton_kernels import attend_short

            return attend_short(qkv, layer.kv_heads, layer.head_norms, layer.eps, (cos, sin))
        heads = self.small(heads_of)(qkv, layer.sizes, *layer.head_norms, layer.eps, cos, sin)
        return attended(*heads)

    def compile(self, sizes: Iterable[int]) -> None:
        """Compile the kernel configs to time at each M of `sizes`, all at once."""
        kinds = (getattr(self.layers[0], kind) for kind in KINDS)
        tunable = [linear for linear in kinds if linear.tunable]
        tune.compile_all(tunable, {*sizes}, self.paths)

    @torch.no_grad()
    def warm_up(self, inputs: dict[str, Tensor]) -> None:
        """A forward with the kernels' own configs, for which torch.compile fuses functions."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.tunes = False
        try:
            if "pixel_values" in inputs:
                self.pages(inputs, ids, mask)
            else:
                more = (0, bucket(ids.shape[1]) - ids.shape[1])
                self.embed(functional.pad(ids, more), functional.pad(mask, more))
        finally:
            self.tunes = True

    def tune(self, m: int) -> None:
        """Choose the kernel configs at M."""
        for linears in map(self.of_kind, KINDS if self.tunes else ()):
            if linears[0].tunable and m not in linears[0].configs:
                x = self.parts[0].weight.new_empty(m, linears[0].in_features).normal_()
                tune.choose(linears, x, self.gemm, self.paths)

    def forget(self) -> None:
        """Free the captured graphs and their memory."""
        self.graphs.clear()


def load_fast(
    checkpoint: Checkpoint, device: torch.device, kernel: str = "auto", dtype: str = "bfloat16"
) -> Loaded:
    """The model of `checkpoint` ready for `fast`: fused linears, in the kernel's weight layout.

    `kernel` is auto, one of `kernels.KERNELS`, or a kernel of AutoRound, whose modules run as they
    are. So does `auto` where its best kernel cannot multiply a shape.

    Raises:
        BadInput: an unknown kernel.
        MissingRequirement: a kernel that cannot run here.
    """
    dense: Build = dense_linear(device, dtype) if kernel == "auto" else Dense
    packed: Build = AsLoaded
    source, load_kernel = checkpoint, "auto" if kernel in KERNELS else kernel
    if quantization := checkpoint.quantization:
        scheme = quantization["bits"], quantization["group_size"]
        if kernel in ("auto", *KERNELS):
            packed = pick(kernel, device, scheme, dtype)
        if packed is not AsLoaded:
            source, load_kernel = gptq_packed(checkpoint), "torch"
    elif kernel not in ("auto", "torch"):
        dense = pick(kernel, device, None, dtype)
    loaded = load(source, device, load_kernel, dtype)
    for module in loaded.model.modules():
        if hasattr(module, "qweight"):
            module.sym = loaded.model.config.quantization_config.sym
    try:
        fast = Fast(loaded.model, dense, packed)
    except MissingRequirement:
        if kernel != "auto":
            raise
        del loaded
        return load_fast(checkpoint, device, "modules", dtype)
    for linear in fast.linears():
        if isinstance(linear, AsLoaded):
            linear.kernel = " + ".join(loaded.engaged)
    loaded.model.add_module("fast", fast)
    return replace(loaded, engaged=fast.engaged())
