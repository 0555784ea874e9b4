"""What quantising did, from its record: bytes, and each layer's weight error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colqwen_lab.analysis.results import html_table
from colqwen_lab.records import MIB

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Quantized:
    """A checkpoint folder and the record of its making."""

    folder: Path
    record: dict[str, Any]

    def errors(self) -> dict[tuple[int, str], float]:
        """Relative weight error by (layer, linear): the norm of the difference over that of the original."""
        found = {}
        for name, error in self.record["relative_error"].items():
            match = re.search(r"layers\.(\d+)\..*?(\w+_proj)$", name)
            if match:
                found[int(match[1]), match[2]] = error
        return found

    def summary(self) -> pd.DataFrame:
        """One row: scheme, tuning, layers, MiB before and after, saving, mean and largest weight error."""
        import pandas as pd

        before, after = self.record["source_bytes"], self.record["result_bytes"]
        errors = list(self.errors().values())
        recipe = self.record["recipe"]
        row = {
            "scheme": recipe["scheme"],
            "iterations": recipe["iters"],
            "linears": len(errors),
            "before MiB": round(before / MIB, 2),
            "after MiB": round(after / MIB, 2),
            "saving %": round(100 * (1 - after / before), 1),
            "mean error": round(sum(errors) / len(errors), 3),
            "largest error": round(max(errors), 3),
        }
        return pd.DataFrame([row]).set_index("scheme")

    def table(self) -> pd.DataFrame:
        """Relative weight error, a row a layer, a column a linear."""
        import pandas as pd

        errors = self.errors()
        layers = sorted({layer for layer, _ in errors})
        rows = [{linear: round(errors[layer, linear], 4) for linear in LINEARS} for layer in layers]
        return pd.DataFrame(rows, index=pd.Index(layers, name="layer"))

    def plot(self) -> Figure:
        """Relative weight error over the layers, a line a linear."""
        from matplotlib.ticker import MaxNLocator

        from colqwen_lab.analysis import plots

        table, recipe = self.table(), self.record["recipe"]
        figure = plots.Plot(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        styles = [*plots.FIXED.values(), *plots.FREE]
        for linear, (colour, marker) in zip(table.columns, styles, strict=True):
            axes.plot(
                table.index, table[linear], color=colour, marker=marker, label=linear, linewidth=1
            )
        axes.set_xlabel("layer of the text tower")
        axes.set_ylabel("relative weight error, ‖Δ‖ / ‖W‖")
        axes.set_ylim(0, 1.15 * table.to_numpy().max())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(
            f"{recipe['scheme']}, {recipe['iters']} iterations, of {self.record['source']}",
            fontsize=10,
        )
        axes.legend(ncols=2, fontsize=8)
        return figure

    def __repr__(self) -> str:
        before, after = self.record["source_bytes"], self.record["result_bytes"]
        recipe = self.record["recipe"]
        return f"Quantized({self.folder.name}: {recipe['scheme']}, {before / MIB:.2f} -> {after / MIB:.2f} MiB)"

    def _repr_html_(self) -> str:
        return html_table(self.summary().reset_index())
