"""Plans: the predicted cells of a variant, and the largest batch that each card holds, searched on the prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.hardware import Card, Fit, fit_of, need_bytes
from colqwen_lab.model.inputs import VISUAL_TOKENS
from colqwen_lab.predict.pages import page_predictor
from colqwen_lab.predict.predictor import A100, HOST, Predictor, Target, predictor
from colqwen_lab.records import Cell, Memory
from colqwen_lab.runtime.batches import WORKLOADS
from colqwen_lab.runtime.eager import PROTOCOLS
from colqwen_lab.runtime.fast import KINDS, bucket

SEARCHED_TO = 4096
# Near the edge a run may fail by how its memory lies; a sweep under a card's cap stays this share below it too.
MARGIN = 0.05


# The model of each kernel, by what stands in its name.
MODELLED = {
    "torch.nn.Linear": "tritonv2",
    "_linear_pointwise": "tritonv2",
    "tritonv2": "tritonv2",
    "auto_round:torch": "torch",
    "marlin": "fused",
    "humming": "fused",
    "few_rows": "fused",
    "dequantised ahead": "fused",
    "exllama": "fused",
    "_scaled_mm": "fp8",
    "_weight_int4pack_mm_for_cpu": "int4",
}


@dataclass(frozen=True)
class CardPlan:
    """What a variant does on a card. `binds` says what stops a larger batch; bytes are predicted.

    `batch_size` is the largest that goes through, `safe_batch_size` 5 % below it; `headroom_bytes` is what is usable
    less what torch must reserve and what lies outside it.
    """

    card: str
    nominal_bytes: int
    usable_bytes: int
    variant: str
    verdict: Fit
    batch_size: int | None
    safe_batch_size: int | None
    peak_bytes: int
    min_reserved_bytes: int | None
    headroom_bytes: int
    binds: str


class Planner:
    """Predicts one variant under one protocol, each batch size once."""

    def __init__(
        self,
        model: str,
        size: str,
        protocol: str,
        dtype: str,
        kernel: str,
        tokens: int | None = None,
        padded: bool = False,
        workload: str = "queries",
        visual_tokens: int = VISUAL_TOKENS,
        execution: str = "eager",
    ) -> None:
        self.protocol, self.tokens, self.padded = (
            one_of("protocol", protocol, PROTOCOLS),
            tokens,
            padded,
        )
        self.item = "page" if workload == "pages" else "query"
        if one_of("workload", workload, WORKLOADS) == "pages":
            if execution == "fast":
                raise BadInput("execution fast embeds queries; valid for pages: eager")
            self.predictor: Predictor = page_predictor(model, size, dtype, kernel, visual_tokens)
        elif visual_tokens != VISUAL_TOKENS:
            raise BadInput(
                f"visual_tokens are of workload pages, not {workload}; valid: workload pages"
            )
        else:
            self.predictor = predictor(model, size, dtype, kernel, execution)
        self._known: dict[tuple[int, Target, tuple[str, ...] | None], Cell] = {}

    def cell(
        self, batch_size: int, target: Target = A100, ahead: tuple[str, ...] | None = None
    ) -> Cell:
        key = batch_size, target, ahead
        if key not in self._known:
            made = self.predictor.cell(
                batch_size, self.protocol, target, self.tokens, self.padded, ahead
            )
            self._known[key] = made
        return self._known[key]

    def on_card(self, card: Card) -> CardPlan:
        """The largest batch that surely fits `card`, and the peak there; the smallest batch's where none does."""
        target = (
            Target(card.gpu.name, card.gpu.architecture.compute_capability) if card.gpu else A100
        )

        def memory(batch_size: int) -> Memory:
            found = self.cell(batch_size, target).memory
            assert found is not None
            return found

        verdict = fit_of(memory(1), card.nominal_bytes)
        if verdict != "fits":
            batch, binds = (1 if verdict == "tight" else None), f"weights and one {self.item}"
        else:
            batch = largest(
                lambda size: need_bytes(memory(size))[1], card.usable_bytes, SEARCHED_TO
            )
            binds = "memory" if batch < SEARCHED_TO else f"nothing up to batch {SEARCHED_TO}"
        there = memory(batch or 1)
        return CardPlan(
            card=card.name,
            nominal_bytes=card.nominal_bytes,
            usable_bytes=card.usable_bytes,
            variant=self.predictor.variant.name,
            verdict=verdict,
            batch_size=batch,
            safe_batch_size=max(1, int(batch * (1 - MARGIN)))
            if verdict == "fits" and batch
            else None,
            peak_bytes=there.peak_bytes,
            min_reserved_bytes=there.min_reserved_bytes,
            headroom_bytes=card.usable_bytes - need_bytes(there)[1],
            binds=binds,
        )


def largest(need: Callable[[int], int], budget: int, limit: int) -> int:
    """The largest number up to `limit` whose `need` is within `budget`, where that of 1 is; the next one's is not.

    What torch must reserve leaps a little with how memory lies, so a batch may fit where a smaller one does not: some
    within a tenth below are looked at, and the search goes on below the smallest that does not fit.
    """
    while True:
        found = _searched(need, budget, limit)
        near = [int(found * (1 - percent / 100)) for percent in range(10, 0, -2)]
        too_much = next((size for size in near if size and need(size) > budget), None)
        if too_much is None:
            return found
        limit = too_much


def _searched(need: Callable[[int], int], budget: int, limit: int) -> int:
    """Need grows almost evenly with the batch, so the search interpolates, and halves where that gains too little."""
    low, high = 1, limit
    low_need, high_need = need(low), need(high)
    if high_need <= budget:
        return limit
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (budget - low_need) / (high_need - low_need)
        guess = min(high - 1, max(low + 1, low + int((high - low) * share)))
        found, width = need(guess), high - low
        if found <= budget:
            low, low_need = guess, found
        else:
            high, high_need = guess, found
        halve = high - low > width / 2 and not halve
    return low


def plan(
    models: Sequence[str],
    size: str,
    batch_sizes: Iterable[int],
    cards: Sequence[Card],
    protocol: str = "lean",
    dtype: str = "bfloat16",
    kernel: str = "tritonv2",
    tokens: int | None = None,
    workload: str = "queries",
    visual_tokens: int = VISUAL_TOKENS,
    execution: str = "eager",
) -> tuple[list[Cell], list[CardPlan]]:
    """`(cells, cards)`: every model at every batch size on an A100, and its largest batch on every card.

    Raises:
        BadInput: an unknown model, protocol, dtype or kernel model, or a number of tokens below 1.
    """
    batches = list(batch_sizes)
    cells, plans = [], []
    for model in models:
        planner = Planner(
            model, size, protocol, dtype, kernel, tokens, False, workload, visual_tokens, execution
        )
        cells += [planner.cell(batch) for batch in batches]
        plans += [planner.on_card(card) for card in cards]
    return cells, plans


def predictions(cells: Iterable[Cell]) -> list[Cell | None]:
    """For each measured or published cell the predicted one under its settings; None where it is not modelled."""
    planners: dict[tuple[Any, ...], Planner] = {}

    def like(cell: Cell) -> Cell | None:
        kernel, work = kernel_model(cell), cell.workload
        if kernel is None or cell.memory is None:
            return None
        pages = work.kind == "pages"
        if pages and (work.padded_share != 0 or work.visual_tokens is None):
            return None  # pages of several sizes, or not recorded
        # The report's queries are known by their batch; others, and pages, by the length they were padded to.
        tokens = work.tokens if pages or (work.texts and work.texts.startswith("natural")) else None
        asked: tuple[Any, ...] = (
            cell.variant,
            cell.size,
            cell.protocol,
            cell.backend.dtype or "bfloat16",
            kernel,
        )
        asked += (
            tokens,
            tokens is not None and not pages,
            work.kind,
            work.visual_tokens or VISUAL_TOKENS,
            cell.execution,
        )
        if asked not in planners:
            try:
                planners[asked] = Planner(*asked)
            except BadInput:
                return None  # a folder or a repository: its network is not one of the named sizes
        capability = tuple(
            int(part) for part in (cell.environment.compute_capability or "8.0").split(".")
        )
        on_gpu = cell.environment.gpu is not None
        target = Target(cell.environment.device, (capability[0], capability[1])) if on_gpu else HOST
        made = planners[asked].cell(cell.batch_size, target, ahead_of(cell))
        return made.model_copy(
            update={"workload": made.workload.model_copy(update={"pages": work.pages})}
        )

    return [like(cell) for cell in cells]


def ahead_of(cell: Cell) -> tuple[str, ...]:
    """The products whose weights a measured run dequantised ahead."""
    rows = cell.batch_size * bucket(cell.workload.tokens or 1)
    chosen = cell.backend.kernel_configs.get(f"dequantised ahead x {rows}", "").split("+")
    return tuple(kind for kind in KINDS if kind in chosen)


def kernel_model(cell: Cell) -> str | None:
    """The model of the kernel that a cell ran on; None where there is none. The report ran the Triton fallback."""
    engaged = " ".join(cell.backend.engaged)
    if cell.origin == "published":
        return "tritonv2"
    return next((kernel for name, kernel in MODELLED.items() if name in engaged), None)
