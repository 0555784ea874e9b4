"""The clock, against a fake time in which each step takes what its script says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

from colqwen_lab.measure import timing
from colqwen_lab.measure.timing import Failure, StoppingRule, TimedStep, time_interleaved


class FakeTime:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.warm: list[bool] = []
        self.batches: list[int] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def stepper(self, name: str, durations: Iterable[float | Failure]) -> TimedStep:
        times = iter(durations)

        def step(batch: int, warm: bool) -> float | Failure:
            self.calls.append(name)
            self.warm.append(warm)
            self.batches.append(batch)
            answer = next(times)
            self.now += 0 if isinstance(answer, Failure) else answer
            return answer

        return step


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return FakeTime(monkeypatch)


def test_steady_steps_converge_at_the_least_count(fake: FakeTime) -> None:
    samples = time_interleaved({"a": fake.stepper("a", itertools.repeat(0.1))})["a"]
    assert len(samples.warmup_s) == 6
    assert samples.steady
    assert samples.stopped == "converged"
    assert samples.step_s == pytest.approx([0.1] * 10)


def test_warms_up_until_it_is_flat(fake: FakeTime) -> None:
    falling = [2**-n for n in range(8)]
    samples = time_interleaved({"a": fake.stepper("a", [*falling, *[falling[-1]] * 90])})["a"]
    assert samples.steady
    assert len(samples.warmup_s) >= 10
    assert max(samples.step_s) == falling[-1]


def test_a_time_that_never_settles_is_said_so(fake: FakeTime) -> None:
    falling = (0.9**n for n in itertools.count())
    samples = time_interleaved({"a": fake.stepper("a", falling)}, StoppingRule(max_warmup=12))["a"]
    assert len(samples.warmup_s) == 12
    assert not samples.steady


@pytest.mark.parametrize(
    ("stopping", "stopped", "count"),
    [
        (StoppingRule(max_s=1.5, min_s=0, min_steps=3), "time", 12),
        (StoppingRule(max_s=100, max_steps=20), "count", 20),
        (StoppingRule(min_steps=30, max_steps=30, min_s=0, max_s=0), "count", 30),
    ],
)
def test_noise_stops_by_time_or_by_count(
    fake: FakeTime, stopping: StoppingRule, stopped: str, count: int
) -> None:
    samples = time_interleaved({"a": fake.stepper("a", itertools.cycle([0.05, 0.2]))}, stopping)[
        "a"
    ]
    assert samples.stopped == stopped
    assert len(samples.step_s) == count


def test_a_minimum_time_holds_however_precise(fake: FakeTime) -> None:
    samples = time_interleaved(
        {"a": fake.stepper("a", itertools.repeat(0.001))}, StoppingRule(min_s=0.05)
    )["a"]
    assert sum(samples.step_s) >= 0.05 - 1e-9


def test_steps_are_interleaved_and_the_order_reversed(fake: FakeTime) -> None:
    steps = {name: fake.stepper(name, itertools.repeat(0.1)) for name in "ab"}
    samples = time_interleaved(steps)
    timed = "".join(fake.calls[len(samples["a"].warmup_s) + len(samples["b"].warmup_s) :])
    assert timed == "abba" * 5
    assert len(samples["a"].step_s) == len(samples["b"].step_s) == 10


def test_drift_hits_both(fake: FakeTime) -> None:
    slowing = (0.01 * 1.02**n for n in itertools.count())
    steps = {name: fake.stepper(name, slowing) for name in "ab"}
    samples = time_interleaved(steps, StoppingRule(max_warmup=6))
    assert sum(samples["a"].step_s) == pytest.approx(sum(samples["b"].step_s), rel=0.01)


@pytest.mark.parametrize("at", [0, 3, 8])
def test_one_step_s_failure_leaves_the_others(fake: FakeTime, at: int) -> None:
    failure = Failure("oom", "simulated")
    steps = {
        "bad": fake.stepper("bad", [*[0.1] * at, failure]),
        "good": fake.stepper("good", itertools.repeat(0.1)),
    }
    samples = time_interleaved(steps)
    assert samples["bad"].failure == failure
    assert samples["good"].failure is None
    assert len(samples["good"].step_s) == 10


def test_no_steppers() -> None:
    assert time_interleaved({}) == {}


def test_each_timed_step_is_warm(fake: FakeTime) -> None:
    time_interleaved({name: fake.stepper(name, itertools.repeat(0.1)) for name in "ab"})
    assert fake.warm == [False] * 12 + [True] * 20


@pytest.mark.parametrize("count", [2, 3])
def test_models_share_the_batch_of_a_round_and_all_batches_are_timed_equally_often(
    fake: FakeTime, count: int
) -> None:
    steps = {name: fake.stepper(name, itertools.repeat(0.1)) for name in "ab"}
    stopping = StoppingRule(max_warmup=1, min_steps=4, min_s=0)
    samples = time_interleaved(steps, stopping, list(range(count)))
    rounds = list(zip(fake.batches[2::2], fake.batches[3::2], strict=True))
    assert rounds == [(number, number) for number in range(count)] * 3
    assert len(samples["b"].step_s) == 3 * count
    first = set(zip(fake.batches[2::2], fake.calls[2::2], strict=True))
    assert len(first) == 2 * count, "each model is the first on each batch"


@pytest.mark.parametrize(
    ("shapes", "rule", "steps"),
    [
        (range(64), {}, 192),  # a fourth round would pass 200 steps
        (range(8), {"min_steps": 10, "max_steps": 10}, 10),  # a number of steps that was asked for
        (range(5), {"max_s": 0.0}, 15),
        (range(5), {"max_s": 0.0, "min_steps": 17}, 20),
        ([0] * 3 + [1] * 5, {"max_s": 0.0, "min_steps": 1}, 8),  # each shape three times a round
        ([0] * 2 + [1] * 5, {"max_s": 0.0, "min_steps": 1}, 14),
        ([0] * 7, {"max_s": 0.0, "min_steps": 1}, 7),
    ],
)
def test_timing_stops_after_a_round_of_all_batches(
    fake: FakeTime, shapes: Iterable[int], rule: dict[str, Any], steps: int
) -> None:
    noisy = {"a": fake.stepper("a", itertools.cycle([0.01, 0.02, 0.05, 0.07, 0.09, 0.13, 0.3]))}
    stopping = StoppingRule(max_warmup=1, **{"max_s": 1e9, "min_s": 0} | rule)
    samples = time_interleaved(noisy, stopping, list(shapes))["a"]
    assert len(samples.step_s) == steps
