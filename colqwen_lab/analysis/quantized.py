"""A quantised checkpoint as its record describes it: bytes, and the weight error of each linear."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.ticker import MaxNLocator

from colqwen_lab import analysis
from colqwen_lab.analysis import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Quantized:
    """A checkpoint folder, and the record of its quantisation."""

    folder: Path
    record: dict[str, Any]

    def errors(self) -> dict[tuple[int, str], float]:
        """The relative weight error ‖Δ‖ / ‖W‖ by (layer, linear)."""
        # Names are such as vlm.model.language_model.layers.3.self_attn.q_proj.
        parts = ((name.split("."), error) for name, error in self.record["relative_error"].items())
        return {(int(name[-3]), name[-1]): error for name, error in parts}

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
        errors = pd.Series(self.errors()).rename_axis(["layer", None])
        return errors.unstack(sort=False).sort_index().round(4)

    def plot(self) -> Figure:
        """The relative weight error by layer, one line a linear."""
        plots, table, recipe = analysis.plots, self.table(), self.record["recipe"]
        title = f"Weight error of {recipe['scheme']}, {recipe['iters']} iterations"
        figure, axes = plots.framed(title, f"quantised from {self.record['source']}")
        styles = [*plots.FIXED.values(), *plots.FREE]
        for linear, (colour, marker) in zip(table, styles, strict=True):
            axes.plot(table[linear], color=colour, marker=marker, label=linear, linewidth=1)
        axes.set(xlabel="layer of the language model", ylabel="relative weight error, ‖Δ‖ / ‖W‖")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return plots.legend(figure, axes)

    def __repr__(self) -> str:
        return f"{self.folder.name}\n{render.text(self.summary(), 100)}"

    def _repr_html_(self) -> str:
        return render.html(self.summary())
