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
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.model.checkpoint import default_checkpoint
from colqwen_lab.model.config import SIZES, VARIANTS
from colqwen_lab.model.inputs import VISUAL_TOKENS, batch_of, prompt_ids, visual_tokens_of
from colqwen_lab.model.loading import DTYPES, skeleton
from colqwen_lab.model.network import ColQwen3Output, is_text_linear
from colqwen_lab.model.synthetic import HEIGHT, WIDTH
from colqwen_lab.predict import kernels
from colqwen_lab.predict.allocator import Trace, memory_on_gpu, workspace_bytes
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
MULTIPLIED = ("text linears", "text norms", "head")
MULTIPLIED_BY_PAGES = (*MULTIPLIED, "vision encoder", "mergers")


@dataclass(frozen=True)
class Setup:
    """What is predicted, except the batch size.

    `quantization` None is 16-bit weights; `tokens` None is the report's queries, or A4 pages, and
    `padded` says whether queries of so many tokens carry a mask. `capability` is the GPU's major
    compute capability; None is a CPU. `prefetched` names the GEMMs of an earlier run that were
    dequantise-then-GEMM.
    """

    size: str
    quantization: Quantization | None = None
    kernel: str = "tritonv2"
    dtype: str = "bfloat16"
    execution: str = "eager"
    workload: str = "queries"
    protocol: str = "lean"
    tokens: int | None = None
    padded: bool = False
    visual_tokens: int = VISUAL_TOKENS
    capability: int | None = 8
    prefetched: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises BadInput for a combination that cannot run, or that is not modelled."""
        one_of("size", self.size, SIZES)
        one_of("dtype", self.dtype, DTYPES)
        kernels.check_kernel(self.kernel, self.quantization, self.execution)
        if self.execution == "fast" and self.protocol != "lean":
            raise BadInput("execution fast keeps no KV cache; use protocol lean")
        if self.execution == "fast" and self.workload == "pages":
            raise BadInput("execution fast embeds queries only; use eager for workload pages")
        if self.workload != "pages" and self.visual_tokens != VISUAL_TOKENS:
            raise BadInput("visual_tokens is an option of workload pages")


@cache
def predict(setup: Setup, batch_size: int) -> Cell:
    """The predicted cell of `batch_size` items; the caller names its variant and its GPU.

    Raises:
        BadInput: a combination that cannot run, or that is not modelled.
    """
    setup.check()
    if not 1 <= batch_size <= LARGEST_BATCH:
        raise BadInput(f"batch size must be 1 to {LARGEST_BATCH}, got {batch_size}")
    if setup.workload == "pages" and batch_size > PAGE_ANCHORS[1]:
        low, high = (predict(setup, batch).model_dump() for batch in PAGE_ANCHORS)
        share = Fraction(batch_size - PAGE_ANCHORS[0], PAGE_ANCHORS[1] - PAGE_ANCHORS[0])
        return Cell.model_validate(_on_line(low, high, share))
    quantization = setup.quantization
    own = setup.size, quantization, setup.kernel, setup.dtype, setup.execution
    network = _network(Setup(*own, workload=setup.workload))
    workload, masked = network.workload(setup, batch_size)
    on_gpu = setup.capability is not None
    run = Run(workload.tokens or 1, masked, setup.protocol, on_gpu, setup.prefetched)
    trace = network.trace(batch_size, run)
    memory: dict[str, Any]
    if setup.capability is None:
        parts = breakdown_of(trace.log, trace.labels, trace.before)
        memory = {"peak_bytes": sum(parts.values()), "breakdown": parts}
    else:
        memory = memory_on_gpu(trace, workspace_bytes(setup.capability))
    weights = sum(size for _, size in network.parts)
    return Cell(
        origin="predicted",
        variant="quantised" if quantization else "base",
        size=setup.size,
        weights="none: fake tensors",
        quantization=quantization,
        workload=workload,
        execution=setup.execution,
        protocol=setup.protocol,
        backend=Backend(requested=setup.kernel if quantization else "auto", dtype=setup.dtype),
        status="ok",
        memory=Memory(weights_bytes=weights, method="predicted", **memory),
        work=Work(flops=trace.flops // STEPS, min_bytes=network.min_bytes(workload)),
        environment=Environment(cpu=None if on_gpu else "any", torch=torch.__version__),
    )


def _on_line(low: Any, high: Any, share: Fraction) -> Any:
    """`share` of the way from `low` to `high` in every whole number of two nested values."""
    if isinstance(high, dict):
        return {name: _on_line(low.get(name, 0), value, share) for name, value in high.items()}
    return round(low + share * (high - low)) if isinstance(high, int) else high


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
        if all(map(_is_real, tensors)):
            return func(*args, **kwargs)
        self.values = False  # the inner operations of a fake one are fake
        try:
            return super().__torch_dispatch__(func, types, _mask_rows(args), kwargs)
        finally:
            self.values = True


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _mask_rows(args: Any) -> Any:
    """Arguments with each real mask in a list of indices replaced by the rows that it selects."""

    def rows(index: Any) -> Any:
        mask = _is_real(index) and index.dtype == torch.bool
        return index.nonzero(as_tuple=True) if mask else (index,)

    return tuple(
        [row for index in arg for row in rows(index)] if isinstance(arg, list) else arg
        for arg in args
    )


class Run(NamedTuple):
    """What decides a trace beside its batch size."""

    tokens: int
    masked: bool
    protocol: str
    on_gpu: bool
    prefetched: tuple[str, ...]


class FakeNetwork:
    """The network of a setup on fake tensors, and its traces by batch and run."""

    def __init__(self, setup: Setup) -> None:
        source = default_checkpoint(VARIANTS["base"], setup.size, "random", CPU)
        self.setup, self.config, self.tokenizer = setup, source.config, source.tokenizer
        self.pages = setup.workload == "pages"
        packing = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
        packed = None
        if setup.quantization:  # modules of asymmetric codes have the same tensors
            packed = setup.quantization.model_dump() | {"sym": True, "data_type": "int"} | packing
        dtype, modules = DTYPES[setup.dtype], "torch" if packed else "auto"
        self.model, _ = skeleton(self.config, packed, CPU, modules, dtype)
        self.mode = FakeBesideReal(allow_non_fake_inputs=True)
        self.traced = cache(self._traced)
        # The tokens of a page beside its image.
        self.text_tokens = len(prompt_ids(self.tokenizer, self.config, 0)) if self.pages else 0
        self.packed: list[nn.Module] = [
            layer for name, layer in self.model.named_modules() if packed and is_text_linear(name)
        ]
        with self.mode:
            self.model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            self._set_kernel()
        self.tracker = MemoryTracker(resident(self.model))
        self.loaded = len(self.tracker.log)
        self.fast: kernels.FakeFast | None = None
        if setup.execution == "fast":
            self.packed = []  # execution fast frees the linears that it takes over
            with self.mode, self.tracker:
                self.fast = kernels.FakeFast(self.model, setup.kernel, bool(packed), self.tracker)
            self.model.add_module("fast", self.fast)
            self.packed = self.fast.packed()
        # In reverse: a storage keeps the first name that it has in a checkpoint.
        parts = [*resident(self.model)][::-1]
        for part, tensor in parts:
            self.tracker.label([tensor], part)
        self.built = len(self.tracker.log), len(self.tracker.labels)
        storages = [(part, tensor.untyped_storage()) for part, tensor in parts]
        self.parts = {s._cdata: (part, s.nbytes()) for part, s in storages}.values()
        setattr(self.mode, "values", self.pages)  # noqa: B010

    def _set_kernel(self) -> None:
        model, kernel = kernels.KERNELS[self.setup.kernel], self.setup.kernel
        as_loaded = self.setup.execution == "eager" or model.gemm is kernels.AsLoaded
        layer: Any
        for layer in self.packed:
            layer.sym = self.setup.quantization and self.setup.quantization.sym
            if isinstance(shifts := getattr(layer, "wf", None), Tensor):  # AutoRound's, no buffer
                layer.wf = torch.empty(shifts.shape, dtype=shifts.dtype)
            if as_loaded and model.forward:
                layer.forward = types.MethodType(model.forward, layer)
            if as_loaded and kernel == "tritonv2":  # created at the first forward and kept
                layer.register_buffer("g_idx", torch.empty(layer.infeatures, dtype=torch.int32))

    def workload(self, setup: Setup, batch_size: int) -> tuple[Workload, bool]:
        """`(workload, whether its batches carry a mask)`."""
        tokens, least, budget = setup.tokens, self.text_tokens, setup.visual_tokens
        if tokens is None and not self.pages:
            batches = query_batches(self.config, self.tokenizer, batch_size, "report", 64, CPU)
            return batches.workload, True
        if tokens is None:
            tokens = least + visual_tokens_of(WIDTH, HEIGHT, self.config, budget)
        longest = self.config.text_config.max_position_embeddings
        if not least < tokens <= longest:
            valid = f"{least + 1} to {longest} at size {setup.size}"
            raise BadInput(f"tokens must be {valid}, got {tokens}")
        # A run sees that no query is padded, and makes no mask.
        workload = Workload(kind="queries", batch_size=batch_size, tokens=tokens, padded_share=0.0)
        if not self.pages:
            return workload, setup.padded
        page = {
            "kind": "pages",
            "visual_tokens": budget,
            "pages": Pages().label if setup.tokens is None else None,
            "index_bytes": tokens * self.config.embed_dim * INDEX_VALUE_BYTES,
        }
        return workload.model_copy(update=page), True

    def min_bytes(self, workload: Workload) -> int:
        """The least bytes that a step can move: each weight it multiplies by, and its result."""
        multiplied = MULTIPLIED_BY_PAGES if self.pages else MULTIPLIED
        weights = sum(size for part, size in self.parts if part.startswith(multiplied))
        tokens = workload.batch_size * (workload.tokens or 0)
        return weights + tokens * self.config.embed_dim * INDEX_VALUE_BYTES

    def trace(self, batch_size: int, run: Run) -> Trace:
        """The trace of two steps.

        Queries: traced at two batches; at one length every tensor takes a + b x batch bytes. Pages
        are encoded image by image, so each batch has a trace of its own.
        """
        if not self.pages:
            first, second = (self.traced(batch, run) for batch in QUERY_ANCHORS)
            if trace := first.at(batch_size - QUERY_ANCHORS[0], second):
                return trace
        return self.traced(batch_size, run)

    def _traced(self, batch_size: int, run: Run) -> Trace:
        """The trace of a run of exactly this batch."""
        tracker, fast = self.tracker, self.fast
        if fast:
            fast.start(run.on_gpu, run.prefetched)
        tracker.rewind(*self.built)
        inputs = self._inputs(batch_size, run)
        with self.mode, tracker:
            tracker.see(("inputs", tensor) for tensor in inputs.values())
            before = len(tracker.log)
            hooks = [hook for layer in self.packed for hook in _label_buffers(tracker, layer)]
            steps = Steps(self.model, [inputs], self.setup.execution, run.protocol)
            for _ in range(STEPS):
                steps()
                _label_output(tracker, steps.output)
            for hook in hooks:
                hook.remove()
            log, labels = [*tracker.log], [*tracker.labels]
        captured = fast.captured if fast else (0, 0)
        return Trace(log, labels, self.loaded, before, tracker.flops, captured)

    def _inputs(self, batch_size: int, run: Run) -> dict[str, Tensor]:
        """Fake queries; of pages the ids, mask and grid are real, and only their area matters."""
        with self.mode:
            if not self.pages:
                ids = torch.empty((batch_size, run.tokens), dtype=torch.int64)
                mask = {"attention_mask": torch.empty_like(ids)} if run.masked else {}
                return {"input_ids": ids} | mask
            vision = self.config.vision_config
            side = vision.spatial_merge_size
            grid = (1, side, side * (run.tokens - self.text_tokens))
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
        tracker.labels[first:] = [kernels.BUFFERS] * (len(tracker.labels) - first)
        tracker.label([output], ACTIVATIONS)

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
