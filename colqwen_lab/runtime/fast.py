"""Execution `fast`: all that happens to a batch of queries, in the order in which it happens, in one file.

1. Real tokens come first and padding after them, whichever side it came on. Attention is causal, so a real token never
   sees what follows it, and no mask is needed.
2. The length is rounded up to a bucket, so that few shapes occur.
3. Each layer is four products (QKV and gate/up are one each), an attention, and three small functions that a compiler
   fuses on a GPU; where a kernel can, products open the gate and share out the norms between them.
4. On a GPU a bucket's whole forward is captured once as a CUDA graph and replayed: one launch, nothing from Python, no
   synchronise. All graphs share one pool of memory. On a CPU the same functions run as they are.

Nothing is kept between forwards: there is no KV cache.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.model.checkpoint import Checkpoint
from colqwen_lab.model.inputs import digest
from colqwen_lab.model.loading import DTYPES, Loaded, load
from colqwen_lab.model.network import ColQwen3, ColQwen3Output, is_text_linear
from colqwen_lab.model.packing import gptq_packed
from colqwen_lab.runtime.linears import (
    EIGHT_BIT,
    PACKED_KERNELS,
    Dense,
    Kernel,
    Product,
    Unnormed,
    compiled,
    dense_product,
    features_of,
    pick,
)
from colqwen_lab.settings import cache_folder, writable_folder

GRAPHS_KEPT = 64
TIMED = 5
# A schedule whose result is further from the kernel's own choice is not taken.
SAME_RESULT = 0.01
# Up to it PyTorch's attention kernels have tiles that tokens do not fill; above it the lab's own would norm and rotate
# keys too many times.
MOST_TOKENS = 128
KINDS = ("qkv", "o", "gate_up", "down")
# Whose result is added and normed: how many layers on, and by which product, the norm is multiplied.
FOLLOWS = {"o": (0, "gate_up"), "down": (1, "qkv")}
# What multiplies the norm of a product's result is chosen before that product is; what it spares it is not weighed.
CHOSEN_IN_ORDER = ("qkv", "gate_up", "o", "down")
# From how many rows on weights may be dequantised ahead, and of which products.
FEWEST_AHEAD = 512
AHEAD = (
    (),
    ("o",),
    ("qkv",),
    ("down",),
    ("qkv", "o"),
    ("gate_up",),
    ("qkv", "o", "down"),
    ("gate_up", "down"),
    KINDS,
)


def bucket(tokens: int) -> int:
    """The length that `tokens` are computed at: rounded up by less than a sixteenth."""
    step = max(1, 2 ** (tokens.bit_length() - 5))
    return -(-tokens // step) * step


# ---------------------------------------------------------------- the small functions


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_normed(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(x + delta, its RMS norm)`."""
    total = x + delta
    return total, normed(total, weight, eps)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [batch, tokens, heads, size] by cos and sin [tokens, 1, size]."""
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
    """Queries, keys and values [batch, heads, tokens, size] of qkv [batch, tokens, all heads x size]."""
    size = q_weight.shape[0]
    q, k, v = (part.unflatten(-1, (-1, size)) for part in qkv.split(sizes, dim=-1))
    q, k = rotated(normed(q, q_weight, eps), cos, sin), rotated(normed(k, k_weight, eps), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def gated(both: Tensor) -> Tensor:
    """SiLU of the first half times the second."""
    gate, up = both.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; [batch, tokens, heads x size]."""
    if q.device.type == "cuda":
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    elif q.shape[2] <= MOST_TOKENS:
        found = attended_short(q, k, v)
    else:
        groups = q.shape[1] // k.shape[1]  # the CPU's kernel knows no groups
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return found.transpose(1, 2).flatten(2)


def attended_short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in two products, of all heads that share a key; few tokens leave a CPU's kernel idle."""
    tokens, size = q.shape[2:]
    shared = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores = (shared @ k.transpose(-1, -2)).float().unflatten(2, (-1, tokens)) * size**-0.5
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill_(later, -torch.inf).softmax(-1).to(v.dtype)
    return (weights.flatten(2, 3) @ v).unflatten(2, (-1, tokens)).flatten(1, 2)


def real_first(mask: Tensor) -> Tensor:
    """Where each position of mask [batch, tokens] goes when real tokens come first; their order stays."""
    real = mask.cumsum(1)
    return torch.where(mask.bool(), real - 1, real[:, -1:] + (1 - mask).cumsum(1) - 1)


# ---------------------------------------------------------------- the forward


class Layer(nn.Module):
    """The four products of a decoder layer, and its norms."""

    def __init__(
        self, layer: Any, dense: Callable[..., Product], packed: Callable[..., Product]
    ) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.head_norms = [attention.q_norm.weight, attention.k_norm.weight]
        self.norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        self.eps = layer.input_layernorm.variance_epsilon

        def product(parent: Any, *names: str) -> Product:
            linears = [getattr(parent, name) for name in names]
            made = (dense if all(isinstance(one, nn.Linear) for one in linears) else packed)(
                linears
            )
            if not isinstance(made, Dense):
                for name in names:  # their weights live in the product now
                    setattr(parent, name, None)
            return made

        self.sizes = [
            features_of(getattr(attention, name))[1] for name in ("q_proj", "k_proj", "v_proj")
        ]
        self.kv_heads = self.sizes[1] // attention.head_dim
        self.qkv = product(attention, "q_proj", "k_proj", "v_proj")
        self.o = product(attention, "o_proj")
        self.gate_up = product(mlp, "gate_proj", "up_proj")
        self.gate_up.gates = True
        self.down = product(mlp, "down_proj")


class Fast(nn.Module):
    """The forward of a ColQwen3 for queries. Takes its linears over; the model's own forward is not to be called again.

    `chosen` says which schedule multiplies, by product and rows, where a kernel has several; `ahead`, by rows, the
    kinds of products whose weights are dequantised ahead and multiplied by cuBLAS.
    """

    def __init__(
        self, model: ColQwen3, dense: Callable[..., Product], packed: Callable[..., Product]
    ) -> None:
        super().__init__()
        text: Any = model.vlm.model.language_model
        self.parts: Any = (
            text.embed_tokens,
            text.rotary_emb,
            text.norm,
            model.embedding_proj_layer,
        )
        self.layers: Any = nn.ModuleList(Layer(layer, dense, packed) for layer in text.layers)
        for products in map(self.of_kind, KINDS):  # they all take the same schedule
            alike = all(product.dequantises for product in products)
            for product in products:
                product.dequantises = alike
        self.graphs: OrderedDict[tuple[int, int], Graph] = OrderedDict()
        self.pool: Any = None
        self.chosen: dict[str, str] = {}
        self.candidates: dict[tuple[str, int], list[str]] = {}
        self.ahead: dict[int, tuple[str, ...]] = {}

    def engaged(self, rows: int = 0) -> dict[str, int]:
        """How many text linears each kernel multiplies; of so many rows, or as loaded."""
        found: Counter[str] = Counter()
        for kind in KINDS:
            dense = kind in self.ahead.get(rows, ())
            for product in self.of_kind(kind):
                found["cuBLAS, dequantised ahead" if dense else product.kernel_for(rows)] += (
                    product.linears
                )
        return dict(found)

    def of_kind(self, kind: str) -> list[Product]:
        """The products of a kind, layer by layer."""
        return [getattr(layer, kind) for layer in self.layers]

    def products(self) -> list[Product]:
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
        tokens = ids.shape[1]
        length = bucket(tokens)
        if ids.device.type == "cuda":
            return ColQwen3Output(embeddings=self._graph(ids.shape[0], length).replay(ids, mask))
        more = (0, length - tokens)
        return ColQwen3Output(
            embeddings=self.embed(functional.pad(ids, more), functional.pad(mask, more))[:, :tokens]
        )

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The whole of a forward, with shapes that are a bucket's. Captured as one graph on a GPU."""
        embed_tokens, rotary, norm, head = self.parts
        goes_to = real_first(mask)
        x = embed_tokens(torch.zeros_like(ids).scatter(1, goes_to, ids)).flatten(0, 1)
        positions = torch.arange(ids.shape[1], device=ids.device).view(1, 1, -1).expand(3, 1, -1)
        cos, sin = (part[0].unsqueeze(1) for part in rotary(x, positions))
        y = self.small(normed)(x, self.layers[0].norms[0], self.layers[0].eps)
        following = [*[layer.norms[0] for layer in self.layers][1:], norm.weight]
        multiply = self.multiply(self.ahead.get(ids.numel(), ()))
        for index, (layer, next_norm) in enumerate(zip(self.layers, following, strict=True)):
            qkv = multiply(index, "qkv", y)
            attention = self.attention(layer, qkv.unflatten(0, ids.shape), cos, sin).flatten(0, 1)
            x, y = multiply.add_normed(index, "o", attention, x, layer.norms[1])
            x, y = multiply.add_normed(index, "down", multiply.opened(index, y), x, next_norm)
        vectors = functional.normalize(head(y), dim=-1).unflatten(0, ids.shape)
        back = vectors.gather(1, goes_to.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))
        return back * mask.unsqueeze(-1)

    def multiply(self, kinds: Sequence[str]) -> Multiply:
        """The products of a forward, with the weights of `kinds` dequantised ahead."""
        return Multiply(self.layers, kinds, self.small)

    def all_products(self, x: dict[str, Tensor], ahead: Sequence[str]) -> None:
        """The products of `x`, [rows, in] by kind, in every layer, without what a forward fuses them with."""
        multiply = self.multiply(ahead)
        for index in range(len(self.layers)):
            for kind, one in x.items():
                multiply(index, kind, one)

    def small(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One of the small functions as the device runs it: fused on a GPU."""
        return compiled(function, self.parts[0].weight.device.type == "cuda")

    def attention(self, layer: Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """From the product QKV to what goes into O, [batch, tokens, heads x size]."""
        if qkv.device.type == "cuda" and qkv.shape[1] <= MOST_TOKENS:
            from colqwen_lab.runtime.triton_kernels import attend_short

            return attend_short(qkv, layer.kv_heads, layer.head_norms, layer.eps, (cos, sin))
        return attended(
            *self.small(heads_of)(qkv, layer.sizes, *layer.head_norms, layer.eps, cos, sin)
        )

    def _graph(self, batch: int, length: int) -> Graph:
        graph = self.graphs.pop((batch, length), None)
        if graph is None:
            self._tune(batch * length)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = Graph(self.embed, batch, length, self.parts[0].weight.device, self.pool)
        self.graphs[batch, length] = graph
        if len(self.graphs) > GRAPHS_KEPT:
            self.graphs.popitem(last=False)
        return graph

    def forget(self) -> None:
        """Let the captured graphs go, and the memory they hold."""
        self.graphs.clear()
        self.pool = None

    def compile(self, every: Sequence[int]) -> None:
        """Have the schedules to try for these numbers of rows compiled, all at once; or the one that is known."""
        kinds = {
            kind: getattr(self.layers[0], kind)
            for kind in KINDS
            if getattr(self.layers[0], kind).tunable
        }
        known = _remembered() if kinds else {}
        wanted: dict[tuple[str, int], list[str]] = {}
        for kind, product in kinds.items():
            for rows in every:
                if rows not in product.chosen and (kind, rows) not in self.candidates:
                    best = known.get(_key(product, rows))
                    schedules = (
                        [best] if best and product.compiles(best) else product.schedules(rows)
                    )
                    wanted[kind, rows] = schedules
        device = self.parts[0].weight.device

        def compiles(pair: tuple[tuple[str, int], str]) -> bool:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return kinds[pair[0][0]].compiles(pair[1])

        pairs = [(at, schedule) for at, schedules in wanted.items() for schedule in schedules]
        with ThreadPoolExecutor() as pool:
            good = list(pool.map(compiles, pairs))
        for (at, schedule), compiled_here in zip(pairs, good, strict=True):
            if compiled_here or schedule == wanted[at][0]:
                self.candidates.setdefault(at, []).append(schedule)

    def _tune(self, rows: int) -> None:
        """Time the schedules of each kind of product, over all layers so that weights come from afar; keep the best.

        The choice is kept in the cache folder for this GPU, and taken from there the next time.
        """
        self.compile([rows])
        new = {}
        for kind in [kind for kind in CHOSEN_IN_ORDER if (kind, rows) in self.candidates]:
            products = self.of_kind(kind)
            schedules = self.candidates.pop((kind, rows))
            best = schedules[0]
            if len(schedules) > 1:
                best = new[_key(products[0], rows)] = self._fastest(kind, rows, schedules)
            for product in products:
                product.chosen[rows] = best
            self.chosen[f"{kind} x {rows}"] = best
        _remember(new)
        if (
            rows >= FEWEST_AHEAD
            and rows not in self.ahead
            and all(one.dequantises for one in self.products())
        ):
            self._tune_ahead(rows)

    def _fastest(self, kind: str, rows: int, schedules: Sequence[str]) -> str:
        """The schedule by which all products of a kind are soonest done, with their share of the norms and the gate."""
        products, like, multiply = self.of_kind(kind), self.parts[0].weight, self.multiply(())
        x = normed(
            like.new_empty(rows, products[0].in_features).normal_(),
            torch.ones_like(like[0, :1]),
            0.0,
        )
        unnormed = Unnormed(
            x, x.new_full((rows, x.shape[1] // 64), 64, dtype=torch.float32), 0.0
        )  # of mean square one
        total = like.new_empty(rows if kind in FOLLOWS else 0, products[0].out_features).normal_()

        def result_of(index: int) -> Tensor:
            if kind in FOLLOWS:
                return multiply.add_normed(index, kind, x, total, self.layers[index].norms[1])[0]
            given = unnormed if products[index].norms(rows) else x
            return (
                multiply.opened(index, given) if kind == "gate_up" else multiply(index, kind, given)
            )

        def all_layers() -> None:
            for index in range(len(products)):
                result_of(index)

        times: dict[str, float] = {}
        expected = None
        try:
            for schedule in schedules:  # with none named the kernel would compile all it knows
                for product in products:
                    product.chosen[rows] = schedule
                try:
                    found = result_of(0)
                    expected = found if expected is None else expected
                    if _alike(found, expected):
                        times |= medians_ms({schedule: all_layers})
                except torch.cuda.OutOfMemoryError:
                    raise
                except (
                    RuntimeError,
                    AssertionError,
                ):  # it compiles, but this GPU does not launch it
                    if schedule == schedules[0]:
                        raise
        finally:
            for product in products:
                product.chosen.pop(rows, None)
        return min(times, key=lambda one: times[one])

    def _tune_ahead(self, rows: int) -> None:
        """Time which weights to dequantise ahead, in turn; of those within 1 % of the soonest, keep the fewest bytes.

        Under a cap of memory none, nor where there is too little to try.
        """
        key = f"ahead {_key(self.layers[0].gate_up, rows)}"
        known = "" if torch.cuda.get_per_process_memory_fraction() < 1 else _remembered().get(key)
        if known is None:
            try:
                with torch.cuda.stream(capture_stream()):
                    known = self._best_ahead(rows)
                _remember({key: known})
            except (torch.cuda.OutOfMemoryError, MissingRequirement):
                known = ""
        self.ahead[rows] = tuple(known.split("+")) if known else ()
        self.chosen[f"dequantised ahead x {rows}"] = known or "none"

    def _best_ahead(self, rows: int) -> str:
        """The kinds, joined by +. Raises MissingRequirement if what is dequantised does not multiply as the packed weights do."""
        like, first = self.parts[0].weight, self.layers[0]
        x = {
            kind: like.new_empty(rows, getattr(first, kind).in_features).normal_() for kind in KINDS
        }
        if not all(_dequantised_alike(getattr(first, kind), x[kind]) for kind in KINDS):
            raise MissingRequirement("weights dequantised do not multiply as packed ones do")

        def size(kinds: Sequence[str]) -> int:
            return sum(
                getattr(first, kind).in_features * getattr(first, kind).out_features
                for kind in kinds
            )

        medians = medians_ms(
            {kinds: partial(self.all_products, x, kinds) for kinds in sorted(AHEAD, key=size)}
        )
        return "+".join(
            next(kinds for kinds, ms in medians.items() if ms <= 1.01 * min(medians.values()))
        )


def _dequantised_alike(product: Product, x: Tensor) -> bool:
    weight = x.new_empty(product.out_features, product.in_features)
    product.dequantise(weight)
    return _alike(functional.linear(x, weight), product(x))


def _alike(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() < SAME_RESULT * expected.norm())


def _key(product: Product, rows: int) -> str:
    """What a schedule is remembered by: all that decides which there are to choose among."""
    made = f"{product.made_of()} {product.gates} {_sources()}"
    shape = f"{product.in_features} to {product.out_features} x {rows}"
    return f"{product.kernel} {version('humming-kernels')}: {shape} #{hashlib.sha256(made.encode()).hexdigest()[:12]}"


@cache
def _sources() -> str:
    """With other sources of kernels, or of what is chosen among, schedules are timed anew."""
    return digest(
        Path(__file__).parent / name for name in ("fast.py", "linears.py", "w4.py", "w4.cu")
    )


def _cache() -> Path:
    name = torch.cuda.get_device_name().replace(" ", "_").replace("/", "_")
    return writable_folder(cache_folder()) / f"schedules-{name}.json"


def _remembered() -> dict[str, str]:
    path = _cache()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _remember(found: dict[str, str]) -> None:
    """Add to what is known of this GPU; two processes may do so at once."""
    path = _cache()
    if found:
        with FileLock(f"{path}.lock"):
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(_remembered() | found, indent=0), encoding="utf-8")
            temporary.replace(path)


class Multiply:
    """The products of all layers, one at a time: of `kinds` by cuBLAS, over 16-bit weights made ahead.

    Each kind has memory for one weight. As soon as a layer's is multiplied by, the next layer's is written there, on a
    stream with less priority than the one that multiplies: it fills what a product leaves idle as it ends.
    """

    def __init__(
        self, layers: Sequence[Any], kinds: Sequence[str], small: Callable[..., Any]
    ) -> None:
        self.layers, self.gate, self.then_norm = layers, small(gated), small(add_normed)
        like, products = layers[0].norms[0], {kind: getattr(layers[0], kind) for kind in kinds}
        self.weights = {
            kind: like.new_empty(one.out_features, one.in_features)
            for kind, one in products.items()
        }
        self.ready = {kind: self._make(0, kind) for kind in kinds}

    def __call__(self, index: int, kind: str, x: Tensor | Unnormed) -> Tensor:
        """The product `kind` of layer `index`, of x [rows, in]."""
        if kind not in self.weights:
            return getattr(self.layers[index], kind)(x)
        if self.ready[kind]:
            torch.cuda.current_stream().wait_event(self.ready[kind])
        found = functional.linear(x, self.weights[kind])  # type: ignore[arg-type]
        self.ready[kind] = self._make(index + 1, kind) if index + 1 < len(self.layers) else None
        return found

    def opened(self, index: int, x: Tensor | Unnormed) -> Tensor:
        """What goes into `down`: `gate_up` may have opened the gate already, or `down` opens it."""
        both, down = self(index, "gate_up", x), self.layers[index].down
        return both if down.opens or both.shape[-1] == down.in_features else self.gate(both)

    def add_normed(
        self, index: int, kind: str, x: Tensor, total: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor | Unnormed]:
        """`(total + product, its RMS norm)`; two products that can do so share the norm out between them."""
        after, follows = FOLLOWS[kind]
        layer, rows = self.layers[index], x.shape[0]
        product, next_layers = getattr(layer, kind), self.layers[index + after :]
        both = not self.weights and product.norms(rows) and next_layers
        if both and getattr(next_layers[0], follows).norms(rows):
            return product.add_normed(x, total, weight, layer.eps)
        return self.then_norm(total, self(index, kind, x), weight, layer.eps)

    def _make(self, index: int, kind: str) -> Any:
        stream = _side_stream(torch.cuda.current_device(), priority=0)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            getattr(self.layers[index], kind).dequantise(self.weights[kind])
        return stream.record_event()


@cache
def _side_stream(device: int, priority: int = -1) -> torch.cuda.Stream:
    """One stream for all that is captured: each new one would get a cuBLAS workspace of its own, and keep it."""
    return torch.cuda.Stream(device, priority=priority)


def capture_stream() -> torch.cuda.Stream:
    """The stream of all that is captured; it begins after the current one, which does not wait for it."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def _captured(work: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`(graph, result)`: run once outside, so that all is compiled and every library awake, then captured."""
    stream = capture_stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = work()
    return graph, result


def medians_ms(works: dict[Any, Callable[[], Any]], rounds: int = TIMED) -> dict[Any, float]:
    """The median milliseconds of each, captured and then replayed in turn."""
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: _captured(work, pool)[0] for name, work in works.items()}
    times = [{name: _replayed_ms(graph) for name, graph in graphs.items()} for _ in range(rounds)]
    return {name: sorted(each[name] for each in times)[rounds // 2] for name in graphs}


def _replayed_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Graph:
    """A captured forward of one bucket: its inputs stand where the graph reads them, its result where it writes."""

    def __init__(
        self, embed: Callable[..., Tensor], batch: int, length: int, device: torch.device, pool: Any
    ) -> None:
        self.ids = torch.zeros((batch, length), dtype=torch.int64, device=device)
        self.mask = torch.ones_like(self.ids)
        self.graph, self.result = _captured(lambda: embed(self.ids, self.mask), pool)

    def replay(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens = ids.shape[1]
        self.ids[:, :tokens].copy_(ids)
        self.mask[:, tokens:].zero_()
        self.mask[:, :tokens].copy_(mask)
        self.graph.replay()
        return self.result[:, :tokens].clone()


# ---------------------------------------------------------------- loading for it


def load_fast(
    source: Checkpoint, device: torch.device, kernel: str = "auto", dtype: str = "bfloat16"
) -> Loaded:
    """The model of `source` made ready for `fast`: linears fused, packed weights in the kernel's own layout.

    `kernel` is auto, one of `kernels.PACKED_KERNELS` or `kernels.EIGHT_BIT`, or a backend of AutoRound, whose modules
    are then multiplied by as they are.

    Raises:
        BadInput: an unknown kernel.
        MissingRequirement: a kernel that cannot serve here.
    """
    asked = source.quantization
    chosen: Kernel | None = None
    if asked is None and kernel not in ("auto", "torch"):
        chosen = pick(kernel, device, None)
    elif asked is not None and (kernel == "auto" or kernel in PACKED_KERNELS | EIGHT_BIT):
        chosen = pick(kernel, device, (asked["bits"], asked["group_size"]))
    if asked is not None and chosen and chosen.bfloat16 and dtype != "bfloat16":
        if kernel != "auto":
            raise MissingRequirement(
                f"kernel {kernel} multiplies in bfloat16, not {dtype}; valid here: auto, modules"
            )
        chosen = PACKED_KERNELS["modules"]
    raw = chosen is not None and chosen is not PACKED_KERNELS["modules"]
    if asked is None:
        loaded = load(source, device, "auto", dtype)
    elif raw:
        loaded = load(gptq_packed(source), device, "torch", dtype)
    else:
        loaded = load(source, device, "auto" if chosen else kernel, dtype)
    if asked is not None:
        symmetric = loaded.model.config.quantization_config.sym
        for name, module in loaded.model.named_modules():
            if is_text_linear(name):
                module.sym = symmetric
    packed = chosen or PACKED_KERNELS["modules"]
    dense = dense_product(device, DTYPES[dtype]) if kernel == "auto" else Dense
    fast = Fast(loaded.model, packed.build if chosen and asked is None else dense, packed.build)
    for product in fast.products():
        if product.kernel == "modules":
            product.kernel = " + ".join(loaded.engaged)
    loaded.model.add_module("fast", fast)
    return replace(loaded, engaged=fast.engaged())
