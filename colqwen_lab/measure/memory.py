"""Peak memory of a cell, in a pass of its own: the allocator's on CUDA, tracked from the tensors on a CPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from torch import Tensor

from colqwen_lab.measure.interference import others_on, own_bytes
from colqwen_lab.measure.timing import synchronise
from colqwen_lab.model.loading import Loaded
from colqwen_lab.records import Memory
from colqwen_lab.runtime.components import resident
from colqwen_lab.runtime.eager import STEPS
from colqwen_lab.runtime.tracking import MemoryTracker


def free(device: torch.device) -> None:
    """Give the GPU back what nobody holds any more; a CPU's memory returns by itself."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def measure(
    loaded: Loaded, inputs: list[dict[str, Tensor]], step: Callable[[], None], alone: bool = True
) -> Memory:
    """Bytes of `loaded` at rest and at the peak of two steps, the first step of a shape left out.

    On CUDA this counts whatever the process holds: one model a process. What the device holds in all is told by the
    driver for the process where it can, and for the device if the process is `alone` on it.
    """
    device = loaded.device
    if device.type != "cuda":
        given = (("inputs", tensor) for batch in inputs for tensor in batch.values())
        with MemoryTracker([*resident(loaded.model), *given]) as tracker:
            for _ in range(STEPS):
                step()
        return Memory(
            weights_bytes=loaded.weights_bytes,
            resident_bytes=loaded.weights_bytes,
            peak_bytes=tracker.peak_bytes,
            breakdown=tracker.ledger(),
            method="tracked",
        )
    free(device)
    resident_bytes = torch.cuda.memory_allocated(device)
    step()
    # What was captured at the first step is captured again, so that its memory counts.
    if fast := getattr(loaded.model, "fast", None):
        fast.forget()
        free(device)
    torch.cuda.reset_peak_memory_stats(device)
    retries = torch.cuda.memory_stats(device)["num_alloc_retries"]
    for _ in range(STEPS):
        step()
    synchronise(device)
    unused, total = torch.cuda.mem_get_info(device)
    return Memory(
        weights_bytes=loaded.weights_bytes,
        resident_bytes=resident_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(device),
        reserved_bytes=torch.cuda.max_memory_reserved(device),
        device_bytes=own_bytes(device)
        or (total - unused if alone and not others_on(device, {os.getpid()}) else None),
        allocation_retries=torch.cuda.memory_stats(device)["num_alloc_retries"] - retries,
        method="cuda",
    )
