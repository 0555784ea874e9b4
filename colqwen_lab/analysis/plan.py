"""A plan as a person meets it: predicted peaks, the ledger of their bytes, the cards, the limits of speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from colqwen_lab.analysis.compare import memory_of
from colqwen_lab.analysis.results import Results, conditions, eight_bit, in_mib, rounded
from colqwen_lab.hardware import OUTSIDE_TORCH_BYTES, Gpu, gpu_of, outside_bytes
from colqwen_lab.records import MIB, Cell, Work

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from colqwen_lab.predict.plan import CardPlan

UNEXPLAINED = "unexplained"
# Parts that belong together, in the order in which a bar stacks them.
GROUPS = {
    "embeddings": ("embeddings",),
    "text linears": ("text linears",),
    "vision tower and mergers": ("vision tower", "mergers"),
    "head, norms": ("head", "text norms"),
    "KV cache": ("KV cache",),
    "activations": ("activations", "inputs", "outputs"),
    "backend buffers": ("backend buffers",),
    "workspace and rounding": ("cuBLAS workspace", "allocator rounding"),
    "unexplained": (UNEXPLAINED,),
    "outside torch": ("outside torch",),
}


@dataclass(frozen=True, repr=False)
class Plan:
    """Predicted cells and what each card holds."""

    results: Results
    cards: tuple[CardPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """The contract's object, ready for JSON; of several variants, `{"plans": [...]}`, an object each."""
        plans = []
        for series in self.results.series():
            first = series.first
            plans.append(
                {
                    "variant": first.variant,
                    "size": first.size,
                    "protocol": first.protocol,
                    "kernel": first.backend.requested,
                    "device": first.environment.device,
                    "cells": [_cell_dict(cell) for cell in series.cells],
                    "cards": [asdict(card) for card in self.cards if card.variant == first.variant],
                }
            )
        return plans[0] if len(plans) == 1 else {"plans": plans}

    def table(self) -> pd.DataFrame:
        """One row a cell: tokens, weights, peak, what the allocator reserves, and the work of a step."""
        import pandas as pd

        rows = [
            {
                "variant": cell.variant,
                "batch": cell.batch_size,
                "tokens": cell.workload.tokens,
                "weights MiB": in_mib(memory_of(cell).weights_bytes),
                "peak MiB": in_mib(memory_of(cell).peak_bytes),
                "reserved MiB": in_mib(memory_of(cell).reserved_bytes),
                "GFLOP a step": rounded(cell.work.flops / 1e9) if cell.work else None,
            }
            for cell in self.results
        ]
        return pd.DataFrame(rows)

    def card_table(self) -> pd.DataFrame:
        """One row a card and variant: does it fit, the largest batch, the predicted peak, headroom, what binds.

        Headroom is what is usable less what torch must reserve (the peak and the free pieces between) and what is
        assumed outside it.
        """
        import pandas as pd

        rows = [
            {
                "card": card.card,
                "usable MiB": in_mib(card.usable_bytes),
                "variant": card.variant,
                "verdict": card.verdict,
                "largest batch": card.batch_size,
                "with 5 % margin": card.safe_batch_size,
                "peak MiB": in_mib(card.peak_bytes),
                "must reserve MiB": in_mib(card.min_reserved_bytes),
                "headroom MiB": in_mib(card.headroom_bytes),
                "binds": card.binds,
            }
            for card in self.cards
        ]
        return pd.DataFrame(rows).astype(
            {"largest batch": "Int64", "with 5 % margin": "Int64"} if rows else {}
        )

    def ceilings(self, gpus: Sequence[Gpu]) -> pd.DataFrame:
        """The most items per second that each GPU allows at each batch: one row a cell, a column a GPU.

        Counted: the operations of every matrix product and of causal attention over the dense 16-bit rate, and every
        weight it multiplies by, read once, and its result, over the bandwidth; the larger time is the limit. Products
        of 8 bits are not held by it.
        """
        import pandas as pd

        rows = [
            {"variant": cell.variant, "batch": cell.batch_size}
            | {gpu.name: rounded(ceiling(cell, gpu)) for gpu in gpus}
            for cell in self.results
        ]
        return pd.DataFrame(rows)

    def plot(self, **options: Any) -> Figure:
        """Predicted peak memory over batch size, with card lines."""
        return self.results.plot("memory", **options)

    def __repr__(self) -> str:
        lines = [
            f"{c.card}: {c.variant} {c.verdict}, largest batch {c.batch_size}" for c in self.cards
        ]
        return "\n".join([f"Plan of {len(self.results)} predicted cells", *lines])

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False) + self.card_table().to_html(index=False)


def _cell_dict(cell: Cell) -> dict[str, Any]:
    memory = memory_of(cell)
    work = {"flops": cell.work.flops, "min_bytes": cell.work.min_bytes} if cell.work else {}
    return {
        "batch_size": cell.batch_size,
        "tokens": cell.workload.tokens,
        "weights_bytes": memory.weights_bytes,
        "peak_bytes": memory.peak_bytes,
        "reserved_bytes": memory.reserved_bytes,
        **work,
        "breakdown": memory.breakdown,
    }


def ceiling(cell: Cell, gpu: Gpu) -> float | None:
    """Items per second at most: see `Plan.ceilings`."""
    if cell.work is None:
        return None
    seconds = max(cell.work.flops / gpu.flops(), cell.work.min_bytes / (gpu.bandwidth_gb_s * 1e9))
    return cell.batch_size / seconds


def limit_of(cell: Cell, work: Work | None) -> tuple[float | None, str]:
    """`(items per second at most, where the limit is from)`: the rates measured in the run, else the data sheet's.

    None for products of 8 bits, which neither holds, and where neither is known.
    """
    if work is None or eight_bit(cell):
        return None, ""
    if cell.limits:
        flops_per_s, bytes_per_s, origin = (
            cell.limits.flops_per_s,
            cell.limits.bytes_per_s,
            "measured in the run",
        )
    elif gpu := gpu_of(cell.environment.device, cell.environment.gpu_memory_bytes):
        flops_per_s, bytes_per_s, origin = gpu.flops(), gpu.bandwidth_gb_s * 1e9, "data sheet"
    else:
        return None, ""
    return cell.batch_size / max(work.flops / flops_per_s, work.min_bytes / bytes_per_s), origin


def explained(measured: Iterable[Cell], predicted: Iterable[Cell | None]) -> Results:
    """Measured cells, each with the work of its prediction, and its ledger where it has none of its own.

    What a ledger lacks is `unexplained`.

    An unexplained part below zero is what the prediction has too much.
    """
    cells = []
    for cell, twin in zip(measured, predicted, strict=True):
        if cell.memory is None:
            continue
        parts = cell.memory.breakdown or (memory_of(twin).breakdown if twin else None) or {}
        rest = cell.memory.peak_bytes - sum(parts.values())
        ledger = parts | ({UNEXPLAINED: rest} if rest else {})
        memory = cell.memory.model_copy(update={"breakdown": ledger})
        cells.append(
            cell.model_copy(
                update={"memory": memory, "work": cell.work or (twin.work if twin else None)}
            )
        )
    return Results(tuple(cells))


def _outside(cell: Cell) -> dict[str, int]:
    """The line of a ledger beyond the peak: measured on a GPU, else the assumption; nothing on a CPU."""
    if cell.environment.gpu is None:
        return {}
    found = outside_bytes(memory_of(cell))
    return (
        {"outside torch, assumed": OUTSIDE_TORCH_BYTES[1]}
        if found is None
        else {"outside torch, measured": found}
    )


def ledger_table(cells: Iterable[Cell]) -> pd.DataFrame:
    """The parts of each peak in MiB: one row a part, a column a cell.

    They add up to `peak`; on a GPU the process holds more outside torch, and `on the card` is both.
    """
    import pandas as pd

    columns = {}
    for cell in cells:
        memory, outside = memory_of(cell), _outside(cell)
        parts = memory.breakdown or {UNEXPLAINED: memory.peak_bytes}
        beyond = outside | (
            {"on the card": memory.peak_bytes + sum(outside.values())} if outside else {}
        )
        name = f"{cell.variant} {cell.batch_size} ({cell.protocol})"
        columns[name] = {
            part: size / MIB
            for part, size in (parts | {"peak": memory.peak_bytes} | beyond).items()
        }
    frame = pd.DataFrame(columns).fillna(0).round(2)
    return frame.loc[sorted(frame.index, key=_rank)]


def _rank(part: str) -> int:
    groups = [*list(GROUPS.values())[:-1], ("peak",), GROUPS["outside torch"]]
    return next((i for i, group in enumerate(groups) if part.startswith(group)), len(groups))


def ledger_plot(cells: Sequence[Cell]) -> Figure:
    """A stacked bar a cell: what its peak is made of, and what lies outside torch, in MiB."""
    from colqwen_lab.analysis import plots

    colours = [
        *(c for c, _ in plots.FIXED.values()),
        *(c for c, _ in plots.FREE),
        "#999999",
        "#882255",
        "#FFFFFF",
    ]
    figure, axes = plots.framed("What a peak is made of", conditions(cells))
    names = [f"{cell.variant} {cell.batch_size}\n{cell.protocol}" for cell in cells]
    base = [0.0] * len(names)
    for (group, starts), colour in zip(GROUPS.items(), colours, strict=False):
        parts = [(memory_of(cell).breakdown or {}) | _outside(cell) for cell in cells]
        sizes = [
            sum(size for part, size in one.items() if part.startswith(starts)) / MIB
            for one in parts
        ]
        if any(sizes):
            hatch = "///" if group == "outside torch" else None
            axes.bar(names, sizes, bottom=base, label=group, color=colour, width=0.6, hatch=hatch)
            base = [b + s for b, s in zip(base, sizes, strict=True)]
    axes.set_ylabel("memory, MiB")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def beside(measured: Iterable[Cell], predicted: Iterable[Cell | None]) -> pd.DataFrame:
    """Each measured or published row beside its prediction: the peak with its error, the rate with its limit.

    The limit is that of `Plan.ceilings` at the rates that the row's run measured, else at those of its GPU's data
    sheet; the work is that of the longest padded batch. Empty where the kernel is not modelled.
    """
    import pandas as pd

    rows = []
    for cell, twin in zip(measured, predicted, strict=True):
        if cell.memory is None:
            continue
        guess = memory_of(twin).peak_bytes if twin else None
        limit, limit_from = limit_of(cell, twin.work if twin else None)
        rate = cell.items_per_s.median if cell.items_per_s else None
        rows.append(
            {
                "variant": cell.variant,
                "batch": cell.batch_size,
                f"{cell.origin} MiB": in_mib(cell.memory.peak_bytes),
                "predicted MiB": in_mib(guess),
                "error %": None
                if guess is None
                else round(100 * (guess / cell.memory.peak_bytes - 1), 2),
                "items/s": rounded(rate),
                "limit items/s": rounded(limit),
                "share of limit %": round(100 * rate / limit, 1) if rate and limit else None,
                "limit from": limit_from,
                "note": "" if twin else "this kernel's buffers are not modelled",
            }
        )
    frame = pd.DataFrame(rows)
    speed = ["items/s", "limit items/s", "share of limit %", "limit from"]
    return frame if frame[speed[1:3]].notna().any(axis=None) else frame.drop(columns=speed)
