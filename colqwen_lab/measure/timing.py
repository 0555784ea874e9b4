"""Step times: warm up until steady, then interleave the models step by step and keep every sample.

Every batch of a cell is timed equally often, and by all models in the same round. Each timed step
follows an untimed step of the same batch. So the work right before a timed step is always the same
model's, never a neighbour's that left the GPU cool or throttled. The timed part is the forward and
the device sync; tokenisation, padding and the copy to the device come before it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from typing import Any

import torch

from colqwen_lab.records import GIB, Limits, rate_of

CLOCK = "forward + device sync; an untimed forward of the same batch precedes it"
GEMM_SIDE = 8192
COPIED_BYTES = 4 * GIB
LIMIT_ROUNDS = 7
# The median of fewer samples of a shape follows one outlier.
SHAPE_STEPS = 3


@dataclass(frozen=True)
class Failure:
    """An attempt without a result: out of memory (oom) or failed, and the reason.

    `ended` is true where the attempt ended its worker process.
    """

    status: str
    reason: str
    ended: bool = False

    def call(self, *_: Any) -> Failure:
        """What a worker that could not load answers."""
        return self


# Seconds of a step of a batch by its number, and whether an untimed step of it precedes.
TimedStep = Callable[[int, bool], float | Failure]


@dataclass(frozen=True)
class StoppingRule:
    """When warm-up and timing stop.

    Warm-up ends when the last three steps are at most `steady` faster than the three before, or
    after `max_warmup` steps. Timing takes at least `min_steps` and `min_s` seconds, and each of
    several shapes three times. After a round of all batches it stops when the 95 % interval
    of every median is within `precision` on both sides (converged), when another round would pass
    `max_steps` (count), or at `max_s` (time).
    """

    max_warmup: int = 24
    steady: float = 0.05
    min_steps: int = 10
    max_steps: int = 200
    min_s: float = 0.3
    max_s: float = 3.0
    precision: float = 0.02

    def reason_to_stop(
        self, all_times: Sequence[list[float]], elapsed_s: float, shapes: Sequence[int] = (0,)
    ) -> str:
        """Why timing may stop now (converged, count or time), or an empty text."""
        steps, batches = min(map(len, all_times)), len(shapes)
        rarest = min(Counter(shapes).values()) if len(set(shapes)) > 1 else SHAPE_STEPS
        enough = steps >= max(self.min_steps, batches * math.ceil(SHAPE_STEPS / rarest))
        whole = steps % batches == 0
        long_enough = enough and whole and elapsed_s >= self.min_s
        if long_enough and all(self._precise(times, shapes) for times in all_times):
            return "converged"
        if steps >= self.max_steps or (enough and whole and steps + batches > self.max_steps):
            return "count"
        return "time" if long_enough and elapsed_s >= self.max_s else ""

    def _precise(self, times: list[float], shapes: Sequence[int]) -> bool:
        rate = rate_of(times, 1, shapes)
        low, high = rate.low or 0, rate.high or float("inf")
        return max(high - rate.median, rate.median - low) <= self.precision * rate.median


@dataclass
class Samples:
    """The step times of one model; after a `failure` there are no more."""

    step_s: list[float] = field(default_factory=list)
    warmup_s: list[float] = field(default_factory=list)
    steady: bool = False
    stopped: str = ""
    failure: Failure | None = None

    def add(self, answer: float | Failure, times: list[float]) -> None:
        """Keep the answer of a step, a time among `times`."""
        if isinstance(answer, Failure):
            self.failure = answer
        else:
            times.append(answer)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    steps: Mapping[Any, TimedStep],
    stopping: StoppingRule | None = None,
    shapes: Sequence[int] = (0,),
) -> dict[Any, Samples]:
    """A dict, name to Samples (seconds of each step): step functions, interleaved by batch.

    Steps alternate on a batch, and their order reverses every round and for every batch, so that
    drift reaches all alike. A failure ends the samples of one step function; the others go on.
    """
    stopping = stopping or StoppingRule()
    samples = {name: Samples() for name in steps}
    for name, own in samples.items():
        warm = own.warmup_s
        while len(warm) < stopping.max_warmup and not own.steady and not own.failure:
            own.add(steps[name](0, False), warm)
            own.steady = len(warm) >= 6 and (
                median(warm[-3:]) >= (1 - stopping.steady) * median(warm[-6:-3])
            )
    start = time.perf_counter()
    for turn in count():
        rounds, number = divmod(turn, len(shapes))
        live = [name for name in steps if not samples[name].failure]
        if not live:
            break
        if (turn + rounds * (len(shapes) % 2 == 0)) % 2:
            live.reverse()
        for name in live:
            samples[name].add(steps[name](number, True), samples[name].step_s)
        times = [samples[name].step_s for name in live]
        if stopped := stopping.reason_to_stop(times, time.perf_counter() - start, shapes):
            for name in live:
                samples[name].stopped = stopped
            break
    return samples


def measured_limits(device: torch.device) -> Limits:
    """What this GPU reaches now: FLOP/s of a large BF16 GEMM of random values, bytes/s of a copy.

    The copy counts bytes read and bytes written.
    """
    a, b = torch.randn(2, GEMM_SIDE, GEMM_SIDE, device=device, dtype=torch.bfloat16)
    size = min(COPIED_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source, target = torch.empty(2, size, dtype=torch.uint8, device=device)
    medians_s = []
    for work in (lambda: a @ b, lambda: target.copy_(source)):
        times = []
        for _ in range(LIMIT_ROUNDS + 2):  # the first two warm up
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        medians_s.append(median(times[2:]))
    gemm_s, copy_s = medians_s
    return Limits(flops_per_s=2 * GEMM_SIDE**3 / gemm_s, bytes_per_s=2 * size / copy_s)
