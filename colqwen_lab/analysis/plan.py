"""A plan as a person meets it: predicted peaks, their breakdown, the cards, the limits of speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from colqwen_lab.analysis import render
from colqwen_lab.analysis.table import (
    Results,
    limit_of,
    memory_of,
    on_screen,
    peak,
    rate,
    unit,
)
from colqwen_lab.hardware import OUTSIDE_TORCH_BYTES, find_card, outside_bytes
from colqwen_lab.records import MIB, Cell, Environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from colqwen_lab.predict.plan import CardPlan

UNEXPLAINED = "unexplained"
OUTSIDE = "outside torch"


@dataclass(frozen=True, repr=False)
class Plan:
    """Predicted cells, and what each card holds."""

    results: Results
    cards: tuple[CardPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan ready for JSON; of several variants `{"plans": [...]}`."""
        fields = {"weights_bytes", "peak_bytes", "reserved_bytes", "breakdown"}
        plans = [
            series.to_dict()
            | {
                "cells": [
                    {"batch_size": cell.batch_size, "tokens": cell.workload.tokens}
                    | memory_of(cell).model_dump(include=fields)
                    | (cell.work.model_dump() if cell.work else {})
                    for cell in series.cells
                ],
                "cards": [asdict(card) for card in self.cards if card.variant == series.variant],
            }
            for series in self.results.series()
        ]
        return plans[0] if len(plans) == 1 else {"plans": plans}

    def table(self) -> pd.DataFrame:
        """One row a cell: tokens, weights, peak, reserved memory, the work of a step."""
        names = ["variant", "batch_size", "tokens", "weights_bytes", "peak_bytes", "reserved_bytes"]
        return on_screen(self.results.to_frame(), [*names, "flops"])

    def card_table(self) -> pd.DataFrame:
        """One row a card and variant: does it fit, the largest batch, the predicted peak, headroom.

        Headroom is the usable memory less what torch must reserve and what lies outside it.
        """
        names = ["card", "variant", "verdict", "batch_size", "safe_batch_size"]
        names += ["peak_bytes", "headroom_bytes", "limited_by"]
        table = pd.DataFrame([asdict(card) for card in self.cards], columns=names)
        table["limited_by"] = table["limited_by"].str.removeprefix("limited by ")
        return on_screen(table, names).rename(columns={"batch": "largest batch"})

    def rates(self, *names: str) -> pd.DataFrame:
        """The most items per second that each GPU allows: one row a cell, a column a GPU.

        By default the named GPUs among the plan's cards; empty without one. See `limit_of`.
        """
        cards = [find_card(name) for name in names or [card.card for card in self.cards]]
        gpus = [card.gpu.name for card in cards if card.gpu]
        rows = []
        for cell in self.results if gpus else ():
            row = {"variant": cell.variant, "batch": cell.batch_size}
            for gpu in gpus:
                there = cell.model_copy(update={"environment": Environment(gpu=gpu)})
                rate = limit_of(there, cell.work)[0] or math.nan
                row[f"{gpu}, {unit(cell)} at most"] = render.rounded(rate)
            rows.append(row)
        return render.screen(rows)

    def plot(self, **options: Any) -> Figure:
        """Predicted peak memory over batch size, with card lines."""
        return self.results.plot("memory", **options)

    def __repr__(self) -> str:
        return "\n\n".join(render.text(table, 100) for table in self._tables)

    def _repr_html_(self) -> str:
        return "".join(map(render.html, self._tables))

    @property
    def _tables(self) -> list[pd.DataFrame]:
        tables = (self.table(), self.card_table(), self.rates())
        return [table for table in tables if not table.empty]


@dataclass(frozen=True, repr=False)
class Predictions:
    """Measured or published cells, each with its prediction; None where it cannot be predicted."""

    measured: Sequence[Cell]
    predicted: Sequence[Cell | None]

    @property
    def pairs(self) -> list[tuple[Cell, Cell | None]]:
        """The measured cells that have a peak, with their predictions."""
        both = zip(self.measured, self.predicted, strict=True)
        return [(cell, twin) for cell, twin in both if cell.memory]

    @property
    def results(self) -> Results:
        """The measured cells with the work and the memory breakdown of their prediction.

        `unexplained` is what the parts lack; below zero the prediction has too much.
        """
        cells = []
        for cell, twin in self.pairs:
            parts = memory_of(cell).breakdown or (twin and memory_of(twin).breakdown) or {}
            if rest := peak(cell) - sum(parts.values()):
                parts = parts | {UNEXPLAINED: rest}
            memory = memory_of(cell).model_copy(update={"breakdown": parts})
            work = cell.work or (twin.work if twin else None)
            cells.append(cell.model_copy(update={"memory": memory, "work": work}))
        return Results(tuple(cells))

    def table(self) -> pd.DataFrame:
        """One row a measured cell: its peak with the prediction's error, its rate with its limit.

        The limit is that of the rates measured in the same run, else of the GPU's data sheet.
        """
        rows = []
        for cell, twin in self.pairs:
            row = {"variant": cell.variant, "batch": cell.batch_size}
            row |= {f"{cell.origin} MiB": render.in_mib(peak(cell))}
            row |= {"predicted MiB": twin and render.in_mib(peak(twin))}
            row |= {"error %": twin and round(100 * (peak(twin) / peak(cell) - 1), 2)}
            limit, origin = limit_of(cell, twin.work if twin else None)
            if cell.items_per_s and limit:
                share = round(100 * rate(cell) / limit, 1)
                row |= {"items/s": render.rounded(rate(cell))}
                row |= {"limit items/s": render.rounded(limit), "share of limit %": share}
                row |= {"limit from": origin}
            rows.append(row | {"note": "" if twin else "this kernel's buffers are not modelled"})
        return render.screen(rows)

    def __repr__(self) -> str:
        return render.text(self.table(), 100)

    def _repr_html_(self) -> str:
        return render.html(self.table())


def breakdown_table(cells: Iterable[Cell]) -> pd.DataFrame:
    """The parts of each peak in MiB, the largest first: one row a part, a column a cell.

    They add up to `peak`. On a GPU the process holds more outside torch; `on the card` is both.
    """
    names, columns = [], []
    for cell in cells:
        memory = cell.memory
        parts = (memory and memory.breakdown) or {UNEXPLAINED: memory.peak_bytes if memory else 0}
        if memory and cell.environment.gpu:
            outside = outside_bytes(memory)
            assumed = {f"{OUTSIDE}, assumed": OUTSIDE_TORCH_BYTES[1]}
            parts = parts | (assumed if outside is None else {f"{OUTSIDE}, measured": outside})
        columns.append(parts)
        names.append(f"{cell.variant} {cell.batch_size} ({cell.execution}, {cell.protocol})")
    every = pd.DataFrame(columns, names).T.fillna(0) / MIB
    outside_torch = every.index.str.startswith(OUTSIDE)
    order = every[~outside_torch].max(axis=1).sort_values(ascending=False).index
    table = every.loc[order]
    table.loc["peak"] = table.sum().to_numpy()
    if outside_torch.any():
        table = pd.concat([table, every[outside_torch]])
        table.loc["on the card"] = every.sum().to_numpy()
    return table.round(2)
