"""What this GPU reaches, measured in the run that is held against it: a large 16-bit product and a large copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from colqwen_lab.records import GIB, Limits

SIDE = 8192
COPIED_BYTES = 4 * GIB
ROUNDS = 7


def measured_limits(device: torch.device) -> Limits:
    """Operations a second of an 8192 x 8192 x 8192 product in BF16 on random values, and bytes a second of a copy.

    The copy counts bytes read and bytes written.
    """
    return Limits(flops_per_s=_product_rate(device), bytes_per_s=_copy_rate(device))


def _product_rate(device: torch.device) -> float:
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * SIDE**3 / _seconds(lambda: torch.matmul(a, b))


def _copy_rate(device: torch.device) -> float:
    size = min(COPIED_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _seconds(lambda: target.copy_(source))


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[2:])
