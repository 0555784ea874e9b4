"""Two series at the same batch size: speed ratio with interval and verdict, and peaks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from colqwen_lab.analysis.table import Series, frame, rate
from colqwen_lab.records import Cell

#: Smaller differences in speed do not count, in percent: MLPerf's audit uses the same line.
SAME_PERCENT = 2.0
#: Fewer samples a side give no 95 % interval of a median.
RESAMPLES, FEWEST_SAMPLES, SEED = 2000, 6, 0
#: What both sides must share before a difference in speed is the variant's and not the machine's.
MACHINE = ("gpu", "driver", "cuda", "cpu", "threads", "power_limit_w", "torch")

# The columns of the tidy frame that a comparison keeps of each side.
KEPT = ["batch_size", "items_per_s", "peak_bytes", "status", "reason", "interference"]
KEPT += ["texts", "tokens", "dtype"]

Verdict = Literal["faster", "slower", "inconclusive"]


@dataclass(frozen=True)
class Speed:
    """Rates of two cells; `percent` is items_per_s / base - 1 with its 95 % interval.

    `reason` says why no verdict is possible; it is empty where the verdict rests on the figures.
    """

    batch_size: int
    base_items_per_s: float
    items_per_s: float
    percent: float
    low: float | None
    high: float | None
    verdict: Verdict
    reason: str


def speed_ratio(base: Cell, other: Cell) -> Speed:
    """The speed of `other` against `base`, item by item; their batch sizes may differ.

    No verdict where the machines differ or a cell was disturbed.
    """
    percent = 100 * (rate(other) / rate(base) - 1)
    machines = differences([base], [other])
    low, high = (None, None) if machines else _interval(base, other)
    notes = "; ".join(dict.fromkeys([*base.interference, *other.interference]))
    reason = "; ".join(machines) or (f"disturbed ({notes})" if notes else "")
    one_sided = low is None or high is None or low * high > 0
    verdict: Verdict = "inconclusive"
    if not reason and one_sided and abs(percent) >= SAME_PERCENT:
        verdict = "faster" if percent > 0 else "slower"
    return Speed(other.batch_size, rate(base), rate(other), percent, low, high, verdict, reason)


def _interval(base: Cell, other: Cell) -> tuple[float | None, float | None]:
    """The 95 % bootstrap interval in percent of the ratio of median step times."""
    samples = (base.step_s, other.step_s)
    if min(map(len, samples)) < FEWEST_SAMPLES:
        return None, None

    def percent(ours: Any, theirs: Any, axis: int) -> Any:
        steps = np.median(ours, axis=axis) / np.median(theirs, axis=axis)
        return 100 * (other.batch_size / base.batch_size * steps - 1)

    result = bootstrap(samples, percent, n_resamples=RESAMPLES, method="percentile", rng=SEED)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def speeds(base: Series, other: Series) -> tuple[Speed, ...]:
    """The speed of `other` against `base` at every batch size that both measured."""
    shared = sorted(base.rated.keys() & other.rated.keys())
    return tuple(speed_ratio(base.rated[batch], other.rated[batch]) for batch in shared)


def same_batch(base: Series, awq: Series, rows: Iterable[Speed]) -> pd.DataFrame:
    """One row a batch size of either side: figures as `base_...` and `awq_...`, speed and saving.

    `percent`, `low`, `high`, `verdict` and `reason` are those of `speed_ratio`; `saving_percent`
    is 1 - awq's peak / base's.
    """
    sides = []
    for side, series in (("base_", base), ("awq_", awq)):
        last_ok = {c.batch_size: c for c in sorted(series.cells, key=lambda c: c.status == "ok")}
        sides.append(frame(last_ok.values())[KEPT].set_index("batch_size").add_prefix(side))
    columns = [field.name for field in fields(Speed)]
    speed = pd.DataFrame(map(asdict, rows), columns=columns).set_index("batch_size").iloc[:, 2:]
    merged = sides[0].join(sides[1], how="outer").join(speed).reset_index()
    saving = 100 * (1 - merged["awq_peak_bytes"] / merged["base_peak_bytes"])
    return merged.assign(saving_percent=saving)


def differences(base: Iterable[Cell], other: Iterable[Cell]) -> list[str]:
    """What differs in machine, versions or origin; empty if the speeds may be compared."""
    sides = [[{"origin": c.origin} | dict(c.environment) for c in cells] for cells in (base, other)]
    differing = []
    for name in ("origin", *MACHINE):
        ours, theirs = (
            sorted({str("not recorded" if row[name] is None else row[name]) for row in side})
            for side in sides
        )
        if ours != theirs or len(ours) > 1:
            differing.append(f"{name} ({' and '.join(ours)} against {' and '.join(theirs)})")
    return differing
