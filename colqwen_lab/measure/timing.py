"""Step times: warm until steady, then each in turn, a synchronise after each step, every sample kept.

A turn is two steps on the same batch: one to lead in, thrown away, and one for the clock. So what ran just before a
timed step is the same model at the same work, and never a neighbour that left the GPU cool or throttled.

Inside the clock: the forward, and the synchronise. Outside: tokenisation, padding, the copy to the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from colqwen_lab.errors import BadInput
from colqwen_lab.records import Stages, rate_of


class Stepper(Protocol):
    """Embeds the next batch; to lead in, it embeds it and stays at it."""

    def __call__(self, lead_in: bool = False) -> None: ...


#: Times one step, led in by itself or not; the seconds.
Turn = Callable[[bool], float]

CLOCK = "forward + synchronise, led in by the same step"


@dataclass(frozen=True)
class StoppingRule:
    """When warming and timing stop.

    Warm-up ends when three steps are no more than `steady` faster than the three before, or after `max_warmup`.
    Timing takes at least `min_steps` and `min_s` seconds; then it stops when the 95 % interval of every median is
    within `precision` on both sides (converged), at `max_steps` (count) or at `max_s` (time).
    """

    max_warmup: int = 24
    steady: float = 0.05
    min_steps: int = 10
    max_steps: int = 200
    min_s: float = 0.3
    max_s: float = 3.0
    precision: float = 0.02

    def __post_init__(self) -> None:
        if self.min_steps < 1 or self.max_steps < self.min_steps or self.max_warmup < 0:
            raise BadInput(
                "steps; valid: max_warmup of 0 or more, min_steps of 1 or more, max_steps not below min_steps"
            )
        if not 0 <= self.min_s <= self.max_s:
            raise BadInput("seconds to time: valid are 0 <= min_s <= max_s")


@dataclass
class Samples:
    """What the clock saw of one stepper; `error` is set, and the samples end, where a step raised."""

    step_s: list[float] = field(default_factory=list)
    warmup_steps: int = 0
    steady: bool = False
    stopped: str = ""
    error: Exception | None = None


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Stepper, device: torch.device, lead_in: bool) -> float:
    """Seconds of a step and the synchronise after it; with `lead_in` after the same step, thrown away."""
    if lead_in:
        step(lead_in=True)
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def _warm_up(turn: Turn, patience: StoppingRule, samples: Samples) -> None:
    times: list[float] = []
    while len(times) < patience.max_warmup and not samples.steady:
        times.append(turn(False))
        samples.warmup_steps += 1
        if len(times) >= 6:
            before, now = statistics.median(times[-6:-3]), statistics.median(times[-3:])
            samples.steady = now >= (1 - patience.steady) * before


def time_interleaved(
    turns: Mapping[Any, Turn], patience: StoppingRule | None = None
) -> dict[Any, Samples]:
    """Samples of each, timed turn by turn, the order reversed every round, so that drift hits all."""
    patience = patience or StoppingRule()
    samples = {name: Samples() for name in turns}

    def attempt(name: Hashable, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # an outcome of this one, not of the others
            samples[name].error = error.with_traceback(None)

    for name, turn in turns.items():
        attempt(name, lambda turn=turn, name=name: _warm_up(turn, patience, samples[name]))  # type: ignore[misc]
    start = time.perf_counter()
    order = list(turns)
    while live := [name for name in order if samples[name].error is None]:
        for name in live:
            attempt(name, lambda name=name: samples[name].step_s.append(turns[name](True)))  # type: ignore[misc]
        order.reverse()
        stopped = _stop(
            [samples[name].step_s for name in live], time.perf_counter() - start, patience
        )
        if stopped:
            for name in live:
                samples[name].stopped = stopped
            break
    return samples


def _stop(all_times: list[list[float]], elapsed_s: float, patience: StoppingRule) -> str:
    """Why timing may stop now, or nothing."""
    count = min(map(len, all_times))
    if count < patience.min_steps or elapsed_s < patience.min_s:
        return "count" if count >= patience.max_steps else ""
    if all(_precise(times, patience.precision) for times in all_times):
        return "converged"
    if count >= patience.max_steps:
        return "count"
    return "time" if elapsed_s >= patience.max_s else ""


def _precise(times: list[float], precision: float) -> bool:
    rate = rate_of(times, 1)
    if rate.low is None or rate.high is None:
        return False
    return max(rate.high - rate.median, rate.median - rate.low) <= precision * rate.median


def time_towers(step: Stepper, vision: nn.Module, device: torch.device) -> Stages:
    """Seconds within the vision tower and in the rest of a step: medians of three steps.

    A synchronise before and after the tower parts them, which a timed step of a cell has not.
    """
    marks: list[float] = []

    def mark(*_: Any) -> None:
        synchronise(device)
        marks.append(time.perf_counter())

    hooks = [vision.register_forward_pre_hook(mark), vision.register_forward_hook(mark)]
    try:
        steps = [timed(step, device, lead_in=False) for _ in range(3)]
    finally:
        for hook in hooks:
            hook.remove()
    tower = [after - before for before, after in zip(marks[::2], marks[1::2], strict=True)]
    vision_encoder_s = statistics.median(tower)
    return Stages(
        vision_encoder_s=vision_encoder_s,
        language_model_s=statistics.median(s - t for s, t in zip(steps, tower, strict=True)),
    )
