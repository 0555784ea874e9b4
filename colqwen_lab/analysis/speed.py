"""Two series at the same batch size: speed ratio with interval and verdict, peaks, sentences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from colqwen_lab.analysis.render import by_batch, interval, span
from colqwen_lab.analysis.table import Pair, Series, peak, rate, value
from colqwen_lab.records import Cell, alike

#: Smaller differences in speed do not count, in percent: MLPerf's audit uses the same line.
SAME_PERCENT = 2.0
#: Above it a speed is said in times, not in percent.
MANY_PERCENT = 300.0
#: Fewer samples a side give no 95 % interval of a median.
RESAMPLES, FEWEST_SAMPLES, SEED = 2000, 6, 0
MOST_SAMPLES = 10_000  # that are resampled at once: more would take gigabytes
#: What both sides must share before a difference in speed is the variant's: machine and workload.
MACHINE = ("gpu", "driver", "cuda", "cpu", "threads", "power_limit_w", "torch")
WORKLOAD = ("texts", "visual_tokens", "dtype")  # for pages, `texts` names the pages
SAME_BATCH = ("tokens", "distinct")  # these depend on the batch size too


class Speed(NamedTuple):
    """Rates of two cells; `percent` is items_per_s / base - 1 with its 95 % interval.

    The verdict is faster, slower or inconclusive. `reason` says why the figures allow none.
    """

    batch_size: int
    base_items_per_s: float
    items_per_s: float
    percent: float
    low: float | None
    high: float | None
    verdict: str
    reason: str

    @property
    def shown(self) -> str:
        """`-50.8 [-51.2 to -50.1]`."""
        return f"{self.percent:+.1f} {interval(self.low, self.high, sign='+')}".rstrip()

    @property
    def outcome(self) -> str:
        """The verdict, or `no verdict` where the figures allow none."""
        return "no verdict" if self.reason else self.verdict


class Recommendation(NamedTuple):
    """What to use (`base`, `awq` or `either`), and when."""

    use: str
    sentence: str


def speed_ratio(base: Cell, other: Cell) -> Speed:
    """The Speed of `other`: its items/s over base's, less 1, in percent; batch sizes may differ.

    No verdict where machines or workloads differ, or a cell was disturbed.
    """
    percent = 100 * (rate(other) / rate(base) - 1)
    differing = differences([base], [other])
    for name in SAME_BATCH if base.batch_size == other.batch_size else ():
        both = [getattr(cell.workload, name) for cell in (base, other)]
        if None not in both and both[0] != both[1]:
            differing.append(f"{name} ({both[0]} against {both[1]})")
    low, high = (None, None) if differing else _interval(base, other)
    notes = "; ".join(dict.fromkeys([*base.disturbed, *other.disturbed]))
    reason = "; ".join(differing) or (f"disturbed ({notes})" if notes else "")
    one_sided = low is None or high is None or low * high > 0
    verdict: str = "inconclusive"
    if not reason and one_sided and abs(percent) >= SAME_PERCENT:
        verdict = "faster" if percent > 0 else "slower"
    return Speed(other.batch_size, rate(base), rate(other), percent, low, high, verdict, reason)


def _interval(base: Cell, other: Cell) -> tuple[float | None, float | None]:
    """The interval in percent of the ratio of median step times."""
    samples = tuple(alike(cell.step_s, cell.workload.shapes) for cell in (base, other))
    if min(map(len, samples)) < FEWEST_SAMPLES:
        return None, None

    def percent(ours: Any, theirs: Any, axis: int) -> Any:
        steps = np.median(ours, axis=axis) / np.median(theirs, axis=axis)
        return 100 * (other.batch_size / base.batch_size * steps - 1)

    if max(map(len, samples)) <= MOST_SAMPLES:
        return bootstrapped(samples, percent)
    # The rank of a resample's median has a beta distribution.
    rng, halves = np.random.default_rng(SEED), [(len(each) + 1) / 2 for each in samples]
    ours, theirs = (
        np.quantile(each, rng.beta(half, half, RESAMPLES))[:, None]
        for each, half in zip(samples, halves, strict=True)
    )
    low, high = np.percentile(percent(ours, theirs, axis=1), [2.5, 97.5])
    return float(low), float(high)


def bootstrapped(samples: Sequence[Any], statistic: Callable[..., Any]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic of independent samples."""
    batch = math.ceil(RESAMPLES * min(1, MOST_SAMPLES / max(map(len, samples))))
    how: dict[str, Any] = {"method": "percentile", "batch": batch, "rng": SEED}
    low, high = bootstrap(samples, statistic, n_resamples=RESAMPLES, **how).confidence_interval
    return float(low), float(high)


def speeds(base: Series, other: Series) -> tuple[Speed, ...]:
    """The speed of `other` against `base` at every batch size that both measured."""
    shared = sorted(base.rated.keys() & other.rated.keys())
    return tuple(speed_ratio(base.rated[batch], other.rated[batch]) for batch in shared)


def speed_grid(
    columns: Mapping[str, Iterable[Speed]], show: Callable[[Speed], str]
) -> pd.DataFrame:
    """One row a batch, a column a name: every speed as `show` has it."""
    return by_batch({k: {row.batch_size: show(row) for row in rows} for k, rows in columns.items()})


def same_batch(pair: Pair, rows: Iterable[Speed]) -> pd.DataFrame:
    """One row a batch size of either side: the speed as in `Speed`, peaks, memory saved."""
    sides = zip(("base_peak_bytes", "awq_peak_bytes"), pair, strict=True)
    peaks = {side: {b: peak(cell) for b, cell in s.sized.items()} for side, s in sides}
    speed = pd.DataFrame(rows, columns=Speed._fields).set_index("batch_size")
    table = speed.join(pd.DataFrame(peaks, dtype=float), how="outer").rename_axis("batch_size")
    saving = 100 * (1 - table["awq_peak_bytes"] / table["base_peak_bytes"])
    table = table.rename(columns={"items_per_s": "awq_items_per_s"})
    return table.assign(saving_percent=saving).reset_index()


def differences(base: Iterable[Cell], other: Iterable[Cell]) -> list[str]:
    """What differs in origin, machine, versions or workload; empty if speeds may be compared."""
    # Only ok cells: others may not know their dtype.
    sides = [[cell for cell in cells if cell.status == "ok"] for cells in (base, other)]
    differing = []
    for name in ("origin", *MACHINE, *WORKLOAD):
        values = [{str(value(cell, name) or "not recorded") for cell in side} for side in sides]
        if len(values[0] | values[1]) > 1:
            both = " against ".join(" and ".join(sorted(side)) for side in values)
            differing.append(f"{name} ({both})")
    return differing


def speed_sentences(base: str, other: str, rows: Iterable[Speed]) -> list[Recommendation]:
    """A sentence for the batch sizes of each verdict."""
    groups = defaultdict[tuple[str, str], list[Speed]](list)
    for row in rows:
        groups[row.verdict, row.reason].append(row)
    return [
        recommend(group, base, other, f"at {batches(row.batch_size for row in group)}")
        for group in groups.values()
    ]


def recommend(rows: Sequence[Speed], base: str, other: str, where: str) -> Recommendation:
    """One Recommendation for speeds of one verdict; a single speed is given with its interval."""
    first, percents = rows[0], [row.percent for row in rows]
    signed = f"({span(percents, 1, '+')} %)"
    if first.reason:
        return Recommendation("either", f"No verdict {where} {signed}: {first.reason}.")
    if first.verdict == "inconclusive":
        return Recommendation("either", f"No significant difference {where} {signed}.")
    sizes = [abs(percent) for percent in percents]
    digits = int(min(sizes) < 10)
    says = f"{other} is {span(sizes, digits)} % {first.verdict} than {base}"
    if max(sizes) > MANY_PERCENT:
        says = f"{other} is {span((1 + p / 100 for p in percents), 1)} times as fast as {base}"
    elif len(rows) == 1 and first.low is not None and first.high is not None:
        says += f" [{span(map(abs, (first.low, first.high)), digits)}]"
    return Recommendation("awq" if first.verdict == "faster" else "base", f"{says} {where}.")


def batches(sizes: Iterable[int]) -> str:
    """`batch 8, 16 and 32`."""
    return "batch " + " and ".join(", ".join(map(str, sizes)).rsplit(", ", 1))
