"""Execution `fast`: the forward for queries, in the order in which it runs.

1. Padding moves to the right, whichever side it was on. Attention is causal, so no real token sees
   padding, and no mask is needed.
2. The length is rounded up to a bucket, so that few shapes occur.
3. A layer is four GEMMs (QKV and gate/up are one each), attention, and three small functions that
   torch.compile fuses on a GPU. Some kernels take over SiLU-and-mul or split RMSNorm.
4. On a GPU the forward of a bucket is captured once as a CUDA graph and replayed: one launch, no
   Python, no synchronisation. All graphs share one memory pool. A CPU runs the same functions.

There is no KV cache.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.model.checkpoint import Checkpoint
from colqwen_lab.model.loading import DTYPES, Loaded, load
from colqwen_lab.model.network import ColQwen3, ColQwen3Output, is_text_linear
from colqwen_lab.model.packing import gptq_packed
from colqwen_lab.runtime import tune
from colqwen_lab.runtime.gemms import ALL_PATHS, KINDS, Gemms, Paths, normed
from colqwen_lab.runtime.graphs import Graph, capture_stream
from colqwen_lab.runtime.kernels import KERNELS, dense_linear, pick
from colqwen_lab.runtime.linears import AsLoaded, Dense, Fp8, FusedLinear, compiled, features_of
from colqwen_lab.runtime.tune import MIN_PREFETCH_M

__all__ = ["KINDS", "MIN_PREFETCH_M", "Fast", "Gemms", "bucket", "capture_stream", "load_fast"]

GRAPHS_KEPT = 64
# Up to this length PyTorch's attention kernels leave most of a tile empty. Above it the lab's
# kernel would norm and rotate keys too often.
SHORT_TOKENS = 128
Build = Callable[[Sequence[Any]], FusedLinear]


def bucket(tokens: int) -> int:
    """The length at which `tokens` are computed: rounded up by less than a sixteenth."""
    step = max(1, 2 ** (tokens.bit_length() - 5))
    return -(-tokens // step) * step


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


class Layer(nn.Module):
    """The four fused linears of a decoder layer, and its norms."""

    def __init__(self, layer: Any, dense: Build, packed: Build) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.head_norms = [attention.q_norm.weight, attention.k_norm.weight]
        self.norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        self.eps = layer.input_layernorm.variance_epsilon
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.sizes = [features_of(linear)[1] for linear in projections]
        self.kv_heads = self.sizes[1] // attention.head_dim

        def fused(parent: Any, *names: str) -> FusedLinear:
            linears = [getattr(parent, name) for name in names]
            build = dense if all(isinstance(one, nn.Linear) for one in linears) else packed
            result = build(linears)
            if not isinstance(result, Dense):
                for name in names:  # the fused linear holds their weights now
                    setattr(parent, name, None)
            return result

        self.qkv = fused(attention, "q_proj", "k_proj", "v_proj")
        self.o = fused(attention, "o_proj")
        self.gate_up = fused(mlp, "gate_proj", "up_proj")
        self.gate_up.returns_gate_up = True
        self.down = fused(mlp, "down_proj")


class Fast(nn.Module):
    """The forward of a ColQwen3 for queries. It takes over the model's linears, so the model's own
    forward must not be called again.

    `configs` is the kernel config by kind and M; `prefetched` is the kinds of GEMM that run as
    dequantise-then-GEMM, by M.
    """

    def __init__(
        self, model: ColQwen3, dense: Build, packed: Build, paths: Paths = ALL_PATHS
    ) -> None:
        super().__init__()
        text: Any = model.vlm.model.language_model
        head = model.embedding_proj_layer
        self.parts: Any = (text.embed_tokens, text.rotary_emb, text.norm, head)
        self.layers: Any = nn.ModuleList(Layer(layer, dense, packed) for layer in text.layers)
        for linears in map(self.of_kind, KINDS):  # all linears of a kind share one config
            alike = all(linear.dequantises for linear in linears)
            for linear in linears:
                linear.dequantises = alike
        self.paths = paths
        self.graphs: OrderedDict[tuple[int, int], Graph] = OrderedDict()
        self.pool: Any = None
        self.candidates: dict[tuple[str, int], list[str]] = {}
        self.configs: dict[tuple[str, int], str] = {}
        self.prefetched: dict[int, tuple[str, ...]] = {}

    @property
    def chosen(self) -> dict[str, str]:
        """What timing chose, by "GEMM x M" and "dequantise-then-GEMM x M"."""
        return {f"{kind} x {m}": config for (kind, m), config in self.configs.items()} | {
            f"dequantise-then-GEMM x {m}": "+".join(kinds) or "none"
            for m, kinds in self.prefetched.items()
        }

    def engaged(self, m: int = 0) -> dict[str, int]:
        """How many text linears each kernel multiplies, at M or as loaded."""
        counts: Counter[str] = Counter()
        for kind in KINDS:
            for linear in self.of_kind(kind):
                name = linear.kernel
                if kind in self.prefetched.get(m, ()):
                    name = "cuBLAS (dequantise-then-GEMM)"
                elif linear.small_m(self.configs.get((kind, m))):
                    name = "small-M GEMM (W4A16)"
                counts[name] += linear.linears
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
        """Unit vectors [batch, tokens, 320] of `input_ids` and `attention_mask`, zero at padding.

        Raises:
            MissingRequirement: pages, or a KV cache.
        """
        if use_cache or "pixel_values" in inputs:
            raise MissingRequirement(
                "execution fast embeds queries without a KV cache; valid otherwise: eager"
            )
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        batch, tokens = ids.shape
        length = bucket(tokens)
        if ids.device.type == "cuda":
            return ColQwen3Output(embeddings=self._graph(batch, length).replay(ids, mask))
        ids, mask = (functional.pad(each, (0, length - tokens)) for each in (ids, mask))
        return ColQwen3Output(embeddings=self.embed(ids, mask)[:, :tokens])

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The forward at a bucket's length, [batch, length, 320]; a GPU captures it as a graph."""
        embed_tokens, rotary, norm, head = self.parts
        position = real_first(mask)
        x = embed_tokens(torch.zeros_like(ids).scatter(1, position, ids)).flatten(0, 1)
        places = torch.arange(ids.shape[1], device=ids.device).view(1, 1, -1).expand(3, 1, -1)
        cos, sin = (part[0].unsqueeze(1) for part in rotary(x, places))
        y = self.small(normed)(x, self.layers[0].norms[0], self.layers[0].eps)
        next_norms = [*[layer.norms[0] for layer in self.layers][1:], norm.weight]
        m = ids.numel()
        gemms = self.gemms(self.prefetched.get(m, ()), self.configs_at(m))
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            qkv = gemms(index, "qkv", y)
            attention = self.attention(layer, qkv.unflatten(0, ids.shape), cos, sin).flatten(0, 1)
            x, y = gemms.add_normed(index, "o", attention, x, layer.norms[1])
            x, y = gemms.add_normed(index, "down", gemms.mlp_input(index, y), x, next_norm)
        vectors = functional.normalize(head(y), dim=-1).unflatten(0, ids.shape)
        vectors = vectors.gather(1, position.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))
        return vectors * mask.unsqueeze(-1)

    def gemms(self, kinds: Sequence[str] = (), configs: dict[str, str] | None = None) -> Gemms:
        """The GEMMs of a forward, with `kinds` as dequantise-then-GEMM."""
        return Gemms(self.layers, kinds, self.small, configs, self.paths.split_norms)

    def small(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One of the small functions as this device runs it: fused on a GPU."""
        return compiled(function, self.parts[0].weight.device.type == "cuda")

    def attention(self, layer: Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """From the QKV GEMM to the input of O, [batch, tokens, heads x size]."""
        short = self.paths.short_attention and qkv.shape[1] <= SHORT_TOKENS
        if qkv.device.type == "cuda" and short:
            from colqwen_lab.runtime.triton_kernels import attend_short

            return attend_short(qkv, layer.kv_heads, layer.head_norms, layer.eps, (cos, sin))
        heads = self.small(heads_of)(qkv, layer.sizes, *layer.head_norms, layer.eps, cos, sin)
        return attended(*heads)

    def compile(self, sizes: Iterable[int]) -> None:
        """Compile the kernel configs to time at each M of `sizes`, all at once."""
        known = {m for _, m in (*self.candidates, *self.configs)}
        new = sorted({*sizes} - known)
        self.candidates |= tune.candidates(self.layers[0], new, self.paths)

    def tune(self, m: int) -> None:
        """Choose the kernel configs, and the GEMMs to run as dequantise-then-GEMM, at M."""
        self.compile([m])
        wanted = {kind: self.candidates.pop((kind, m), []) for kind in KINDS}
        wanted = {kind: configs for kind, configs in wanted.items() if configs}
        chosen = tune.kernel_configs(self.gemms, self.layers, m, wanted, self.paths)
        self.configs |= {(kind, m): config for kind, config in chosen.items()}
        may = self.paths.dequantise_then_gemm and m >= MIN_PREFETCH_M and m not in self.prefetched
        if may and all(linear.dequantises for linear in self.linears()):
            self.prefetched[m] = tune.prefetched_kinds(
                self.gemms, self.layers, m, self.configs_at(m), self.paths
            )

    def configs_at(self, m: int) -> dict[str, str]:
        return {kind: config for (kind, size), config in self.configs.items() if size == m}

    def _graph(self, batch: int, length: int) -> Graph:
        graph = self.graphs.pop((batch, length), None)
        if graph is None:
            self.tune(batch * length)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = Graph(self.embed, batch, length, self.parts[0].weight.device, self.pool)
        self.graphs[batch, length] = graph
        if len(self.graphs) > GRAPHS_KEPT:
            self.graphs.popitem(last=False)
        return graph

    def forget(self) -> None:
        """Free the captured graphs and their memory."""
        self.graphs.clear()
        self.pool = None


def load_fast(
    checkpoint: Checkpoint,
    device: torch.device,
    kernel: str = "auto",
    dtype: str = "bfloat16",
    paths: Paths = ALL_PATHS,
) -> Loaded:
    """The model of `checkpoint` ready for `fast`: fused linears, in the kernel's weight layout.

    `kernel` is auto, one of `kernels.KERNELS`, or a kernel of AutoRound, whose modules run as they
    are.

    Raises:
        BadInput: an unknown kernel.
        MissingRequirement: a kernel that cannot run here.
    """
    quantization = checkpoint.quantization
    scheme = (quantization["bits"], quantization["group_size"]) if quantization else None
    if kernel in ("auto", "torch") if scheme is None else kernel not in ("auto", *KERNELS):
        picked = None  # torch.nn.Linear, or modules of AutoRound
    else:
        picked = pick(kernel, device, scheme, dtype)
    if scheme and picked and picked.build is not AsLoaded:
        loaded = load(gptq_packed(checkpoint), device, "torch", dtype)
    else:
        loaded = load(checkpoint, device, "auto" if picked else kernel, dtype)
    if scheme:
        symmetric = loaded.model.config.quantization_config.sym
        for name, module in loaded.model.named_modules():
            if is_text_linear(name):
                module.sym = symmetric
    dense: Build = dense_linear(device, DTYPES[dtype]) if kernel == "auto" else Dense
    packed = picked.build if picked else AsLoaded
    fast = Fast(loaded.model, packed if picked and not scheme else dense, packed, paths)
    for linear in fast.linears():
        if isinstance(linear, AsLoaded):
            linear.kernel = " + ".join(loaded.engaged)
        if isinstance(linear, Fp8):
            linear.accepts_gate_up = paths.fused_fp8
    loaded.model.add_module("fast", fast)
    return replace(loaded, engaged=fast.engaged())
