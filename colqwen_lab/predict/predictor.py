"""Predicted memory and work of a cell, without a GPU and without weights.

The network runs on fake tensors, which have shapes and no values; a tracker notes their births and
ends; the model of PyTorch's allocator turns these into a peak. Nothing is fitted to a measurement.
Kernels, allocator and cuBLAS workspace are derived from their sources.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, lru_cache, partial
from itertools import chain
from platform import python_version
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from colqwen_lab.errors import BadInput, LabError, one_of
from colqwen_lab.measure.environment import MEASURING, code_version, installed
from colqwen_lab.model.checkpoint import default_checkpoint
from colqwen_lab.model.config import SIZES, VARIANTS
from colqwen_lab.model.inputs import VISUAL_TOKENS, batch_of, prompt_ids
from colqwen_lab.model.loading import DTYPES, skeleton
from colqwen_lab.model.network import TEXT_LAYERS, UNUSED_HEAD, is_text_linear, unused_head_shape
from colqwen_lab.model.preprocess import visual_tokens_of
from colqwen_lab.model.synthetic import HEIGHT, WIDTH
from colqwen_lab.predict import kernels
from colqwen_lab.predict.allocator import memory_on_gpu, workspace_bytes
from colqwen_lab.predict.trace import Irregular, Trace, repeated
from colqwen_lab.records import Backend, Cell, Environment, Memory, Quantization, Work, Workload
from colqwen_lab.runtime.batches import INDEX_VALUE_BYTES, Pages, query_batches
from colqwen_lab.runtime.eager import PROTOCOLS, STEPS, Steps
from colqwen_lab.runtime.fast import KINDS
from colqwen_lab.runtime.linears import MIN_DEQUANTISE_M
from colqwen_lab.runtime.tracking import (
    ACTIVATIONS,
    Mark,
    MemoryTracker,
    breakdown_of,
    part_of,
    resident,
)
from colqwen_lab.settings import cache_folder, write_file

CPU = torch.device("cpu")
LARGEST_BATCH = 65536
KV_CACHE, OUTPUT = "KV cache", "outputs"
# Two batches of queries with traces of one shape: at batch 1 some tensors fall together.
QUERY_ANCHORS = (2, 3)
# Pages are traced up to the larger batch; cells beyond lie on the line through these two. How far
# memory is fragmented varies with the batch, and this line is on the upper side of it.
PAGE_ANCHORS = (4, 32)
# Parts of the network that a step multiplies by; the last two only for pages.
MULTIPLIED = ("text linears", "text norms", "head", "vision encoder", "mergers")
# The sources that a prediction depends on, beside those of a measurement.
PREDICTING = (*MEASURING, "predict/*")
PACKED: dict[str, Any] = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
PACKED |= {"data_type": "int", "sym": True}  # asymmetric codes have the same tensors


@dataclass(frozen=True)
class Setup:
    """What is predicted, except the batch size.

    `quantization` None is 16-bit weights; `tokens` None is the report's queries, or A4 pages, and
    `padded` says whether queries of so many tokens carry a mask. `capability` is the GPU's major
    compute capability; None is a CPU. `dequantised` names the GEMMs that dequantise their weight
    and multiply by cuBLAS; None is all of pages by humming. `prefetched` names those that did so
    before the forward, in earlier runs.
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
    dequantised: tuple[str, ...] | None = None


@cache
def _versions() -> tuple[str | None, ...]:
    """All that a prediction depends on, beside its setup."""
    packages = ("torch", "transformers", "auto-round", "accelerate")
    return code_version(PREDICTING), python_version(), *map(installed, packages)


@cache
def predict(setup: Setup, batch_size: int) -> Cell:
    """The predicted cell of `batch_size` items; the caller names its variant and its GPU.

    It is kept in the cache folder, where that can be written.

    Raises:
        BadInput: a combination that cannot run, or that is not modelled.
    """
    _check(setup, batch_size)
    low, high = PAGE_ANCHORS
    if setup.workload == "pages" and batch_size > high:
        first, last = (predict(setup, batch).model_dump() for batch in PAGE_ANCHORS)
        share = Fraction(batch_size - low, high - low)
        return Cell.model_validate(_on_line(first, last, share))
    name = hashlib.sha256(repr((_versions(), setup, batch_size)).encode()).hexdigest()
    path = cache_folder() / "predicted" / f"{name}.json"
    with suppress(OSError, ValueError):  # none, torn, or another's
        return Cell.model_validate_json(path.read_bytes())
    cell = _traced_cell(setup, batch_size)
    with suppress(OSError, ValueError, LabError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, cell.to_line(), like="")
    return cell


def _traced_cell(setup: Setup, batch_size: int) -> Cell:
    quantization, capability = setup.quantization, setup.capability
    own = (setup.size, quantization, setup.kernel, setup.dtype, setup.execution, setup.workload)
    network = _network(Setup(*own))
    workload = network.workload(setup, batch_size)
    padded = setup.padded or setup.tokens is None
    run = replace(setup, tokens=workload.tokens, padded=padded, capability=capability and 8)
    try:
        trace = network.trace(batch_size, run)
    except Irregular:
        network = _network(Setup(*own), every_layer=True)
        trace = network.trace(batch_size, run)
    head = 0
    shape = unused_head_shape(network.config)
    if shape and PROTOCOLS[setup.protocol].unused_head:
        head = math.prod(shape) * DTYPES[setup.dtype].itemsize
        trace = trace.holding(head, part_of(UNUSED_HEAD))
    if capability is None:
        started = sum(1 for _ in trace.events(0, trace.before))
        parts = breakdown_of([*trace.events()], trace.labels, started)
        memory: dict[str, Any] = {"peak_bytes": sum(parts.values()), "breakdown": parts}
    else:
        memory = memory_on_gpu(trace, workspace_bytes(capability))
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
        memory=Memory(
            weights_bytes=sum(network.parts.values()) + head,
            unused_head_bytes=head,
            method="predicted",
            **memory,
        ),
        work=Work(flops=trace.flops, min_bytes=network.min_bytes(workload)),
        environment=Environment(cpu="any" if capability is None else None, torch=torch.__version__),
    )


def _check(setup: Setup, batch_size: int) -> None:
    one_of("size", setup.size, SIZES)
    one_of("dtype", setup.dtype, DTYPES)
    kernels.check_kernel(setup.kernel, setup.quantization, setup.execution)
    if setup.execution == "fast" and setup.protocol != "lean":
        raise BadInput("execution fast keeps no KV cache; use protocol lean")
    if setup.workload != "pages" and setup.visual_tokens != VISUAL_TOKENS:
        raise BadInput("visual_tokens is an option of workload pages")
    if not 1 <= batch_size <= LARGEST_BATCH:
        raise BadInput(f"batch size must be 1 to {LARGEST_BATCH}, got {batch_size}")


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
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        self.values = False  # the inner operations of a fake one are fake
        try:
            args = [_rows(arg) if isinstance(arg, list) else arg for arg in args]
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.values = True


def _rows(indices: list[Any]) -> list[Any]:
    """`indices` with each real mask replaced by the rows that it selects."""
    rows: list[Any] = []
    for index in indices:
        fake = isinstance(index, FakeTensor) or not isinstance(index, Tensor)
        rows += [index] if fake or index.dtype != torch.bool else index.nonzero(as_tuple=True)
    return rows


class FakeNetwork:
    """The network of a setup on fake tensors, and its traces by batch and setup.

    It has as few layers as tell how the others run, unless `every_layer` is given.
    """

    def __init__(self, setup: Setup, every_layer: bool = False) -> None:
        source = default_checkpoint(VARIANTS["base"], setup.size, "random", CPU)
        self.setup, self.config, self.tokenizer = setup, source.config, source.tokenizer
        self.pages, self.traced = setup.workload == "pages", cache(self._traced)
        # The tokens of a page beside its image.
        self.text_tokens = len(prompt_ids(self.tokenizer, self.config, 0)) if self.pages else 0
        config, every = deepcopy(self.config), self.config.text_config.num_hidden_layers
        # Those that get features of the vision encoder, one after them, two alike, and the last.
        few = len(config.vision_config.deepstack_visual_indexes) * self.pages + 4
        self.layers = every if every_layer else min(every, few)
        self.more, config.text_config.num_hidden_layers = every - self.layers, self.layers
        packed = setup.quantization.model_dump() | PACKED if setup.quantization else None
        self.model, _ = skeleton(config, packed, CPU, "torch", DTYPES[setup.dtype])
        self.mode = FakeBesideReal(allow_non_fake_inputs=True)
        modules = self.model.named_modules()
        linears = [linear for name, linear in modules if packed and is_text_linear(name)]
        with self.mode:
            self.model._apply(_empty)
            self._set_kernel(linears)
        self.tracker, self.fast, layer = MemoryTracker(), None, ""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            before, layer = layer, name.removeprefix(TEXT_LAYERS).split(".")[1]
            if layer.isdigit() and layer != before:
                self.tracker.mark()
            self.tracker.see([(part_of(name), tensor)])
        self.loaded = len(self.tracker.log)
        layers: Any = self.model.vlm.model.language_model.layers
        if setup.execution == "eager" and setup.kernel == "humming":
            with self.mode, self.tracker:
                for number, linear in enumerate(linears):
                    if number % (len(linears) // self.layers) == 0:
                        self.tracker.mark()
                    kernels.repack(linear, linear.qweight, linear.qzeros, linear.scales)
        if setup.execution == "fast":
            linears = []  # execution fast frees the linears that it takes over
            with self.mode, self.tracker:
                self.fast = kernels.FakeFast(self.model, setup.kernel, self.tracker)
            self.model.add_module("fast", self.fast)
            linears = [gemm for gemm in self.fast.linears() if not isinstance(gemm, kernels.Dense)]
            layers = self.fast.of_kind("qkv")
        # In reverse: a storage keeps the first name that it has in a checkpoint.
        for part, tensor in reversed(resident(self.model)):
            self.tracker.label([tensor], part)
        for linear in linears:
            linear.forward = partial(_labelled, self.tracker, linear.forward)
        for layer in layers:
            layer.register_forward_pre_hook(self.tracker.mark)
        self.built = Mark(len(self.tracker.log), len(self.tracker.labels), 0)
        # What lives after the last event: the weights.
        built = self._repeated(self.built.events, 0)
        self.parts = breakdown_of(
            [*built.events()], built.labels, sum(1 for _ in built.events()) - 1
        )
        self.mode.values = self.pages

    def _repeated(self, before: int, flops: int, captured: tuple[int, int] = (0, 0)) -> Trace:
        """The trace of what was tracked, for all layers."""
        tracker = self.tracker
        trace = Trace([*tracker.log], [*tracker.labels], self.loaded, before, flops, captured)
        return repeated(trace, tracker.marks, self.layers, self.more)

    def _set_kernel(self, layers: list[Any]) -> None:
        setup, model = self.setup, kernels.KERNELS[self.setup.kernel]
        as_loaded = setup.execution == "eager" or model.gemm is kernels.AsLoaded
        for layer in layers:
            layer.sym = setup.quantization and setup.quantization.sym
            layer.wf = _empty(layer.wf)  # AutoRound's shifts, no buffer
            if as_loaded and model.forward:
                layer.forward = partial(model.forward, layer)
            if as_loaded and setup.kernel == "tritonv2":  # created at the first forward and kept
                layer.register_buffer("g_idx", torch.empty(layer.infeatures, dtype=torch.int32))

    @property
    def _dequantises(self) -> bool:
        """Whether GEMMs of many rows may dequantise their weight, as `w4.Humming` does."""
        scheme = self.setup.quantization or Quantization(bits=16, group_size=1, sym=True)
        known = (scheme.bits, scheme.group_size, scheme.sym) == (4, 128, True)
        return self.pages and known and self.setup.kernel == "humming"

    def workload(self, setup: Setup, batch_size: int) -> Workload:
        tokens, page = setup.tokens, dict[str, Any]()
        if tokens is None and not self.pages:
            queries = query_batches(self.config, self.tokenizer, batch_size, "report", 64, CPU)
            return queries.workload
        if tokens is None:
            budget = setup.visual_tokens
            tokens = self.text_tokens + visual_tokens_of(WIDTH, HEIGHT, self.config, budget)
            page["pages"] = Pages().label
        if self.pages:
            page["visual_tokens"] = setup.visual_tokens
            page["index_bytes"] = tokens * self.config.embed_dim * INDEX_VALUE_BYTES
        longest = self.config.text_config.max_position_embeddings
        if not self.text_tokens < tokens <= longest:
            valid = f"{self.text_tokens + 1} to {longest} at size {setup.size}"
            raise BadInput(f"tokens must be {valid}, got {tokens}")
        # A run sees that no query is padded, and makes no mask.
        page |= {"kind": setup.workload, "batch_size": batch_size, "tokens": tokens}
        return Workload(padded_share=0.0, **page)

    def min_bytes(self, workload: Workload) -> int:
        """The least bytes that a step can move: each weight it multiplies by, and its result."""
        multiplied = MULTIPLIED if self.pages else MULTIPLIED[:3]
        weights = sum(size for part, size in self.parts.items() if part.startswith(multiplied))
        tokens = workload.batch_size * (workload.tokens or 0)
        return weights + tokens * self.config.embed_dim * INDEX_VALUE_BYTES

    def trace(self, batch_size: int, run: Setup) -> Trace:
        """The trace of two steps.

        Queries: traced at two batches; at one length every tensor takes a + b x batch bytes. Pages
        are encoded image by image, so each batch has a trace of its own.
        """
        if not self.pages:
            first, second = (self.traced(batch, run) for batch in QUERY_ANCHORS)
            if trace := first.at(batch_size - QUERY_ANCHORS[0], second):
                return trace
        return self.traced(batch_size, run)

    def _traced(self, batch_size: int, run: Setup) -> Trace:
        """The trace of a run of exactly this batch."""
        tracker, fast = self.tracker, self.fast
        if fast:
            dequantised = run.dequantised
            if dequantised is None:
                rows = batch_size * (run.tokens or 0)
                dequantised = KINDS if self._dequantises and rows >= MIN_DEQUANTISE_M else ()
            fast.start(run.capability is not None, run.prefetched, dequantised)
        tracker.rewind(self.built)
        inputs = self._inputs(batch_size, run)
        with self.mode, tracker:
            tracker.see(("inputs", tensor) for tensor in inputs.values())
            before, flops = len(tracker.log), 0
            steps = Steps(self.model, run.execution, run.protocol)
            for step in range(STEPS):
                steps(inputs)
                flops = flops if step else tracker.flops
                tracker.label([steps.output.embeddings], OUTPUT)
                if (kept := steps.output.past_key_values) is not None:
                    pairs = ((layer.keys, layer.values) for layer in kept.layers)
                    tracker.label(chain.from_iterable(pairs), KV_CACHE)
            return self._repeated(before, flops, fast.captured if fast else (0, 0))

    def _inputs(self, batch_size: int, run: Setup) -> dict[str, Tensor]:
        """Fake queries; of pages the ids, mask and grid are real, and only their area matters."""
        tokens = run.tokens or 1
        with self.mode:
            if not self.pages:
                ids = torch.empty((batch_size, tokens), dtype=torch.int64)
                mask = {"attention_mask": torch.empty_like(ids)} if run.padded else {}
                return {"input_ids": ids} | mask
            vision = self.config.vision_config
            side = vision.spatial_merge_size
            grid = (1, side, side * (tokens - self.text_tokens))
            values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            pixels = torch.empty(math.prod(grid), values)
            return batch_of([(pixels, grid)] * batch_size, self.tokenizer, self.config)


_network = lru_cache(maxsize=8)(FakeNetwork)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _labelled(tracker: MemoryTracker, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The result of a quantised linear; every other tensor of its forward is its buffer."""
    first = len(tracker.labels)
    result = forward(x)
    tracker.labels[first:] = [kernels.BUFFERS] * (len(tracker.labels) - first)
    tracker.label([result], ACTIVATIONS)
    return result
