"""Several configurations in one run: speed vs base in each, what each change gains, A/A controls.

The first configuration of a variant is the one to compare with; the best is the last one in
execution fast with 16-bit activations and kernel auto.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import TYPE_CHECKING

import pandas as pd

from colqwen_lab import analysis
from colqwen_lab.analysis.render import by_batch, interval, rounded, screen, span
from colqwen_lab.analysis.speed import Speed, speed_grid, speed_sentences, speeds
from colqwen_lab.analysis.table import Pair, Results, Series, few, limit_of, rate
from colqwen_lab.errors import BadInput
from colqwen_lab.options import listed
from colqwen_lab.records import Cell, rate_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What changes between two configurations, and the setting that holds it.
CHANGES = {"KV cache": "protocol", "kernel": "kernel", "launches": "execution"}


def load(files: str) -> Results:
    """The cells of runs of several configurations, "a.jsonl,b.jsonl".

    Raises:
        BadInput: not records files, or a batch size that two of them hold.
    """
    runs = [Results.load(file) for file in listed(files)]
    sizes = Counter(size for run in runs for size in {cell.batch_size for cell in run})
    if repeated := [size for size, count in sizes.items() if count > 1]:
        twice = f"batch {min(repeated)} is in two of {files}"
        raise BadInput(f"{twice}; name runs of different batch sizes")
    results = Results(tuple(cell for run in runs for cell in run))
    few(results.series())
    return results


def runs(results: Results) -> pd.DataFrame:
    """One row a run: where, when, and its batch sizes."""
    table = results.to_frame().fillna({"started_at": "not recorded"})
    sizes = table.groupby(["device", "started_at"], sort=False)["batch_size"].unique()
    return sizes.map(lambda sizes: ", ".join(map(str, sorted(sizes)))).reset_index()


def speed_table(results: Results) -> pd.DataFrame:
    """One row a batch, a column a configuration: speed vs base in the same execution and protocol.

    8-bit configurations of base compare with 16-bit base.
    """
    every = results.series()
    plain = {s.first.settings(): s for s in _sixteen_bit(every) if s.variant == "base"}
    pairs = {_name(s): (plain.get(s.first.settings(), s), s) for s in every}
    return _grid({name: pair for name, pair in pairs.items() if pair[0] is not pair[1]}, _percent)


def ablation(results: Results) -> pd.DataFrame:
    """A table of texts such as `1.83 [1.70 to 1.90]`: the rate after a change over that before.

    One row a batch, a column a change: a single one, where two configurations differ in nothing
    else, and all changes together. `padded tokens, %` is the share of padding, the most that its
    absence could gain.
    """
    pairs = {_change("all", pair): pair for pair in _first_and_best(results).values()}
    for pair in combinations(_sixteen_bit(results.series()), 2):
        both = [series.first.configuration for series in pair]
        changed = [k for k, name in CHANGES.items() if len({getattr(c, name) for c in both}) > 1]
        if both[0].variant == both[1].variant and len(changed) == 1:
            pairs[_change(changed[0], pair)] = pair
    table = _grid(pairs, _times)
    padded = results.to_frame().groupby("batch_size")["padded_share"].max() * 100
    return table.assign(**{"padded tokens, %": padded.round(2)}) if len(table) else table


def shares(results: Results) -> pd.DataFrame:
    """One row a batch, a column a configuration: its rate in percent of the limit (`limit_of`).

    Needs cells with their work: `lab.predictions(results).results`. 8-bit has no measured limit.
    """
    columns = defaultdict[str, dict[int, float]](dict)
    for series in results.series():
        for batch, cell in series.rated.items():
            limit, origin = limit_of(cell, cell.work)
            if limit:
                columns[f"{_name(series)} ({origin})"][batch] = round(100 * rate(cell) / limit, 1)
    return by_batch(columns)


def eight_bits(results: Results) -> pd.DataFrame:
    """One row a batch and 8-bit configuration: its rate, and the cosine to 16-bit activations."""
    rows = [
        {"batch": cell.batch_size, "configuration": _name(series), "items/s": rounded(rate(cell))}
        | cell.difference.model_dump()
        for series in results.series()
        for cell in series.rated.values()
        if cell.difference
    ]
    return screen(pd.DataFrame(rows).round(4))


def controls(results: Results) -> pd.DataFrame:
    """A table of texts: the second timing of a model against its first in %, one row a batch."""
    return _grid(_twins(results), _percent)


def speed_plot(results: Results) -> Figure:
    """Speed vs base over batch size in the first and in the best configuration, with intervals.

    Raises:
        BadInput: the results lack two configurations of base and of another variant.
    """
    lines = {name: speeds(*pair) for name, pair in _speed_lines(results).items()}
    if not lines:
        raise BadInput(
            "results must hold two configurations of base and of a quantised model; run "
            "a sweep with configuration report,best"
        )
    return analysis.plots.speed_lines(results.series(), lines)


def verdict(results: Results) -> str:
    """What the run shows, in a few sentences."""
    parts = []
    for name, (base, other) in _speed_lines(results).items():
        rows = speed_sentences(base.variant, other.variant, speeds(base, other))
        parts.append(f"In the {name}: {' '.join(row.sentence for row in rows)}")
    for variant, pair in _first_and_best(results).items():
        times = span((1 + speed.percent / 100 for speed in speeds(*pair)), 1)
        parts.append(f"The best configuration of {variant} is {times} times as fast as its first.")
    twins = [speed.verdict for pair in _twins(results).values() for speed in speeds(*pair)]
    if twins:
        same = twins.count("inconclusive")
        parts.append(f"{same} of {len(twins)} A/A controls are inconclusive, as they should be.")
    return " ".join(parts) or "The run holds one configuration a variant."


def _sixteen_bit(every: Iterable[Series]) -> list[Series]:
    return [series for series in every if not series.first.configuration.eight_bit]


def _first_and_best(results: Results) -> dict[str, Pair]:
    """The first and the best 16-bit configuration of each variant that has both."""
    ends: dict[str, Pair] = {}
    for series in _sixteen_bit(results.series()):
        first, best = ends.get(series.variant, (series, series))
        fast = (series.first.execution, series.first.backend.requested) == ("fast", "auto")
        ends[series.variant] = first, series if fast else best
    return {variant: pair for variant, pair in ends.items() if pair[0] is not pair[1]}


def _speed_lines(results: Results) -> dict[str, Pair]:
    """The quantised model against base, in their first and in their best configurations."""
    ends = _first_and_best(results)
    base, other = ends.pop("base", ()), next(iter(ends.values()), ())
    return {
        f"{which} configuration: {awq.first.configuration.label}": (ours, awq)
        for which, ours, awq in zip(("first", "best"), base, other, strict=False)
    }


def _twins(results: Results) -> dict[str, Pair]:
    """Each series that was timed twice, with its second timing."""
    again = {
        s: tuple(_second(cell) for cell in s.cells if cell.control_s) for s in results.series()
    }
    return {_name(s): (s, Series(s.label, cells)) for s, cells in again.items() if cells}


def _second(cell: Cell) -> Cell:
    rate = rate_of(cell.control_s, cell.batch_size, cell.workload.shapes)
    return cell.model_copy(update={"items_per_s": rate, "step_s": cell.control_s})


def _grid(pairs: dict[str, Pair], show: Callable[[Speed], str]) -> pd.DataFrame:
    return speed_grid({name: speeds(*pair) for name, pair in pairs.items()}, show)


def _percent(speed: Speed) -> str:
    return f"{speed.shown} {speed.verdict}"


def _times(speed: Speed) -> str:
    low, high = (end if end is None else 1 + end / 100 for end in (speed.low, speed.high))
    return f"{1 + speed.percent / 100:.2f} {interval(low, high, 2)}"


def _name(series: Series) -> str:
    return f"{series.variant} {series.first.configuration.label}"


def _change(what: str, pair: Pair) -> str:
    before, after = (series.first.configuration for series in pair)
    return f"{before.variant} {what}: {before.label} to {after.label}"
