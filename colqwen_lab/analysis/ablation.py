"""Several configurations in one run: speed vs base in each, what each change gains, A/A controls.

The first configuration of a variant is the one to compare with; the best is the last one in
execution fast with 16-bit activations and kernel auto.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd

from colqwen_lab import analysis
from colqwen_lab.analysis.compare import speed_sentences
from colqwen_lab.analysis.render import interval, screen
from colqwen_lab.analysis.speed import Speed, speeds
from colqwen_lab.analysis.table import Pair, Results, Series, limit_of, rate
from colqwen_lab.errors import BadInput
from colqwen_lab.options import listed
from colqwen_lab.records import rate_of

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
    sizes = pd.Series([size for run in runs for size in {cell.batch_size for cell in run}])
    if sizes.duplicated().any():
        size = sizes[sizes.duplicated()].min()
        raise BadInput(f"batch {size} is in two of {files}; name runs of different batch sizes")
    return Results(tuple(cell for run in runs for cell in run))


def runs(results: Results) -> pd.DataFrame:
    """One row a run: its batch sizes, where and when."""
    table = results.to_frame().fillna({"started_at": "not recorded"})
    groups = table.groupby(["device", "started_at"], sort=False)["batch_size"]
    return groups.agg(lambda sizes: ", ".join(map(str, sorted({*sizes})))).reset_index(
        name="batches"
    )


def speed_table(results: Results) -> pd.DataFrame:
    """One row a batch, a column a configuration: speed vs base in the same execution and protocol.

    8-bit configurations of base compare with 16-bit base.
    """
    plain = {s.first.settings(): s for s in _plain(results, "base")}
    pairs = [(plain.get(series.first.settings()), series) for series in results.series()]
    return _columns({_name(s): (base, s) for base, s in pairs if base and base != s}, _percent)


def gains(results: Results) -> pd.DataFrame:
    """One row a batch, a column a configuration: its rate over that of the variant's first one."""
    firsts: dict[str, Series] = {}
    pairs = {_name(s): (firsts.setdefault(s.variant, s), s) for s in results.series()}
    return _columns(pairs, lambda speed: round(1 + speed.percent / 100, 2))


def ablation(results: Results) -> pd.DataFrame:
    """One row a batch, a column a change of configuration: how many times as fast it is.

    A single change, where two configurations differ in nothing else, and all changes together.
    `padded tokens, %` is the share of padding, the most that its absence could gain.
    """
    pairs: dict[str, Pair] = {}
    for variant in results.variants:
        plain = _plain(results, variant)
        for before, after in [(old, new) for n, new in enumerate(plain) for old in plain[:n]]:
            settings = before.to_dict(), after.to_dict()
            changed = [k for k, name in CHANGES.items() if settings[0][name] != settings[1][name]]
            if len(changed) == 1:
                pairs[_change(variant, changed[0], before, after)] = before, after
        if ends := _first_and_best(results, variant):
            pairs[_change(variant, "all", *ends)] = ends
    table = _columns(pairs, _times)
    padded = results.to_frame().groupby("batch_size")["padded_share"].max() * 100
    return table.assign(**{"padded tokens, %": padded.round(2)}) if len(table) else table


def shares(results: Results) -> pd.DataFrame:
    """One row a batch, a column a configuration: its rate in percent of the limit (`limit_of`).

    Needs cells with their work: `lab.predictions(results).results`. 8-bit has no measured limit.
    """
    columns = {}
    for series in results.series():
        limits = {batch: limit_of(cell, cell.work) for batch, cell in series.rated.items()}
        origin = " and ".join(sorted({source for limit, source in limits.values() if limit}))
        columns[f"{_name(series)} ({origin})"] = {
            batch: round(100 * rate(series.rated[batch]) / limit, 1)
            for batch, (limit, _) in limits.items()
            if limit
        }
    return _table({name: values for name, values in columns.items() if values})


def eight_bits(results: Results) -> pd.DataFrame:
    """One row a batch and 8-bit configuration: speed vs base's best, and cosine to 16 bits."""
    ends = _first_and_best(results, "base")
    rows = []
    for series in results.series():
        if ends is None or not series.first.configuration.eight_bit:
            continue
        for speed in speeds(ends[1], series):
            error = series.rated[speed.batch_size].difference
            row = {"batch": speed.batch_size, "configuration": _name(series)}
            row |= {"items/s": round(speed.items_per_s, 1)}
            row |= {"times base": round(1 + speed.percent / 100, 2), "verdict": speed.verdict}
            if error:
                row |= {"cosine, mean": round(error.cosine_mean, 4)}
                row |= {"cosine, min": round(error.cosine_min, 4), "against": error.against}
            rows.append(row)
    return screen(rows)


def controls(results: Results) -> pd.DataFrame:
    """One row a batch, a column a model that was timed twice: the second against the first."""
    return _columns(_twins(results), _percent)


def speed_plot(results: Results) -> Figure:
    """Speed vs base over batch size in the first and in the best configuration, with intervals.

    Raises:
        BadInput: the results lack two configurations of base and of another variant.
    """
    if not (lines := _speed_lines(results)):
        raise BadInput(
            "results must hold two configurations of base and of a quantised model; run "
            "`sweep -c report -c best`"
        )
    both = {name: speeds(*pair) for name, pair in lines.items()}
    return analysis.plots.speed_lines(results.series(), both)


def verdict(results: Results) -> str:
    """What the run shows, in a few sentences."""
    parts = []
    for name, pair in _speed_lines(results).items():
        variants = pair[0].variant, pair[1].variant
        sentences = [row.sentence for row in speed_sentences(*variants, speeds(*pair))]
        parts.append(f"In the {name}: {' '.join(sentences)}")
    for variant in results.variants:
        if ends := _first_and_best(results, variant):
            times = [1 + speed.percent / 100 for speed in speeds(*ends)]
            most = f"{min(times):.1f} to {max(times):.1f} times"
            parts.append(f"The best configuration of {variant} is {most} as fast as its first.")
    twins = [speed for pair in _twins(results).values() for speed in speeds(*pair)]
    if twins:
        same = sum(speed.verdict == "inconclusive" for speed in twins)
        parts.append(f"{same} of {len(twins)} A/A controls are inconclusive, as they should be.")
    return " ".join(parts) or "The run holds one configuration a variant."


# ---------------------------------------------------------------- which pairs


def _plain(results: Results, variant: str) -> list[Series]:
    own = [series for series in results.series() if series.variant == variant]
    return [series for series in own if not series.first.configuration.eight_bit]


def _first_and_best(results: Results, variant: str) -> Pair | None:
    """The variant's first configuration and its best with 16-bit activations; None without two."""
    plain = _plain(results, variant)
    fast = [s for s in plain if (s.first.execution, s.first.backend.requested) == ("fast", "auto")]
    return (plain[0], fast[-1]) if fast and fast[-1] is not plain[0] else None


def _speed_lines(results: Results) -> dict[str, Pair]:
    """The quantised model against base, in their first and in their best configurations."""
    variants = sorted(results.variants, key=lambda variant: variant != "base")[:2]
    ends = [pair for variant in variants if (pair := _first_and_best(results, variant))]
    if len(ends) < 2:
        return {}
    return {
        f"{which} configuration: {other.first.configuration.label}": (base, other)
        for which, base, other in zip(("first", "best"), ends[0], ends[1], strict=True)
    }


def _twins(results: Results) -> dict[str, Pair]:
    """Each series that was timed twice, with its second timing."""
    pairs = {}
    for series in results.series():
        cells = [cell for cell in series.cells if cell.control_s]
        again = tuple(
            cell.model_copy(
                update={
                    "step_s": cell.control_s,
                    "items_per_s": rate_of(cell.control_s, cell.batch_size),
                }
            )
            for cell in cells
        )
        if again:
            pairs[_name(series)] = series, Series(series.label, again)
    return pairs


# ---------------------------------------------------------------- how they are shown


def _columns(pairs: dict[str, Pair], show: Callable[[Speed], Any]) -> pd.DataFrame:
    """One row a batch, a column a pair: its speed as `show` has it."""
    return _table({name: {s.batch_size: show(s) for s in speeds(*p)} for name, p in pairs.items()})


def _table(columns: dict[str, dict[int, Any]]) -> pd.DataFrame:
    return screen(pd.DataFrame(columns).sort_index().rename_axis("batch"))


def _percent(speed: Speed) -> str:
    return f"{speed.percent:+.1f} {interval(speed.low, speed.high, sign='+')} {speed.verdict}"


def _times(speed: Speed) -> str:
    low, high = (end if end is None else 1 + end / 100 for end in (speed.low, speed.high))
    return f"{1 + speed.percent / 100:.2f} {interval(low, high, 2)}"


def _name(series: Series) -> str:
    return f"{series.variant} {series.first.configuration.label}"


def _change(variant: str, what: str, before: Series, after: Series) -> str:
    labels = before.first.configuration.label, after.first.configuration.label
    return f"{variant} {what}: {labels[0]} to {labels[1]}"
