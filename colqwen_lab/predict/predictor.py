"""Peak memory without a GPU: the same network and execution under fake tensors, then the allocator block by block.

Nothing here is fitted to a measurement. What a run cannot show on a CPU is derived: the allocator from PyTorch's source
(`allocator.py`), the cuBLAS workspace from PyTorch's default, the buffers of a kernel from that kernel's source.
"""

from __future__ import annotations

import math
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter, tree_map

from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.model import loading
from colqwen_lab.model.checkpoint import RandomCheckpoint, default_checkpoint
from colqwen_lab.model.config import Variant, resolve_variant, scheme_parts
from colqwen_lab.model.network import ColQwen3, ColQwen3Output, is_text_linear
from colqwen_lab.predict.allocator import Allocator, Block
from colqwen_lab.records import Backend, Cell, Environment, Memory, Work, Workload
from colqwen_lab.runtime.batches import query_batches
from colqwen_lab.runtime.components import resident
from colqwen_lab.runtime.eager import EXECUTIONS, PROTOCOLS, STEPS, Steps
from colqwen_lab.runtime.fast import (
    FEWEST_AHEAD,
    KINDS,
    MOST_TOKENS,
    Fast,
    Multiply,
    attended,
    bucket,
    heads_of,
)
from colqwen_lab.runtime.linears import (
    FP8,
    AsLoaded,
    Dense,
    Fp8,
    Int4Cpu,
    Product,
    features_of,
    gptq,
)
from colqwen_lab.runtime.tracking import ACTIVATIONS, MemoryTracker, ledger_of

CPU = torch.device("cpu")
KIB = 1024
LARGEST_BATCH = 65536
# Of one apart from each other, and more than one, where some shapes fall together.
ANCHORS = (2, 3)
# To how many bytes the least memory of a run is searched.
CAP_STEP = 4 * KIB * KIB
GRAPH_POOL = -1
ROUNDING, WORKSPACE, KV_CACHE, OUTPUT, BUFFERS = (
    "allocator rounding",
    "cuBLAS workspace",
    "KV cache",
    "outputs",
    "backend buffers",
)


def workspace_bytes(compute_capability: tuple[int, int]) -> int:
    """PyTorch's default cuBLAS workspace: 32 MiB on sm90 and, in newer releases, above; else 8.125 MiB.

    Source: CublasHandlePool.cpp and pytorch#175344.
    """
    return 32 * KIB * KIB if compute_capability[0] >= 9 else 2 * 4096 * KIB + 8 * 16 * KIB


# ---------------------------------------------------------------- kernels for packed weights


def _dequantise_then_multiply(layer: Any, x: Tensor) -> Tensor:
    """AutoRound's Triton fallback: a whole weight [in, out] in the input's type. Source: triton_utils_zp/dequant.py."""
    weight = x.new_empty(layer.infeatures, layer.outfeatures)
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], layer.outfeatures)


def _product_of(x: Tensor, features: tuple[int, int]) -> Tensor:
    """x times a weight [in, out] that takes no memory."""
    weight = x.new_empty(1).expand(features)
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], features[1])


def _fused(layer: Any, x: Tensor) -> Tensor:
    """A fused kernel dequantises in registers: no buffer but its result."""
    return _product_of(x, features_of(layer))


class _FusedProduct(Product):
    """Linears fused, for a kernel such as humming: codes and scales of symmetric weights, no buffer but its result.

    Codes of 8-bit activations are not counted: a quarter or less of what stands in their place when the MLP peaks.
    """

    kernel = "fused"

    def __init__(self, fused: Sequence[Any]) -> None:
        super().__init__(fused)
        qweight, _, scales = gptq(fused)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return _product_of(x, (self.in_features, self.out_features))


class _Fp8Product(Fp8):
    """Its weights as they are made; of a product the FP8 codes of the rows, their scales, and the result."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        codes, scale = (
            x.new_empty((rows, self.in_features), dtype=FP8),
            x.new_empty((rows, 1), dtype=torch.float32),
        )
        found = _product_of(x[:, : self.in_features], (self.in_features, self.out_features))
        del codes, scale
        return found


# What a kernel needs beside its packed weights; `torch` is AutoRound's own module, run as it is.
KERNELS: dict[str, Callable[[Any, Tensor], Tensor] | None] = {
    "tritonv2": _dequantise_then_multiply,
    "torch": None,
    "fused": _fused,
}
# The same for execution `fast`: the class of its products. `fp8` makes FP8 weights of 16-bit ones.
FAST_KERNELS: dict[str, Callable[[Sequence[Any]], Product]] = {
    "tritonv2": AsLoaded,
    "torch": AsLoaded,
    "fused": _FusedProduct,
    "int4": Int4Cpu,
    "fp8": _Fp8Product,
}


class _Multiply(Multiply):
    """Of weights dequantised ahead memory sees where they go."""

    def _make(self, index: int, kind: str) -> None:
        """Nothing is written: fake tensors hold no values."""


class _FastModel(Fast):
    """Execution `fast` on fake tensors, which lie on no GPU: what it does there is told here.

    The compiler and the lab's own attention leave their results and nothing else; a forward is captured once, its
    memory comes from the graph's own pool, and a replay makes a copy of the result. The run before the capture takes as
    much and gives it back, so it is left out.
    """

    def __init__(
        self, model: ColQwen3, kernel: str, quantized: bool, tracker: MemoryTracker
    ) -> None:
        products = FAST_KERNELS[kernel]
        super().__init__(model, products if kernel == "fp8" and not quantized else Dense, products)
        self.on_gpu, self.tracker = True, tracker
        self.captured: tuple[int, int] = (0, 0)
        self.flops = 0
        self.graph: tuple[Tensor, ...] = ()

    def forward(
        self, model: ColQwen3, inputs: dict[str, Tensor], use_cache: bool = False
    ) -> ColQwen3Output:
        if not self.on_gpu:
            return super().forward(model, inputs, use_cache)
        batch, tokens = inputs["input_ids"].shape
        tracker = self.tracker
        if self.graph:
            tracker.flops += self.flops
        else:
            ids = torch.zeros((batch, bucket(tokens)), dtype=torch.int64)
            mask = torch.ones_like(ids)
            flops, first = tracker.flops, len(tracker.labels)
            self.graph = ids, mask, self.embed(ids, mask)
            self.captured, self.flops = (first, len(tracker.labels)), tracker.flops - flops
        return ColQwen3Output(embeddings=self.graph[-1][:, :tokens].clone())

    def multiply(self, kinds: Sequence[str]) -> Multiply:
        made = _Multiply(self.layers, kinds, self.small)
        self.tracker.label([*made.weights.values()], BUFFERS)
        return made

    def small(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._results_of(function) if self.on_gpu else function

    def attention(self, layer: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.on_gpu:
            return super().attention(layer, qkv, cos, sin)
        if qkv.shape[1] <= MOST_TOKENS:
            return self._results_of(super().attention)(layer, qkv, cos, sin)
        heads = self.small(heads_of)(qkv, layer.sizes, *layer.head_norms, layer.eps, cos, sin)
        return self._results_of(attended)(*heads)

    def _results_of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, of which memory sees the results alone; one that is a view of an argument stays so."""

        def call(*args: Any) -> Any:
            with self.tracker.unseen():
                found = function(*args)
            given = {
                one.untyped_storage()._cdata for one in tree_iter(args) if isinstance(one, Tensor)
            }
            return tree_map(
                lambda one: one if one.untyped_storage()._cdata in given else torch.empty_like(one),
                found,
            )

        return call


@dataclass(frozen=True)
class Target:
    """The device that is predicted for. `compute_capability` None is a CPU: no allocator, no workspace."""

    name: str
    compute_capability: tuple[int, int] | None

    @property
    def hopper(self) -> bool:
        return self.compute_capability is not None and self.compute_capability[0] == 9


A100 = Target("NVIDIA A100-SXM4-40GB", (8, 0))
HOST = Target("CPU", None)


@dataclass(frozen=True)
class Trace:
    """Births (number, bytes) and ends (number, 0) of two steps, what each number is, and the operations.

    The first `loaded` are the births of the weights as they load; up to `before` execution `fast` makes its own of
    them, and the inputs come. Births from `captured[0]` to `captured[1]` are of a graph's pool.
    """

    batch_size: int
    log: list[tuple[int, int]]
    labels: list[str]
    loaded: int
    before: int
    flops: int
    captured: tuple[int, int] = (0, 0)

    def shape(self) -> list[Any]:
        return [[(number, size > 0) for number, size in self.log], self.labels]

    def at(self, batch_size: int, other: Trace) -> Trace:
        """The trace of another batch, on the straight line through this one and `other`."""
        share = Fraction(batch_size - self.batch_size, other.batch_size - self.batch_size)
        log = [
            (n, int(size + share * (more - size)))
            for (n, size), (_, more) in zip(self.log, other.log, strict=True)
        ]
        flops = int(self.flops + share * (other.flops - self.flops))
        return replace(self, batch_size=batch_size, log=log, flops=flops)

    def settled(self) -> list[tuple[int, int]]:
        """The log without what loading made and let go again."""
        ended = {number for number, size in self.log[: self.before] if not size}
        return [one for one in self.log[: self.before] if one[0] not in ended] + self.log[
            self.before :
        ]


def peak_of(log: Sequence[tuple[int, int]]) -> int:
    """The most bytes that live at once."""
    sizes: dict[int, int] = {}
    total = peak = 0
    for number, size in log:
        total += size - sizes.pop(number, 0)
        sizes[number] = size
        peak = max(peak, total)
    return peak


class Asked(NamedTuple):
    """What decides a run, beside its batch size: the length, whether batches carry a mask, and what a run chose."""

    tokens: int
    masked: bool
    protocol: str
    on_gpu: bool = True
    ahead: tuple[str, ...] = ()


class Predictor:
    """Predicts cells of one variant in one execution: the network is built once, on fake tensors.

    Raises:
        BadInput: an unknown kernel model, or one that does not serve this variant and execution.
    """

    # Parts of the network that a step multiplies by.
    multiplied: tuple[str, ...] = ("text linears", "text norms", "head")

    def __init__(
        self,
        variant: Variant,
        size: str,
        dtype: str = "bfloat16",
        kernel: str = "tritonv2",
        execution: str = "eager",
    ) -> None:
        one_of("kernel model", kernel, FAST_KERNELS)
        one_of("dtype", dtype, loading.DTYPES)
        one_of("execution", execution, EXECUTIONS)
        if execution == "eager" and kernel not in KERNELS:
            raise BadInput(
                f"kernel {kernel} multiplies in execution fast only; valid in eager: {', '.join(KERNELS)}"
            )
        if variant.scheme and (
            kernel == "fp8" or (kernel == "int4" and scheme_parts(variant.scheme)[0] != 4)
        ):
            raise BadInput(
                f"kernel {kernel} does not multiply {variant.name}; valid: {', '.join(KERNELS)}"
            )
        if variant.folder or "any" in variant.hub:
            raise BadInput(
                f"{variant.name} is not predicted by its name; valid: base, awq, or a scheme such as W8A16"
            )
        if variant.scheme and kernel == "tritonv2" and scheme_parts(variant.scheme)[0] == 3:
            raise BadInput(
                f"kernel tritonv2 multiplies 2, 4 and 8 bits; valid for {variant.name}: torch"
            )
        self.variant, self.size, self.kernel, self.execution = variant, size, kernel, execution
        source = default_checkpoint(variant, size, "random", CPU)
        assert isinstance(source, RandomCheckpoint)
        self.config = source.config
        quantized = source.quantization is not None
        self.model, _ = loading.skeleton(
            source.config,
            source.quantization,
            CPU,
            "torch" if quantized else "auto",
            loading.DTYPES[dtype],
        )
        self.tokenizer = source.tokenizer
        self.dtype = dtype
        self.mode = self.fake_mode()
        self._traces: dict[Asked, list[Trace]] = {}
        self._fake()
        # What multiplies packed weights; execution `fast` lets go of the linears that it took over.
        self.packed = [m for n, m in self.model.named_modules() if is_text_linear(n) and quantized]
        if execution == "eager" or FAST_KERNELS[kernel] is AsLoaded:
            self._model_kernels()
        self.tracker = MemoryTracker(resident(self.model))
        self.loaded = len(self.tracker.log)
        if execution == "fast":
            self.packed = []
            with self.mode, self.tracker:
                fast = _FastModel(self.model, kernel, quantized, self.tracker)
            self.model.add_module("fast", fast)
            self.packed = [product for product in fast.products() if not isinstance(product, Dense)]
        # From the last to the first: a storage is known by the first name it has in a checkpoint.
        parts = [*resident(self.model)][::-1]
        for label, tensor in parts:
            self.tracker.label([tensor], label)
        self.made = len(self.tracker.log), len(self.tracker.labels)
        self.parts = {
            t.untyped_storage()._cdata: (label, t.untyped_storage().nbytes()) for label, t in parts
        }

    def fake_mode(self) -> FakeTensorMode:
        return FakeTensorMode()

    def _fake(self) -> None:
        """Put a fake tensor in the place of every meta and real one."""
        with self.mode:
            for module in self.model.modules():
                for name, value in module._parameters.items():
                    if value is not None:
                        like = torch.empty(value.shape, dtype=value.dtype)
                        module._parameters[name] = nn.Parameter(like, requires_grad=False)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
                if isinstance(
                    shifts := getattr(module, "wf", None), Tensor
                ):  # AutoRound's table, no buffer
                    setattr(module, "wf", torch.empty(shifts.shape, dtype=shifts.dtype))  # noqa: B010

    def _model_kernels(self) -> None:
        forward = KERNELS[self.kernel]
        for layer in self.packed:
            if forward is not None:
                layer.forward = types.MethodType(forward, layer)
            if self.kernel == "tritonv2":
                # The module makes its group index at the first forward and keeps it.
                with self.mode:
                    layer.register_buffer("g_idx", torch.empty(layer.infeatures, dtype=torch.int32))

    def cell(
        self,
        batch_size: int,
        protocol: str = "lean",
        target: Target = A100,
        tokens: int | None = None,
        padded: bool = False,
        ahead: Sequence[str] | None = None,
    ) -> Cell:
        """The predicted cell of `batch_size` queries: the report's, or of `tokens` tokens, some of them `padded`.

        `ahead` are the products whose weights `fast` dequantises ahead, which a run chooses by timing; None, all that
        it may.
        """
        workload, masked = self._workload(batch_size, tokens, padded)
        assert workload.tokens is not None
        if self.execution == "fast" and PROTOCOLS[protocol].use_cache:
            raise BadInput(
                f"protocol {protocol!r} keeps a KV cache, which execution fast has not; valid: lean"
            )
        on_gpu = target.compute_capability is not None
        if ahead is None:
            packed = self.variant.scheme and scheme_parts(self.variant.scheme) == (4, 128)
            may = packed and self.kernel == "fused" and self.execution == "fast" and target.hopper
            ahead = KINDS if may and batch_size * bucket(workload.tokens) >= FEWEST_AHEAD else ()
        trace = self._trace(
            batch_size, Asked(workload.tokens, masked, protocol, on_gpu, tuple(ahead))
        )
        memory = self._memory(trace, target)
        work = Work(flops=trace.flops // STEPS, min_bytes=self._least_bytes(workload))
        return Cell(
            origin="predicted",
            variant=self.variant.name,
            size=self.size,
            weights="none: fake tensors",
            workload=workload,
            execution=self.execution,
            protocol=protocol,
            backend=Backend(
                requested=self.kernel if self.variant.scheme else "auto", dtype=self.dtype
            ),
            status="ok",
            memory=memory,
            work=work,
            environment=Environment(
                gpu=target.name if target.compute_capability else None,
                cpu=None if target.compute_capability else "any",
                torch=torch.__version__,
            ),
        )

    def _workload(self, batch_size: int, tokens: int | None, padded: bool) -> tuple[Workload, bool]:
        """`(workload, whether its batches carry a mask)`."""
        if batch_size > LARGEST_BATCH:
            raise BadInput(f"batch {batch_size}; valid for a prediction: up to {LARGEST_BATCH}")
        if tokens is None:
            made = query_batches(self.config, self.tokenizer, batch_size, "report", 64, CPU)
            return made.workload, True
        longest = self.config.text_config.max_position_embeddings
        if not 1 <= tokens <= longest:
            raise BadInput(f"tokens {tokens}; valid at size {self.size}: 1 to {longest}")
        # A run sees that nothing is padded, and makes no mask of it; under fake tensors nobody can look.
        return Workload(
            kind="queries", batch_size=batch_size, tokens=tokens, padded_share=0.0
        ), padded

    def _trace(self, batch_size: int, asked: Asked) -> Trace:
        """What two steps of this batch do to memory: run at two small batches, from which every other follows.

        At one length every tensor is as large as a + b x batch. A batch whose run has another shape is run itself.
        """
        if asked not in self._traces:
            self._traces[asked] = [self._run(size, asked) for size in ANCHORS]
        first, second = self._traces[asked]
        if batch_size in ANCHORS or first.shape() != second.shape():
            return self._run(batch_size, asked)
        return first.at(batch_size, second)

    def _inputs(self, batch_size: int, tokens: int, masked: bool) -> dict[str, Tensor]:
        with self.mode:
            ids = torch.empty((batch_size, tokens), dtype=torch.int64)
            return {"input_ids": ids} | (
                {"attention_mask": torch.empty_like(ids)} if masked else {}
            )

    def _run(self, batch_size: int, asked: Asked) -> Trace:
        tracker, fast = self.tracker, getattr(self.model, "fast", None)
        if fast:
            fast.on_gpu, fast.graph, fast.captured = asked.on_gpu, (), (0, 0)
            fast.ahead = {batch_size * bucket(asked.tokens): asked.ahead}
        tracker.rewind(*self.made)
        inputs = self._inputs(batch_size, asked.tokens, asked.masked)
        with self.mode, tracker:
            tracker.see(("inputs", tensor) for tensor in inputs.values())
            before = len(tracker.log)
            hooks = [hook for layer in self.packed for hook in _label_buffers(tracker, layer)]
            steps = Steps(self.model, [inputs], self.execution, asked.protocol)
            for _ in range(STEPS):
                steps()
                _label_output(tracker, steps.output)
            for hook in hooks:
                hook.remove()
            captured = fast.captured if fast else (0, 0)
            log, labels = list(tracker.log), list(tracker.labels)
            return Trace(batch_size, log, labels, self.loaded, before, tracker.flops, captured)

    def _memory(self, trace: Trace, target: Target) -> Memory:
        weights = sum(size for _, size in self.parts.values())
        if target.compute_capability is None:
            log = trace.settled()
            peak = peak_of(log)
            ledger = ledger_of(log, trace.labels, peak)
            return Memory(
                weights_bytes=weights, peak_bytes=peak, breakdown=ledger, method="predicted"
            )
        workspace = workspace_bytes(target.compute_capability)
        allocator, parts = replay(trace, workspace)
        return Memory(
            weights_bytes=weights,
            peak_bytes=allocator.peak_allocated,
            reserved_bytes=allocator.peak_reserved,
            min_reserved_bytes=least_reserved(trace, workspace, allocator),
            breakdown=parts,
            method="predicted",
        )

    def _least_bytes(self, workload: Workload) -> int:
        """Bytes that a step must move at least: every weight it multiplies by, once, and its result."""
        weights = sum(
            size for label, size in self.parts.values() if label.startswith(self.multiplied)
        )
        return weights + workload.batch_size * (workload.tokens or 0) * self.config.embed_dim * 2


@lru_cache(maxsize=8)
def predictor(
    model: str,
    size: str,
    dtype: str = "bfloat16",
    kernel: str = "tritonv2",
    execution: str = "eager",
) -> Predictor:
    """The predictor of these, built once in a process: its runs serve every card and batch. Raises BadInput."""
    return Predictor(resolve_variant(model), size, dtype, kernel, execution)


def _label_output(tracker: MemoryTracker, output: ColQwen3Output) -> None:
    assert output.embeddings is not None
    tracker.label([output.embeddings], OUTPUT)
    if output.past_key_values is not None:
        layers: Any = output.past_key_values.layers
        tracker.label(
            [tensor for layer in layers for tensor in (layer.keys, layer.values)], KV_CACHE
        )


def _label_buffers(tracker: MemoryTracker, layer: nn.Module) -> list[Any]:
    """Hooks on a quantised linear: what its forward makes is its buffer, but for what it returns."""
    first = 0

    def enter(layer: nn.Module, inputs: Any) -> None:
        nonlocal first
        first = len(tracker.labels)

    def leave(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        tracker.labels[first:] = [BUFFERS] * (len(tracker.labels) - first)
        tracker.label([output], ACTIVATIONS)

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]


def follow(
    trace: Trace, workspace: int, cap: float = math.inf, stop_at: int | None = None
) -> tuple[Allocator, dict[int, tuple[Block, int]], int]:
    """`(allocator, what lives, where in the log the peak is)`: births and ends, as the CUDA allocator would meet them.

    Loading warms the allocator with one block of all weights and gives it back, as transformers and this lab do. What
    is free when the inputs are there goes back to the GPU, as before a measurement; the peak counts from then on.

    Raises:
        MemoryError: more than `cap` bytes would be reserved.
    """
    allocator = Allocator(cap)
    allocator.release(allocator.allocate(sum(size for _, size in trace.log[: trace.loaded])))
    live: dict[int, tuple[Block, int]] = {}
    peak_at = 0
    for index, (number, size) in enumerate(trace.log):
        if index == trace.before:
            allocator.allocate(workspace)
            allocator.give_back()
            allocator.restart_peaks()
        if size:
            peak = allocator.peak_allocated if index > trace.before else 0
            pool = GRAPH_POOL if trace.captured[0] <= number < trace.captured[1] else 0
            live[number] = allocator.allocate(size, pool), size
            peak_at = index if allocator.peak_allocated > peak else peak_at
        elif number in live:
            allocator.release(live.pop(number)[0])
        if index == stop_at:
            break
    return allocator, live, peak_at


def replay(trace: Trace, workspace: int) -> tuple[Allocator, dict[str, int]]:
    """`(allocator, ledger at its peak)`; the ledger adds up to the peak."""
    allocator, _, peak_at = follow(trace, workspace)
    _, live, _ = follow(trace, workspace, stop_at=peak_at)
    parts: Counter[str] = Counter({WORKSPACE: workspace, ROUNDING: 0})
    for number, (block, size) in live.items():
        parts[trace.labels[number]] += size
        parts[ROUNDING] += block.size - size
    return allocator, dict(parts)


def least_reserved(trace: Trace, workspace: int, free: Allocator) -> int:
    """The least bytes that torch must be allowed to reserve for the run to go through, to `CAP_STEP`.

    More than the peak, because free memory lies in pieces; less than what an unbounded run reserves.
    """
    low, high = free.peak_allocated - 1, free.peak_reserved
    while high - low > CAP_STEP:
        middle = (low + high) // 2
        try:
            follow(trace, workspace, middle)
            high = middle
        except MemoryError:
            low = middle
    return high
