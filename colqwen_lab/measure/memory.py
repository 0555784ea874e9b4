"""Peak memory of a cell, in a pass of its own, and the memory cap of a smaller card.

On CUDA the allocator's statistics give the peak; on a CPU it is tracked from the tensors.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.hardware import Card
from colqwen_lab.measure.environment import others_on, own_bytes
from colqwen_lab.measure.timing import synchronise
from colqwen_lab.model.loading import Loaded
from colqwen_lab.records import Memory
from colqwen_lab.runtime.eager import STEPS, Steps
from colqwen_lab.runtime.tracking import MemoryTracker, resident

# Runs near the edge fail later by fragmentation, so the reported batch is this share below it.
MARGIN = 0.05
VERIFIED_RUNS = 3
MAX_BATCH = 4096
METHOD = "cap on torch's memory, doubling and bisection, 5 % margin, run again"


def free(device: torch.device) -> None:
    """Return unused memory to the GPU; a CPU's returns by itself."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def measure(loaded: Loaded, batch: dict[str, Tensor], step: Steps, alone: bool = True) -> Memory:
    """Bytes of `loaded` at rest and at the peak of two steps of `batch`, after a first one.

    CUDA statistics count everything in the process, so a process measures one model. `device_bytes`
    is the driver's figure for the process, or for the device if the process is `alone` on it.
    """
    device, weights = loaded.device, loaded.weights_bytes
    if device.type != "cuda":
        tensors = (("inputs", tensor) for tensor in batch.values())
        with MemoryTracker([*resident(loaded.model), *tensors]) as tracker:
            for _ in range(STEPS):
                step(batch)
        figures = {"resident_bytes": weights, "peak_bytes": tracker.peak_bytes}
        breakdown = tracker.breakdown()
        return Memory(weights_bytes=weights, **figures, breakdown=breakdown, method="tracked")
    free(device)
    resident_bytes = torch.cuda.memory_allocated(device)
    step(batch)
    # Graphs captured in the first step are captured again, so that their memory counts.
    if fast := getattr(loaded.model, "fast", None):
        fast.forget()
        free(device)
    torch.cuda.reset_peak_memory_stats(device)
    retries = torch.cuda.memory_stats(device)["num_alloc_retries"]
    for _ in range(STEPS):
        step(batch)
    synchronise(device)
    unused, total = torch.cuda.mem_get_info(device)
    device_bytes = own_bytes(device)
    if not device_bytes and alone and not others_on(device, {os.getpid()}):
        device_bytes = total - unused
    return Memory(
        weights_bytes=weights,
        resident_bytes=resident_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(device),
        reserved_bytes=torch.cuda.max_memory_reserved(device),
        device_bytes=device_bytes or None,
        allocation_retries=torch.cuda.memory_stats(device)["num_alloc_retries"] - retries,
        method="cuda",
    )


def set_cap(card: Card, device: torch.device) -> tuple[int, int]:
    """`(cap, outside)` in bytes: torch may take `cap`, the card's usable memory minus `outside`.

    Call it before the model loads. `outside` is the memory outside torch, measured after a first
    GEMM, which loads the libraries. Raises MissingRequirement where this GPU cannot play the card.
    """
    if device.type != "cuda":
        raise MissingRequirement(
            "a memory cap needs a CUDA GPU, and there is none here; `colqwen-lab plan` predicts it"
        )
    if others_on(device, {os.getpid()}):
        raise MissingRequirement(
            "other processes are on this GPU, and their memory would count as this one's; "
            "end them first"
        )
    square = torch.ones(256, 256, device=device)
    (square @ square).sum().item()
    synchronise(device)
    unused, total = torch.cuda.mem_get_info(device)
    outside = total - unused - torch.cuda.memory_reserved(device)
    cap = card.usable_bytes - outside
    if not 0 < cap <= total - outside:
        raise MissingRequirement(
            f"a {card.name} card has more memory than this GPU, or less than its context; "
            "name a smaller card"
        )
    torch.cuda.set_per_process_memory_fraction(cap / total, device)
    return cap, outside


def batch_search(outcomes: list[tuple[int, str]], limit: int = MAX_BATCH) -> Iterator[int]:
    """Batch sizes to try in search of the largest that runs; the last one is it.

    The caller appends (batch size, "ok" or another outcome) to `outcomes` after each. The search
    doubles to the first failure and bisects to half the margin. Then the batch size a margin below
    the edge must run three times, else it steps down by the margin.
    """
    works, fails = 0, limit + 1
    while works < limit and fails - works > max(1, MARGIN / 2 * works):
        batch = min(2 * works or 1, limit) if fails > limit else (works + fails) // 2
        yield batch
        works, fails = (batch, fails) if outcomes[-1][1] == "ok" else (works, batch)
    batch = max(1, int(works * (1 - MARGIN)))
    while works:
        yield from [batch] * VERIFIED_RUNS
        if batch == 1 or all(outcome == "ok" for _, outcome in outcomes[-VERIFIED_RUNS:]):
            break
        batch = max(1, min(batch - 1, int(batch * (1 - MARGIN))))
