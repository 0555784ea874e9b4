"""Several ways in one run, side by side: the overhead in each, what each change of way bought, and the A/A control."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from colqwen_lab.records import rate_of
from colqwen_lab.report.compare import Overhead, interval, overheads
from colqwen_lab.report.series import Results, Series

if TYPE_CHECKING:
    import pandas as pd


def way(series: Series) -> str:
    """EXECUTION/PROTOCOL/BACKEND, as a sweep takes it."""
    first = series.first
    return f"{first.execution}/{first.protocol}/{first.backend.requested}"


def overhead_table(results: Results) -> pd.DataFrame:
    """One row a batch, a column a way: the overhead against base in the same execution and protocol, and its verdict.

    `fp8` and the like are base's own ways, held against base without them.
    """
    import pandas as pd

    plain = {s.first.settings(): s for s in results.series() if s.variant == "base" and way(s).endswith("/auto")}
    columns = {
        f"{series.variant} {way(series)}": {row.batch_size: _said(row) for row in overheads(base, series)}
        for series in results.series()
        if (base := plain.get(series.first.settings())) and series is not base and series.label != base.label
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
        rates = {batch: (series.rated[batch].items_per_s, first.rated[batch].items_per_s) for batch in shared}
        columns[f"{series.variant} {way(series)}"] = {
            batch: round(now.median / then.median, 2) for batch, (now, then) in rates.items() if now and then
        }
    return pd.DataFrame(columns).sort_index().rename_axis("batch")


def controls(results: Results) -> pd.DataFrame:
    """One row a batch, a column a model that was timed twice: what the second is said to be against the first."""
    import pandas as pd

    columns = {
        f"{series.variant} {way(series)}": {row.batch_size: _said(row) for row in _against_itself(series)}
        for series in results.series()
        if any(cell.control_s for cell in series.cells)
    }
    return pd.DataFrame(columns).sort_index().rename_axis("batch").fillna("")


def _against_itself(series: Series) -> Iterator[Overhead]:
    twins = tuple(
        cell.model_copy(update={"step_s": cell.control_s, "items_per_s": rate_of(cell.control_s, cell.batch_size)})
        for cell in series.cells
        if cell.control_s
    )
    return overheads(series, Series(series.label, twins))


def _said(row: Overhead) -> str:
    return f"{row.overhead_percent:+.1f} {interval(row)} {row.verdict}"
