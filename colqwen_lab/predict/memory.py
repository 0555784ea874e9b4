"""Peak memory without a GPU: the same network and execution under fake tensors, then the allocator block by block.

Nothing here is fitted to a measurement. What a run cannot show on a CPU is derived: the allocator from PyTorch's source
(`allocator.py`), the cuBLAS workspace from PyTorch's default, the buffers of a kernel from that kernel's source.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.model import loading
from colqwen_lab.model.network import ColQwen3Output, is_text_linear
from colqwen_lab.model.variants import Variant
from colqwen_lab.model.weights import RandomSource, default_source
from colqwen_lab.predict.allocator import Allocator, Block
from colqwen_lab.records import Backend, Cell, Environment, Memory, Work, Workload
from colqwen_lab.runtime.components import resident
from colqwen_lab.runtime.execution import STEPS, Steps
from colqwen_lab.runtime.tracking import ACTIVATIONS, MemoryTracker
from colqwen_lab.runtime.workloads import query_batches

CPU = torch.device("cpu")
KIB = 1024
ROUNDING, WORKSPACE, KV_CACHE, OUTPUT, BUFFERS = (
    "allocator rounding",
    "cuBLAS workspace",
    "KV cache",
    "outputs",
    "backend buffers",
)


def workspace_bytes(compute_capability: tuple[int, int]) -> int:
    """PyTorch's default cuBLAS workspace: 32 MiB on sm90, else 8.125 MiB. Source: CublasHandlePool.cpp."""
    return 32 * KIB * KIB if compute_capability[0] == 9 else 2 * 4096 * KIB + 8 * 16 * KIB


# ---------------------------------------------------------------- kernels for packed weights


def _dequantise_then_multiply(layer: Any, x: Tensor) -> Tensor:
    """AutoRound's Triton fallback: a whole weight [in, out] in the input's type. Source: triton_utils_zp/dequant.py."""
    weight = x.new_empty(layer.infeatures, layer.outfeatures)
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], layer.outfeatures)


def _fused(layer: Any, x: Tensor) -> Tensor:
    """A fused kernel dequantises in registers: no buffer but its result."""
    weight = x.new_empty(1).expand(layer.infeatures, layer.outfeatures)
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], layer.outfeatures)


# What a kernel needs beside its packed weights; `torch` is AutoRound's own module, run as it is.
KERNELS: dict[str, Callable[[Any, Tensor], Tensor] | None] = {
    "tritonv2": _dequantise_then_multiply,
    "torch": None,
    "fused": _fused,
}


@dataclass(frozen=True)
class Target:
    """The device that is predicted for. `compute_capability` None is a CPU: no allocator, no workspace."""

    name: str
    compute_capability: tuple[int, int] | None


A100 = Target("NVIDIA A100-SXM4-40GB", (8, 0))
HOST = Target("CPU", None)


class Predictor:
    """Predicts cells of one variant: the network is built once, on fake tensors.

    Raises:
        BadInput: an unknown kernel model.
    """

    def __init__(self, variant: Variant, size: str, dtype: str = "bfloat16", kernel: str = "tritonv2") -> None:
        one_of("kernel model", kernel, KERNELS)
        one_of("dtype", dtype, loading.DTYPES)
        self.variant, self.size, self.kernel = variant, size, kernel
        source = default_source(variant, size, "random", CPU)
        assert isinstance(source, RandomSource)
        self.config = source.config
        quantized = source.quantization is not None
        self.model, _ = loading.skeleton(
            source.config, source.quantization, CPU, "torch" if quantized else "auto", loading.DTYPES[dtype]
        )
        self.tokenizer = source.tokenizer
        self.dtype = dtype
        self.mode = FakeTensorMode()
        self._fake()
        self.linears = [(n, m) for n, m in self.model.named_modules() if is_text_linear(n)]
        if quantized:
            self._model_kernels()

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
                if isinstance(shifts := getattr(module, "wf", None), Tensor):  # AutoRound's table, no buffer
                    setattr(module, "wf", torch.empty(shifts.shape, dtype=shifts.dtype))  # noqa: B010

    def _model_kernels(self) -> None:
        forward = KERNELS[self.kernel]
        for _, layer in self.linears:
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
        execution: str = "eager",
    ) -> Cell:
        """The predicted cell of `batch_size` queries: the report's, or all of `tokens` tokens."""
        inputs, workload = self._inputs(batch_size, tokens)
        tracker, before = self._run(inputs, execution, protocol)
        memory = self._memory(tracker, before, target)
        work = Work(flops=tracker.flops // STEPS, least_bytes=self._least_bytes(workload))
        return Cell(
            origin="predicted",
            variant=self.variant.name,
            size=self.size,
            weights="none: fake tensors",
            workload=workload,
            execution=execution,
            protocol=protocol,
            backend=Backend(requested=self.kernel if self.variant.scheme else "auto", dtype=self.dtype),
            status="ok",
            memory=memory,
            work=work,
            environment=Environment(
                gpu=target.name if target.compute_capability else None,
                cpu=None if target.compute_capability else "any",
                torch=torch.__version__,
            ),
        )

    def _inputs(self, batch_size: int, tokens: int | None) -> tuple[list[dict[str, Tensor]], Workload]:
        if tokens is not None:
            if tokens < 1:
                raise BadInput(f"tokens {tokens}; valid: 1 or more")
            with self.mode:
                ids = torch.empty((batch_size, tokens), dtype=torch.int64)
                inputs = [{"input_ids": ids, "attention_mask": torch.empty_like(ids)}]
            return inputs, Workload(kind="queries", batch_size=batch_size, tokens=tokens, padded_share=0.0)
        made = query_batches(self.config, self.tokenizer, batch_size, "report", 64, CPU)
        longest = max(made.inputs, key=lambda batch: batch["input_ids"].shape[1])
        with self.mode:
            fake = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in longest.items()}
        return [fake], made.workload

    def _run(self, inputs: list[dict[str, Tensor]], execution: str, protocol: str) -> tuple[MemoryTracker, int]:
        """`(tracker, length of its log when the steps began)` of two steps."""
        given = [("inputs", tensor) for batch in inputs for tensor in batch.values()]
        quantized = [layer for _, layer in self.linears if self.variant.scheme]
        with self.mode, MemoryTracker([*resident(self.model), *given]) as tracker:
            before = len(tracker.log)
            hooks = [hook for layer in quantized for hook in _label_buffers(tracker, layer)]
            steps = Steps(self.model, inputs, execution, protocol)
            for _ in range(STEPS):
                steps()
                _label_output(tracker, steps.output)
            for hook in hooks:
                hook.remove()
        return tracker, before

    def _memory(self, tracker: MemoryTracker, before: int, target: Target) -> Memory:
        weights = sum(size for _, size in tracker.log[: sum(1 for _ in resident(self.model))])
        if target.compute_capability is None:
            return Memory(
                weights_bytes=weights, peak_bytes=tracker.peak_bytes, ledger=tracker.ledger(), method="predicted"
            )
        allocator, parts = replay(tracker, before, workspace_bytes(target.compute_capability))
        return Memory(
            weights_bytes=weights,
            peak_bytes=allocator.peak_allocated,
            reserved_bytes=allocator.peak_reserved,
            ledger=parts,
            method="predicted",
        )

    def _least_bytes(self, workload: Workload) -> int:
        """Bytes that a step must move at least: every weight it multiplies by, once, and its result."""
        used = ("text linears", "text norms", "head")
        weights = sum(tensor.nbytes for label, tensor in resident(self.model) if label.startswith(used))
        return weights + workload.batch_size * (workload.tokens or 0) * self.config.embed_dim * 2


def _label_output(tracker: MemoryTracker, output: ColQwen3Output) -> None:
    assert output.embeddings is not None
    tracker.label([output.embeddings], OUTPUT)
    if output.past_key_values is not None:
        layers: Any = output.past_key_values.layers
        tracker.label([tensor for layer in layers for tensor in (layer.keys, layer.values)], KV_CACHE)


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


def replay(tracker: MemoryTracker, before: int, workspace: int) -> tuple[Allocator, dict[str, int]]:
    """`(allocator, ledger at its peak)`: the tracker's births and ends, as the CUDA allocator would have met them.

    Loading warms the allocator with one block of all weights and gives it back, as transformers and this lab do.
    """

    def run(stop_at: int | None) -> tuple[Allocator, dict[int, tuple[Block, int]], int]:
        allocator = Allocator()
        allocator.release(allocator.allocate(sum(size for _, size in tracker.log[:before])))
        live: dict[int, tuple[Block, int]] = {}
        peak_at = 0
        for index, (number, size) in enumerate(tracker.log):
            if index == before:
                allocator.allocate(workspace)
            if size:
                peak = allocator.peak_allocated if index > before else 0
                live[number] = allocator.allocate(size), size
                peak_at = index if allocator.peak_allocated > peak else peak_at
            elif number in live:
                allocator.release(live.pop(number)[0])
            if index == stop_at:
                break
        return allocator, live, peak_at

    allocator, _, peak_at = run(None)
    _, live, _ = run(peak_at)
    parts: Counter[str] = Counter({WORKSPACE: workspace})
    for number, (block, size) in live.items():
        parts[tracker.labels[number]] += size
        parts[ROUNDING] += block.size - size
    parts[ROUNDING] += allocator.peak_allocated - sum(parts.values())
    return allocator, dict(parts)
