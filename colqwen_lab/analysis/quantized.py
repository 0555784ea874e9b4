"""A quantised checkpoint as its record describes it: bytes, and the weight error of each linear."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.ticker import MaxNLocator

from colqwen_lab import analysis
from colqwen_lab.analysis import render
from colqwen_lab.records import MIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Quantized:
    """A checkpoint folder, and the record of its quantisation."""

    folder: Path
    record: dict[str, Any]

    def errors(self) -> dict[tuple[int, str], float]:
        """The relative weight error ‖Δ‖ / ‖W‖ by (layer, linear)."""
        errors = {}
        for name, error in self.record["relative_error"].items():
            *_, layer, _, linear = name.split(".")  # ...layers.3.self_attn.q_proj
            errors[int(layer), linear] = error
        return errors

    def summary(self) -> pd.DataFrame:
        """One row: scheme, tuning, linears, MiB before and after, saving, weight errors."""
        before, after = self.record["source_bytes"], self.record["result_bytes"]
        errors, recipe = pd.Series(self.errors()), self.record["recipe"]
        row = {
            "iterations": recipe["iters"],
            "linears": len(errors),
            "before MiB": render.in_mib(before),
            "after MiB": render.in_mib(after),
            "saving %": round(100 * (1 - after / before), 1),
            "mean error": round(errors.mean(), 3),
            "largest error": round(errors.max(), 3),
        }
        return pd.DataFrame([row], index=pd.Index([recipe["scheme"]], name="scheme"))

    def table(self) -> pd.DataFrame:
        """The relative weight error, one row a layer, one column a linear."""
        table = pd.Series(self.errors()).unstack()[list(LINEARS)]
        return table.round(4).rename_axis("layer")

    def plot(self) -> Figure:
        """The relative weight error by layer, one line a linear."""
        plots, table, recipe = analysis.plots, self.table(), self.record["recipe"]
        title = f"Weight error of {recipe['scheme']}, {recipe['iters']} iterations"
        figure, axes = plots.framed(title, f"quantised from {self.record['source']}")
        styles = [*plots.FIXED.values(), *plots.FREE]
        for linear, (colour, marker) in zip(LINEARS, styles, strict=True):
            axes.plot(table[linear], color=colour, marker=marker, label=linear, linewidth=1)
        axes.set_xlabel("layer of the language model")
        axes.set_ylabel("relative weight error, ‖Δ‖ / ‖W‖")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return plots.legend(figure, axes)

    def __repr__(self) -> str:
        before, after = (self.record[name] / MIB for name in ("source_bytes", "result_bytes"))
        scheme = self.record["recipe"]["scheme"]
        return f"Quantized({self.folder.name}: {scheme}, {before:.2f} -> {after:.2f} MiB)"

    def _repr_html_(self) -> str:
        return render.html(self.summary())
