"""Several ways in one run, side by side: the overhead in each, what each change of way bought, and the A/A control.

The first way of a variant is the one to hold others against (the report's); the best is the last with 16-bit
activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from colqwen_lab.analysis.compare import (
    Overhead,
    batches_of,
    by_verdict,
    interval,
    overheads,
    rate,
    span,
)
from colqwen_lab.analysis.plan import limit_of
from colqwen_lab.analysis.results import Results, Series, eight_bit, way
from colqwen_lab.errors import BadInput
from colqwen_lab.records import Cell, listed, rate_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def load(files: str) -> Results:
    """The cells of one run of several ways, or of several, "a.jsonl,b.jsonl", that share no batch size.

    Raises:
        BadInput: not records files, or a batch size that two runs hold: no run stands for another.
    """
    runs = [Results.load(file) for file in listed(files)]
    twice = [
        batch
        for batch, n in Counter(b for run in runs for b in {c.batch_size for c in run}).items()
        if n > 1
    ]
    if twice:
        raise BadInput(
            f"batch {min(twice)} stands in two of {files}; valid: runs of different batch sizes"
        )
    return Results(tuple(cell for run in runs for cell in run))


def runs(results: Results) -> pd.DataFrame:
    """One row a run: its batch sizes, where and when. A difference between batches of two runs may be the hour's."""
    import pandas as pd

    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in results:
        environment = cell.environment
        found.setdefault((environment.device, environment.started_at or "not recorded"), []).append(
            cell
        )
    rows = [
        {
            "batches": ", ".join(map(str, sorted({cell.batch_size for cell in cells}))),
            "ways": len(
                {
                    (cell.variant, cell.execution, cell.protocol, cell.backend.requested)
                    for cell in cells
                }
            ),
            "device": device,
            "started": started,
        }
        for (device, started), cells in found.items()
    ]
    return pd.DataFrame(rows)


def overhead_table(results: Results) -> pd.DataFrame:
    """One row a batch, a column a way: the overhead against base in the same execution and protocol, and its verdict.

    `fp8` and the like are base's own ways, held against base without them.
    """
    import pandas as pd

    plain = {
        s.first.settings(): s
        for s in results.series()
        if s.variant == "base" and not eight_bit(s.first)
    }
    columns = {
        f"{series.variant} {way(series)}": {
            row.batch_size: _said(row) for row in overheads(base, series)
        }
        for series in results.series()
        if (base := plain.get(series.first.settings()))
        and series is not base
        and series.label != base.label
    }
    return pd.DataFrame(columns).sort_index().rename_axis("batch").fillna("")


def gains(results: Results) -> pd.DataFrame:
    """One row a batch, a column a way: its rate over the same variant's in the first way of the run."""
    import pandas as pd

    firsts: dict[str, Series] = {}
    columns = {}
    for series in results.series():
        first = firsts.setdefault(series.variant, series)
        shared = series.rated.keys() & first.rated.keys()
        rates = {
            batch: (series.rated[batch].items_per_s, first.rated[batch].items_per_s)
            for batch in shared
        }
        columns[f"{series.variant} {way(series)}"] = {
            batch: round(now.median / then.median, 2)
            for batch, (now, then) in rates.items()
            if now and then
        }
    return pd.DataFrame(columns).sort_index().rename_axis("batch")


def _first_and_best(results: Results, variant: str) -> tuple[Series, Series] | None:
    """The variant's first way and its best one with 16-bit activations; None without two."""
    plain = [one for one in results.series() if one.variant == variant and not eight_bit(one.first)]
    best = [
        one
        for one in plain
        if one.first.execution == "fast" and one.first.backend.requested == "auto"
    ]
    return (plain[0], best[-1]) if best and best[-1] is not plain[0] else None


def ablation(results: Results) -> pd.DataFrame:
    """What each change of way buys a variant: one row a batch, its rate over that of the way it changes.

    Each change alone where a run has two ways that differ in it alone: the KV cache (protocol), the kernel, launches
    and mask (execution: `fast` keeps no KV cache, so it is held against `lean`), and all together, the best way against
    the first. `padded tokens %` is what a batch computes for nothing: left-padded, or in `fast`, whose buckets add none
    up to 31 tokens. Padding alone is no way of a run: leaving it out could gain that share at most.
    """
    import pandas as pd

    named = {"protocol": "KV cache", "backend": "kernel", "execution": "launches"}
    columns: dict[str, dict[int, str]] = {}
    for variant in results.variants:
        plain = [
            one for one in results.series() if one.variant == variant and not eight_bit(one.first)
        ]
        pairs = [(before, after) for n, after in enumerate(plain) for before in plain[:n]]
        for before, after in pairs:
            parts = zip(named, *(_parts(one) for one in (before, after)), strict=True)
            changed = [name for name, old, new in parts if old != new]
            if len(changed) == 1:
                columns[f"{variant} {named[changed[0]]}: {way(before)} to {way(after)}"] = _times(
                    before, after
                )
        if ends := _first_and_best(results, variant):
            columns[f"{variant} all: {way(ends[0])} to {way(ends[1])}"] = _times(*ends)
    padded = {
        cell.batch_size: round(100 * (cell.workload.padded_share or 0), 2) for cell in results
    }
    frame = pd.DataFrame(columns | ({"padded tokens %": padded} if columns else {}))
    return frame.sort_index().rename_axis("batch").fillna("")


def _parts(series: Series) -> tuple[str, str, str]:
    return series.first.protocol, series.first.backend.requested, series.first.execution


def _times(before: Series, after: Series) -> dict[int, str]:
    """How many times as fast `after` is, with its 95 % interval."""
    said = {}
    for row in overheads(before, after):
        ends = [end for end in (row.low, row.high) if end is not None]
        within = f" [{' to '.join(f'{1 + end / 100:.2f}' for end in ends)}]" if ends else ""
        said[row.batch_size] = f"{1 + row.overhead_percent / 100:.2f}{within}"
    return said


def shares(results: Results) -> pd.DataFrame:
    """One row a batch, a column a way: its rate in percent of the limit (`plan.limit_of`).

    Of cells that carry their work: `lab.explain(results)`. 8-bit products have a limit of their own that no run
    measured.
    """
    import pandas as pd

    columns = {}
    for series in results.series():
        limits = {batch: limit_of(cell, cell.work) for batch, cell in series.rated.items()}
        of_it = {
            b: round(100 * rate(series.rated[b]) / limit, 1)
            for b, (limit, _) in limits.items()
            if limit
        }
        if of_it:
            origin = " and ".join(sorted({origin for limit, origin in limits.values() if limit}))
            columns[f"{series.variant} {way(series)} ({origin})"] = of_it
    return pd.DataFrame(columns).sort_index().rename_axis("batch")


def eight_bits(results: Results) -> pd.DataFrame:
    """One row a batch and way with 8-bit activations: its rate over base's best, and its error on the same row."""
    import pandas as pd

    ends = _first_and_best(results, "base")
    rows = []
    for series in results.series():
        if ends and eight_bit(series.first):
            for row in overheads(ends[1], series):
                error = series.rated[row.batch_size].difference
                rows.append(
                    {
                        "batch": row.batch_size,
                        "way": f"{series.variant} {way(series)}",
                        "items/s": round(row.awq_items_per_s, 1),
                        f"times base {way(ends[1])}": round(1 + row.overhead_percent / 100, 2),
                        "verdict": row.verdict,
                        "cosine mean": round(error.cosine_mean, 4) if error else None,
                        "cosine least": round(error.cosine_min, 4) if error else None,
                        "against": error.against if error else "",
                    }
                )
    return pd.DataFrame(rows)


def _overhead_lines(results: Results) -> dict[str, list[Overhead]]:
    """Overheads of the quantised variant in its first and in its best way, against base's first and best."""
    quantised = [variant for variant in results.variants if variant != "base"]
    pairs = [
        ends for variant in ("base", *quantised[:1]) if (ends := _first_and_best(results, variant))
    ]
    if len(pairs) < 2:
        return {}
    return {
        f"{name}: {way(other)}": list(overheads(base, other))
        for name, base, other in zip(("first way", "best way"), *pairs, strict=True)
    }


def overhead_plot(results: Results) -> Figure:
    """The overhead over batch size in the first way and in the best, each with its 95 % interval.

    Raises:
        BadInput: the results hold no two ways of base and of another variant.
    """
    from colqwen_lab.analysis import plots

    lines = _overhead_lines(results)
    if not lines:
        raise BadInput(
            "no two ways of base and of a quantised model; valid: a run of `sweep --way report --way best`"
        )
    return plots.overhead_lines(results.series(), lines)


def verdict(results: Results) -> str:
    """What the run says, in sentences made of its figures."""
    said = []
    for name, rows in _overhead_lines(results).items():
        parts = [
            f"{what} at {batches_of(those)} ({span((row.overhead_percent for row in those), '+')} %)"
            for what, those in by_verdict(rows).items()
        ]
        said.append(f"The quantised model against base, {name}: {'; '.join(parts)}.")
    for variant in results.variants:
        if ends := _first_and_best(results, variant):
            times = [1 + row.overhead_percent / 100 for row in overheads(*ends)]
            said.append(
                f"{variant} gains {min(times):.1f} to {max(times):.1f} times from the first way to the best."
            )
    held = shares(results)
    for column in held.columns if len(held) else ():
        if "fast/lean/auto" in column:
            last = held[column].dropna()
            said.append(
                f"{column} reaches {last.max():.0f} % of the limit at batch {last.idxmax()}, its best."
            )
    eights = eight_bits(results)
    for name, rows in eights.groupby("way") if len(eights) else ():
        times = next(column for column in rows.columns if column.startswith("times base"))
        faster = rows[rows["verdict"] == "faster"]
        where = (
            f"faster than base at batch {', '.join(map(str, faster['batch']))}"
            if len(faster)
            else "nowhere faster"
        )
        low, high = rows[times].min(), rows[times].max()
        said.append(
            f"{name}, 8-bit activations: {low:.2f} to {high:.2f} times base, {where}; cosine to 16 bits "
            f"{rows['cosine mean'].min():.3f} on the mean, {rows['cosine least'].min():.3f} at the least."
        )
    timed_twice = [
        series for series in results.series() if any(cell.control_s for cell in series.cells)
    ]
    twins = [row for series in timed_twice for row in _against_itself(series)]
    if twins:
        same = sum(row.verdict == "cannot tell" for row in twins)
        said.append(f"Of {len(twins)} A/A controls {same} come out as not told apart.")
    return " ".join(said) or "No run of several ways."


def controls(results: Results) -> pd.DataFrame:
    """One row a batch, a column a model that was timed twice: what the second is said to be against the first."""
    import pandas as pd

    columns = {
        f"{series.variant} {way(series)}": {
            row.batch_size: _said(row) for row in _against_itself(series)
        }
        for series in results.series()
        if any(cell.control_s for cell in series.cells)
    }
    return pd.DataFrame(columns).sort_index().rename_axis("batch").fillna("")


def _against_itself(series: Series) -> Iterator[Overhead]:
    twins = tuple(
        cell.model_copy(
            update={
                "step_s": cell.control_s,
                "items_per_s": rate_of(cell.control_s, cell.batch_size),
            }
        )
        for cell in series.cells
        if cell.control_s
    )
    return overheads(series, Series(series.label, twins))


def _said(row: Overhead) -> str:
    return f"{row.overhead_percent:+.1f} {interval(row)} {row.verdict}"
