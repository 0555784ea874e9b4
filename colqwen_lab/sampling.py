"""Statistics of step times: batches of unlike cost, and the ranks of the median's interval."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence


def alike(step_s: Sequence[float], shapes: Sequence[int]) -> list[float]:
    """Step times as if every batch were an average one: their median is the rate of the whole set.

    `shapes` numbers the shape of each batch, in their order. The time of a shape is its median;
    steps that deviate from its mean show the noise. A few large batches that take most of the time
    count as fewer samples (Kish's effective sample size). With one sample a shape only the mean is
    left.
    """
    if len(set(shapes)) < 2:
        return list(step_s)
    times: dict[int, list[float]] = {}
    for seconds, shape in zip(step_s, itertools.cycle(shapes), strict=False):
        times.setdefault(shape, []).append(seconds)
    typical = {shape: statistics.median(own) for shape, own in times.items()}
    costs = [typical[shape] for shape in shapes if shape in typical]
    noise = sorted(
        (seconds / statistics.fmean(own)) ** math.sqrt(len(own) / (len(own) - 1))  # a fitted mean
        for own in times.values()
        if len(own) > 1
        for seconds in own
    )
    effective = len(step_s) * sum(costs) ** 2 / sum(cost**2 for cost in costs) / len(costs)
    count = min(len(noise), round(effective))
    kept = [noise[int((place + 0.5) * len(noise) / count)] for place in range(count)] or [1.0]
    scale = statistics.fmean(costs) / statistics.median(kept)
    return [scale * each for each in kept]


def interval_rank(n: int) -> int:
    """The rank from either end that bounds the median's 95 % interval; 0 if `n` are too few."""
    rank = max(0, n // 2 - 3 * math.isqrt(n))  # six deviations below the half
    tail = _half_binomial(n, rank)
    while rank < n and tail <= 0.025:
        rank += 1
        tail += _half_binomial(n, rank)
    return rank


def _half_binomial(n: int, k: int) -> float:
    """The chance of `k` heads in `n` throws, without the huge integers of math.comb."""
    return math.exp(
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    )
