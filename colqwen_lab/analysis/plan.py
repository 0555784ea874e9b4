"""A plan as a person meets it: predicted peaks, their breakdown, the cards, the limits of speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from colqwen_lab.analysis import render
from colqwen_lab.analysis.table import Results, limit_of, memory_of, peak
from colqwen_lab.hardware import OUTSIDE_TORCH_BYTES, Gpu, find_card, outside_bytes
from colqwen_lab.records import MIB, Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from colqwen_lab.predict.plan import CardPlan

UNEXPLAINED = "unexplained"
# The parts of a breakdown from the bottom up, by how their names begin. Older records name the
# vision encoder "vision tower".
PARTS = (
    *("embeddings", "text linears", "vision encoder", "vision tower", "mergers", "head"),
    *("text norms", "KV cache", "activations", "inputs", "outputs", "backend buffers"),
    *("kernel buffers", "cuBLAS workspace", "allocator rounding", UNEXPLAINED, "peak"),
    "outside torch",
)
CELL_COLUMNS = ["batch_size", "tokens", "weights_bytes", "peak_bytes", "reserved_bytes"]
CELL_COLUMNS += ["flops", "min_bytes"]


@dataclass(frozen=True, repr=False)
class Plan:
    """Predicted cells, and what each card holds."""

    results: Results
    cards: tuple[CardPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan ready for JSON; of several variants `{"plans": [...]}`."""
        plans = []
        for series in self.results.series():
            first = series.first
            cells = Results(series.cells).to_frame()[CELL_COLUMNS].astype(object)
            cells = cells.where(cells.notna(), None).to_dict("records")
            for row, cell in zip(cells, series.cells, strict=True):
                row["breakdown"] = memory_of(cell).breakdown
            plans.append(
                {
                    "variant": first.variant,
                    "size": first.size,
                    "protocol": first.protocol,
                    "kernel": first.backend.requested,
                    "device": first.environment.device,
                    "cells": cells,
                    "cards": [asdict(card) for card in self.cards if card.variant == first.variant],
                }
            )
        return plans[0] if len(plans) == 1 else {"plans": plans}

    def table(self) -> pd.DataFrame:
        """One row a cell: tokens, weights, peak, reserved memory, the work of a step."""
        raw = self.results.to_frame()
        table = raw[["variant", "batch_size", "tokens"]].rename(columns={"batch_size": "batch"})
        for name in ("weights", "peak", "reserved"):
            table[f"{name} MiB"] = raw[f"{name}_bytes"].map(render.in_mib)
        return render.screen(
            table.assign(**{"GFLOP a step": (raw["flops"] / 1e9).map(render.rounded)})
        )

    def card_table(self) -> pd.DataFrame:
        """One row a card and variant: does it fit, the largest batch, the predicted peak, headroom.

        Headroom is the usable memory less what torch must reserve and what lies outside it.
        """
        rows = [
            {
                "card": card.card,
                "usable MiB": render.in_mib(card.usable_bytes),
                "variant": card.variant,
                "verdict": card.verdict,
                "largest batch": card.batch_size,
                "with 5 % margin": card.safe_batch_size,
                "peak MiB": render.in_mib(card.peak_bytes),
                "must reserve MiB": render.in_mib(card.min_reserved_bytes or card.peak_bytes),
                "headroom": render.mib(card.headroom_bytes),
                "limited by": card.limited_by,
            }
            for card in self.cards
        ]
        return render.screen(rows)

    def rates(self, *names: str) -> pd.DataFrame:
        """The most items per second that each GPU allows: one row a cell, a column a GPU.

        By default the named GPUs among the plan's cards; empty without one. The limit is the larger
        of two times: all GEMM and attention operations at the dense 16-bit rate, and every weight
        read once at the bandwidth. It does not hold for 8-bit GEMMs.

        Raises:
            BadInput: a name that is no card.
        """
        cards = [find_card(name) for name in names or dict.fromkeys(c.card for c in self.cards)]
        gpus = {card.gpu.name: card.gpu for card in cards if card.gpu}
        table = self.results.to_frame()[["variant", "batch_size"] if gpus else []]
        columns = {
            name: [render.rounded(most_items_per_s(cell, gpu)) for cell in self.results]
            for name, gpu in gpus.items()
        }
        return table.rename(columns={"batch_size": "batch"}).assign(**columns)

    def plot(self, **options: Any) -> Figure:
        """Predicted peak memory over batch size, with card lines."""
        return self.results.plot("memory", **options)

    def __repr__(self) -> str:
        return "\n\n".join(render.text(table, 100) for table in self._tables)

    def _repr_html_(self) -> str:
        return "".join(map(render.html, self._tables))

    @property
    def _tables(self) -> list[pd.DataFrame]:
        return [
            table for table in (self.table(), self.card_table(), self.rates()) if len(table.columns)
        ]


def most_items_per_s(cell: Cell, gpu: Gpu) -> float:
    """The items per second that `gpu` allows at most: see `Plan.rates`."""
    assert cell.work is not None
    bytes_per_s = gpu.bandwidth_gb_s * 1e9
    return cell.batch_size / max(cell.work.flops / gpu.flops(), cell.work.min_bytes / bytes_per_s)


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
    def cells(self) -> Results:
        """The predicted cells."""
        return Results(tuple(twin for _, twin in self.pairs if twin))

    @property
    def results(self) -> Results:
        """The measured cells with the work and the memory breakdown of their prediction.

        `unexplained` is what the parts lack; below zero the prediction has too much.
        """
        cells = []
        for cell, twin in self.pairs:
            predicted = memory_of(twin).breakdown if twin else None
            parts = memory_of(cell).breakdown or predicted or {}
            rest = peak(cell) - sum(parts.values())
            parts = parts | ({UNEXPLAINED: rest} if rest else {})
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
            row |= {"predicted MiB": None, "error %": None}
            if twin:
                error = round(100 * (peak(twin) / peak(cell) - 1), 2)
                row |= {"predicted MiB": render.in_mib(peak(twin)), "error %": error}
            limit, origin = limit_of(cell, twin.work if twin else None)
            if cell.items_per_s and limit:
                items = cell.items_per_s.median
                row |= {"items/s": render.rounded(items), "limit items/s": render.rounded(limit)}
                row |= {"share of limit %": round(100 * items / limit, 1), "limit from": origin}
            rows.append(row | {"note": "" if twin else "this kernel's buffers are not modelled"})
        return render.screen(rows)

    def __repr__(self) -> str:
        return render.text(self.table(), 100)

    def _repr_html_(self) -> str:
        return render.html(self.table())


def breakdown_table(cells: Iterable[Cell]) -> pd.DataFrame:
    """The parts of each peak in MiB: one row a part, a column a cell.

    They add up to `peak`. On a GPU the process holds more outside torch; `on the card` is both.
    """
    columns = {}
    for cell in cells:
        memory = memory_of(cell)
        parts = memory.breakdown or {UNEXPLAINED: memory.peak_bytes}
        column = parts | {"peak": memory.peak_bytes}
        if cell.environment.gpu:
            outside = outside_bytes(memory)
            what, size = "measured", outside
            if size is None:
                what, size = "assumed", OUTSIDE_TORCH_BYTES[1]
            column |= {f"outside torch, {what}": size, "on the card": memory.peak_bytes + size}
        columns[f"{cell.variant} {cell.batch_size} ({cell.protocol})"] = column
    table = (pd.DataFrame(columns).fillna(0) / MIB).round(2)
    return table.loc[sorted(table.index, key=_rank)]


def _rank(part: str) -> int:
    return next((n for n, start in enumerate(PARTS) if part.startswith(start)), len(PARTS))
