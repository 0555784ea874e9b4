"""Predicted memory and work of a cell, without a GPU and without weights.

The network runs on fake tensors, which have shapes and no values; a tracker notes their births and
ends; the model of PyTorch's allocator turns these into a peak. Nothing is fitted to a measurement.
Kernels, allocator and cuBLAS workspace are derived from their sources.
"""

from __future__ import annotations

import math
import types
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.model import loading
from colqwen_lab.model.checkpoint import default_checkpoint
from colqwen_lab.model.config import SIZES, VARIANTS
from colqwen_lab.model.inputs import VISUAL_TOKENS, batch_of, prompt_ids, visual_tokens_of
from colqwen_lab.model.network import ColQwen3Output, is_text_linear
from colqwen_lab.model.synthetic import HEIGHT, WIDTH
from colqwen_lab.options import DTYPES, EXECUTIONS, MOST_VISUAL_TOKENS, PROTOCOLS, WORKLOADS
from colqwen_lab.predict.allocator import Trace, min_reserved, peak_breakdown, workspace_bytes
from colqwen_lab.predict.kernels import (
    BUFFERS,
    KERNELS,
    AsLoaded,
    FakeFast,
    bucket,
    check_kernel,
    possible_prefetch,
)
from colqwen_lab.records import Backend, Cell, Environment, Memory, Quantization, Work, Workload
from colqwen_lab.runtime.batches import INDEX_VALUE_BYTES, Pages, query_batches
from colqwen_lab.runtime.eager import STEPS, Steps
from colqwen_lab.runtime.tracking import ACTIVATIONS, MemoryTracker, breakdown_of, resident

CPU = torch.device("cpu")
LARGEST_BATCH = 65536
KV_CACHE, OUTPUT = "KV cache", "outputs"
# Two batches of queries with traces of one shape: at batch 1 some tensors fall together.
QUERY_ANCHORS = (2, 3)
# Pages are traced up to the larger batch; cells beyond lie on the line through these two. How far
# memory is fragmented varies with the batch, and this line is on the upper side of it.
PAGE_ANCHORS = (4, 32)
# Parts of the network that a step multiplies by.
MULTIPLIED = {"queries": ("text linears", "text norms", "head")}
MULTIPLIED["pages"] = (*MULTIPLIED["queries"], "vision encoder", "mergers")


@dataclass(frozen=True)
class Setup:
    """What is predicted, except the batch size.

    `quantization` None is 16-bit weights; `tokens` None is the report's queries, or A4 pages, and
    `padded` says whether queries of so many tokens carry a mask. `capability` is the GPU's major
    compute capability; None is a CPU. `prefetched` names the GEMMs that execution fast does as
    dequantise-then-GEMM; None is all that a run may choose.
    """

    size: str
    quantization: Quantization | None = None
    kernel: str = "tritonv2"
    dtype: str = "bfloat16"
    execution: str = "eager"
    protocol: str = "lean"
    workload: str = "queries"
    tokens: int | None = None
    padded: bool = False
    visual_tokens: int = VISUAL_TOKENS
    capability: int | None = 8
    prefetched: tuple[str, ...] | None = None

    def check(self, batch_size: int) -> None:
        """Raises BadInput for a combination that cannot run, or that is not modelled."""
        one_of("size", self.size, SIZES)
        one_of("dtype", self.dtype, DTYPES)
        one_of("execution", self.execution, EXECUTIONS)
        one_of("protocol", self.protocol, PROTOCOLS)
        one_of("workload", self.workload, WORKLOADS)
        check_kernel(self.kernel, self.quantization, self.execution)
        if self.execution == "fast" and self.protocol != "lean":
            raise BadInput("execution fast keeps no KV cache; use protocol lean")
        if self.execution == "fast" and self.workload == "pages":
            raise BadInput("execution fast embeds queries only; use eager for workload pages")
        if self.workload != "pages" and self.visual_tokens != VISUAL_TOKENS:
            raise BadInput("visual_tokens is an option of workload pages")
        for name, value, most in (
            ("batch size", batch_size, LARGEST_BATCH),
            ("visual_tokens", self.visual_tokens, MOST_VISUAL_TOKENS),
        ):
            if not 1 <= value <= most:
                raise BadInput(f"{name} must be 1 to {most} for a prediction, got {value}")


@lru_cache(maxsize=None)
def predict(setup: Setup, batch_size: int) -> Cell:
    """The predicted cell of `batch_size` items; the caller names its variant and its GPU.

    Raises:
        BadInput: a combination that cannot run, or that is not modelled.
    """
    setup.check(batch_size)
    if setup.workload == "pages" and batch_size > PAGE_ANCHORS[1]:
        first, second = PAGE_ANCHORS
        share = Fraction(batch_size - first, second - first)
        low, high = (predict(setup, batch).model_dump() for batch in PAGE_ANCHORS)
        return Cell.model_validate(_on_line(low, high, share))
    network = _network(
        *(setup.size, setup.quantization, setup.kernel, setup.dtype, setup.execution),
        setup.workload,
    )
    workload, masked = network.workload(setup, batch_size)
    m, prefetched = batch_size * bucket(workload.tokens or 1), setup.prefetched
    if setup.execution == "eager":
        prefetched = ()
    elif prefetched is None:
        prefetched = possible_prefetch(setup.quantization, setup.kernel, setup.capability, m)
    on_gpu = setup.capability is not None
    run = Run(workload.tokens or 1, masked, setup.protocol, on_gpu, prefetched)
    trace = network.trace(batch_size, run)
    parts = network.parts.values()
    multiplied = sum(size for part, size in parts if part.startswith(MULTIPLIED[workload.kind]))
    output = batch_size * run.tokens * network.config.embed_dim * INDEX_VALUE_BYTES
    return Cell(
        origin="predicted",
        variant="quantised" if setup.quantization else "base",
        size=setup.size,
        weights="none: fake tensors",
        quantization=setup.quantization,
        workload=workload,
        execution=setup.execution,
        protocol=setup.protocol,
        backend=Backend(
            requested=setup.kernel if setup.quantization else "auto", dtype=setup.dtype
        ),
        status="ok",
        memory=_memory(trace, sum(size for _, size in parts), setup.capability),
        work=Work(flops=trace.flops // STEPS, min_bytes=multiplied + output),
        environment=Environment(cpu=None if on_gpu else "any", torch=torch.__version__),
    )


def _memory(trace: Trace, weights_bytes: int, capability: int | None) -> Memory:
    if capability is None:
        parts = breakdown_of(trace.settled(), trace.labels)
        return Memory(
            weights_bytes=weights_bytes,
            peak_bytes=sum(parts.values()),
            breakdown=parts,
            method="predicted",
        )
    workspace = workspace_bytes(capability)
    allocator, parts = peak_breakdown(trace, workspace)
    return Memory(
        weights_bytes=weights_bytes,
        peak_bytes=allocator.peak_allocated,
        reserved_bytes=allocator.peak_reserved,
        min_reserved_bytes=min_reserved(trace, workspace, allocator),
        breakdown=parts,
        method="predicted",
    )


def _on_line(low: Any, high: Any, share: Fraction) -> Any:
    """`share` of the way from `low` to `high` in every whole number of two nested values."""
    if isinstance(high, dict):
        return {name: _on_line(low.get(name, 0), value, share) for name, value in high.items()}
    return round(low + share * (high - low)) if isinstance(high, int) else high


# ---------------------------------------------------------------- the network on fake tensors


class FakeBesideReal(FakeTensorMode):
    """Fake tensors beside real ones: results of real tensors alone are computed, the rest is fake.

    The vision encoder reads the values of its grid. So ids, masks and grids are given as real
    tensors, and a mask that selects rows of a fake tensor tells how many. Before `values` is set
    everything is fake.
    """

    values = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.values:
            return super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        real = [not isinstance(tensor, FakeTensor) for tensor in tensors]
        if all(real):
            return func(*args, **kwargs)
        self.values = False  # the inner operations of a fake one are fake
        try:
            if any(real):
                args, kwargs = tree_map_only(Tensor, self._fake, (_mask_rows(args), kwargs))
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.values = True

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)


def _mask_rows(args: Any) -> Any:
    """Arguments with each real mask in a list of indices replaced by the rows that it selects."""

    def rows(index: Any) -> list[Any]:
        real = isinstance(index, Tensor) and not isinstance(index, FakeTensor)
        mask = real and index.dtype == torch.bool
        return list(index.nonzero(as_tuple=True)) if mask else [index]

    return tuple(
        [row for index in arg for row in rows(index)] if isinstance(arg, list) else arg
        for arg in args
    )


class Run(NamedTuple):
    """What decides a trace beside its batch size."""

    tokens: int
    masked: bool
    protocol: str
    on_gpu: bool = True
    prefetched: tuple[str, ...] = ()


class FakeNetwork:
    """The network of one size, quantisation, kernel, dtype and execution, and its traces."""

    def __init__(
        self,
        size: str,
        quantization: Quantization | None,
        kernel: str,
        dtype: str,
        execution: str,
        workload: str,
    ) -> None:
        source = default_checkpoint(VARIANTS["base"], size, "random", CPU)
        self.config, self.tokenizer = source.config, source.tokenizer
        self.size, self.execution = size, execution
        packing = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
        packed = quantization and quantization.model_dump() | {"data_type": "int"} | packing
        backend = "torch" if packed else "auto"
        self.model, _ = loading.skeleton(self.config, packed, CPU, backend, loading.DTYPES[dtype])
        self.mode = FakeBesideReal()
        self.traces: dict[tuple[int, Run], Trace] = {}
        self._fake()
        linears = [layer for name, layer in self.model.named_modules() if is_text_linear(name)]
        self.packed: list[nn.Module] = linears if quantization else []
        self._set_kernel(kernel, quantization)
        self.tracker = MemoryTracker(resident(self.model))
        self.loaded = len(self.tracker.log)
        self.fast: FakeFast | None = None
        if execution == "fast":
            self.packed = linears = []  # execution fast lets go of linears that it takes over
            with self.mode, self.tracker:
                self.fast = FakeFast(self.model, kernel, bool(packed), self.tracker)
            self.model.add_module("fast", self.fast)
            self.packed = self.fast.packed()
        # In reverse: a storage keeps the first name that it has in a checkpoint.
        parts = [*resident(self.model)][::-1]
        for part, tensor in parts:
            self.tracker.label([tensor], part)
        self.built = len(self.tracker.log), len(self.tracker.labels)
        storages = [(part, tensor.untyped_storage()) for part, tensor in parts]
        self.parts = {storage._cdata: (part, storage.nbytes()) for part, storage in storages}
        setattr(self.mode, "values", workload == "pages")  # noqa: B010

    def _fake(self) -> None:
        """Replace every meta and real tensor by a fake one."""
        with self.mode:
            for module in self.model.modules():
                for name, value in module._parameters.items():
                    if value is not None:
                        like = torch.empty(value.shape, dtype=value.dtype)
                        module._parameters[name] = nn.Parameter(like, requires_grad=False)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
                # AutoRound's table of shifts is no buffer.
                if isinstance(shifts := getattr(module, "wf", None), Tensor):
                    setattr(module, "wf", torch.empty(shifts.shape, dtype=shifts.dtype))  # noqa: B010

    def _set_kernel(self, kernel: str, quantization: Quantization | None) -> None:
        model = KERNELS[kernel]
        for layer in self.packed:
            setattr(layer, "sym", quantization and quantization.sym)  # noqa: B010
            if self.execution == "fast" and model.gemm is not AsLoaded:
                continue
            if model.forward:
                layer.forward = types.MethodType(model.forward, layer)
            if kernel == "tritonv2":
                # The module makes its group index at the first forward and keeps it.
                with self.mode:
                    features: Any = layer.infeatures
                    layer.register_buffer("g_idx", torch.empty(features, dtype=torch.int32))

    def workload(self, setup: Setup, batch_size: int) -> tuple[Workload, bool]:
        """`(workload, whether its batches carry a mask)`."""
        tokens, pages = setup.tokens, setup.workload == "pages"
        text_tokens = len(prompt_ids(self.tokenizer, self.config, 0)) if pages else 0
        if tokens is None and not pages:
            batches = query_batches(self.config, self.tokenizer, batch_size, "report", 64, CPU)
            return batches.workload, True
        budget = setup.visual_tokens
        label = Pages().label if pages and tokens is None else None
        if tokens is None:
            tokens = text_tokens + visual_tokens_of(WIDTH, HEIGHT, self.config, budget)
        longest = self.config.text_config.max_position_embeddings
        if not text_tokens < tokens <= longest:
            valid = f"{text_tokens + 1} to {longest} at size {self.size}"
            raise BadInput(f"tokens must be {valid}, got {tokens}")
        workload = Workload(
            kind="pages" if pages else "queries",
            batch_size=batch_size,
            tokens=tokens,
            padded_share=0.0,
            visual_tokens=budget if pages else None,
            pages=label,
            index_bytes=tokens * self.config.embed_dim * INDEX_VALUE_BYTES if pages else None,
        )
        # A run sees that no query is padded, and makes no mask.
        return workload, pages or setup.padded

    def trace(self, batch_size: int, run: Run) -> Trace:
        """The trace of two steps.

        Queries: traced at two batches; at one length every tensor takes a + b x batch bytes. Pages
        are encoded image by image, so each batch has a trace of its own.
        """
        if not self.mode.values:
            first, second = (self.traced(batch, run) for batch in QUERY_ANCHORS)
            if first.same_shape(second):
                return first.at(batch_size, second)
        return self.traced(batch_size, run)

    def traced(self, batch_size: int, run: Run) -> Trace:
        """The trace of a run of exactly this batch, kept."""
        if (batch_size, run) not in self.traces:
            self.traces[batch_size, run] = self._traced(batch_size, run)
        return self.traces[batch_size, run]

    def _traced(self, batch_size: int, run: Run) -> Trace:
        tracker, fast = self.tracker, self.fast
        if fast:
            fast.start(run.on_gpu, batch_size * bucket(run.tokens), run.prefetched)
        tracker.rewind(*self.built)
        inputs = self._inputs(batch_size, run)
        with self.mode, tracker:
            tracker.see(("inputs", tensor) for tensor in inputs.values())
            before = len(tracker.log)
            hooks = [hook for layer in self.packed for hook in _label_buffers(tracker, layer)]
            steps = Steps(self.model, [inputs], self.execution, run.protocol)
            for _ in range(STEPS):
                steps()
                _label_output(tracker, steps.output)
            for hook in hooks:
                hook.remove()
            return Trace(
                batch_size=batch_size,
                log=list(tracker.log),
                labels=list(tracker.labels),
                loaded=self.loaded,
                before=before,
                flops=tracker.flops,
                captured=fast.captured if fast else (0, 0),
            )

    def _inputs(self, batch_size: int, run: Run) -> dict[str, Tensor]:
        """Fake queries; of pages the ids, mask and grid are real. Only a page's area matters."""
        with self.mode:
            if not self.mode.values:
                ids = torch.empty((batch_size, run.tokens), dtype=torch.int64)
                mask = {"attention_mask": torch.empty_like(ids)} if run.masked else {}
                return {"input_ids": ids} | mask
            vision = self.config.vision_config
            side = vision.spatial_merge_size
            text_tokens = len(prompt_ids(self.tokenizer, self.config, 0))
            grid = (1, side, side * (run.tokens - text_tokens))
            values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            weight = next(self.model.parameters())
            pixels = weight.new_empty((math.prod(grid), values), dtype=torch.float32)
            return batch_of([(pixels, grid)] * batch_size, self.tokenizer, self.config)


_network = lru_cache(maxsize=8)(FakeNetwork)


def _label_output(tracker: MemoryTracker, output: ColQwen3Output) -> None:
    assert output.embeddings is not None
    tracker.label([output.embeddings], OUTPUT)
    if output.past_key_values is not None:
        layers: Any = output.past_key_values.layers
        tracker.label([kept for layer in layers for kept in (layer.keys, layer.values)], KV_CACHE)


def _label_buffers(tracker: MemoryTracker, layer: nn.Module) -> list[Any]:
    """Hooks on a quantised linear: every tensor of its forward but the result is its buffer."""
    first = 0

    def enter(layer: nn.Module, inputs: Any) -> None:
        nonlocal first
        first = len(tracker.labels)

    def leave(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        tracker.labels[first:] = [BUFFERS] * (len(tracker.labels) - first)
        tracker.label([output], ACTIVATIONS)

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
