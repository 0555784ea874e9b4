"""Plans: predicted cells, and the largest batch under the memory of each card."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from colqwen_lab.errors import BadInput, LabError
from colqwen_lab.hardware import Card, Fit, fit_of, need_bytes
from colqwen_lab.model.checkpoint import FolderCheckpoint
from colqwen_lab.model.config import Variant, resolve_variant, scheme_parts
from colqwen_lab.model.inputs import VISUAL_TOKENS
from colqwen_lab.model.network import is_text_linear
from colqwen_lab.options import WORKLOADS, PlanOptions
from colqwen_lab.predict.kernels import recorded_kernel, recorded_prefetch
from colqwen_lab.predict.predictor import Setup, predict
from colqwen_lab.records import MIB, Cell, Memory, Quantization

A100 = "NVIDIA A100-SXM4-40GB"
LARGEST_SEARCHED = 4096
# Fragmentation may fail a run near the edge; a sweep under a card's cap stays this share below too.
MARGIN = 0.05


@dataclass(frozen=True)
class CardPlan:
    """The largest batch of a variant on a card; bytes are predicted.

    `safe_batch_size` is 5 % below `batch_size`. `headroom_bytes` are the usable bytes less those
    that torch must reserve and those outside torch. `limited_by` says why no larger batch runs.
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
    limited_by: str


def plan(
    options: PlanOptions, progress: Callable[[str], None] = lambda line: None
) -> tuple[list[Cell], list[CardPlan]]:
    """`(cells, cards)`: every model at every batch size on an A100, and its largest batch per card.

    `progress` gets a line for each model before it is traced.

    Raises:
        BadInput: an unknown model, card or kernel, or a combination that cannot run.
    """
    cells, cards = [], []
    for model in options.models:
        variant, setup = _setup_of(model, options)
        progress(f"predicting {variant}: size {setup.size}, {setup.workload}, {setup.execution}")
        batch_sizes = options.batch_sizes or WORKLOADS[options.workload].batch_sizes
        cells += [_named(predict(setup, batch), variant, A100) for batch in batch_sizes]
        cards += [largest_on(card, setup, variant) for card in options.memory_budgets]
    return cells, cards


def _setup_of(model: str, options: PlanOptions) -> tuple[str, Setup]:
    """`(variant, setup)` of a name or a folder; only the configuration of a folder is read."""
    variant = resolve_variant(model)
    size, quantization = options.size, quantization_of(variant)
    if variant.folder:
        checkpoint = FolderCheckpoint(variant.folder)
        size = checkpoint.size
        quantization = _folder_quantization(checkpoint, variant.name)
    setup = Setup(
        size=size,
        quantization=quantization,
        kernel=options.kernel,
        dtype=options.dtype,
        execution=options.execution,
        protocol=options.protocol,
        workload=options.workload,
        tokens=options.tokens or None,
        visual_tokens=options.visual_tokens,
    )
    return variant.name, setup


def quantization_of(variant: Variant) -> Quantization | None:
    """The quantisation that a variant's name stands for; None is 16-bit weights.

    Raises:
        BadInput: a hub repository, whose name does not tell.
    """
    if "any" in variant.hub:
        valid = "base, awq, a scheme such as W8A16, or a folder"
        raise BadInput(f"a prediction needs {valid}, got hub id {variant.name}; download it first")
    if variant.scheme is None:
        return None
    bits, group_size = scheme_parts(variant.scheme)
    return Quantization(bits=bits, group_size=group_size, sym=True)


def _folder_quantization(checkpoint: FolderCheckpoint, name: str) -> Quantization | None:
    raw = checkpoint.quantization
    if raw is None:
        return None
    if any(file.endswith(".weight") and is_text_linear(file[:-7]) for file in checkpoint.files):
        raise BadInput(f"{name} keeps some text linears at 16 bits; such a mix is not predicted")
    try:
        sym = raw.get("sym", not raw.get("zero_point", False))
        return Quantization(bits=raw["bits"], group_size=raw["group_size"], sym=sym)
    except (KeyError, ValueError):
        raise BadInput(f"quantization_config of {name} has no bits and group_size") from None


def _named(cell: Cell, variant: str, gpu: str | None) -> Cell:
    environment = cell.environment.model_copy(update={"gpu": gpu})
    return cell.model_copy(update={"variant": variant, "environment": environment})


def largest_on(card: Card, setup: Setup, variant: str) -> CardPlan:
    """The largest batch that surely fits `card`, and its memory; that of batch 1 if none fits."""
    if card.gpu:
        setup = replace(setup, capability=card.gpu.architecture.compute_capability[0])

    def memory(batch_size: int) -> Memory:
        predicted = predict(setup, batch_size).memory
        assert predicted is not None
        return predicted

    def need(batch_size: int) -> int:
        return need_bytes(memory(batch_size))[1]

    verdict = fit_of(memory(1), card.nominal_bytes)
    item = "page" if setup.workload == "pages" else "query"
    short = f"{-((card.usable_bytes - need(1)) // MIB):,} MiB"
    batch: int | None = None
    if verdict == "does not fit":
        limited_by = f"weights and one {item} do not fit: short by {short}"
    elif verdict == "tight":
        batch, limited_by = 1, f"weights and one {item} may not fit: short by up to {short}"
    else:
        batch = largest(need, card.usable_bytes, LARGEST_SEARCHED)
        reached = batch == LARGEST_SEARCHED
        limited_by = f"no limit up to batch {batch:,}" if reached else "limited by memory"
    return CardPlan(
        card=card.name,
        nominal_bytes=card.nominal_bytes,
        usable_bytes=card.usable_bytes,
        variant=variant,
        verdict=verdict,
        batch_size=batch,
        safe_batch_size=max(1, int(batch * (1 - MARGIN))) if verdict == "fits" and batch else None,
        peak_bytes=memory(batch or 1).peak_bytes,
        min_reserved_bytes=memory(batch or 1).min_reserved_bytes,
        headroom_bytes=card.usable_bytes - need(batch or 1),
        limited_by=limited_by,
    )


def largest(need: Callable[[int], int], budget: int, limit: int) -> int:
    """The largest number up to `limit` whose `need` is within `budget`, given that of 1 is.

    The reserved memory is not monotonic in the batch size, because of fragmentation. So some sizes
    up to a tenth below the edge are checked, and the search goes on below the first that fails.
    """
    while True:
        edge = _edge(need, budget, limit)
        near = [int(edge * (1 - percent / 100)) for percent in range(10, 0, -2)]
        failing = next((size for size in near if size and need(size) > budget), None)
        if failing is None:
            return edge
        limit = failing


def _edge(need: Callable[[int], int], budget: int, limit: int) -> int:
    """A number within `budget` whose next is not: interpolation, or halving where it gains little."""
    low, high = 1, limit
    low_need, high_need = need(low), need(high)
    if high_need <= budget:
        return limit
    halve = False
    while high - low > 1:
        width = high - low
        share = 0.5 if halve else (budget - low_need) / (high_need - low_need)
        guess = min(high - 1, max(low + 1, low + int(width * share)))
        needed = need(guess)
        if needed <= budget:
            low, low_need = guess, needed
        else:
            high, high_need = guess, needed
        halve = high - low > width / 2 and not halve
    return low


def predictions(cells: Iterable[Cell]) -> list[Cell | None]:
    """The predicted cell for each measured or published one; None where it is not modelled."""
    return [_prediction(cell) for cell in cells]


def _prediction(cell: Cell) -> Cell | None:
    kernel, work, environment = recorded_kernel(cell), cell.workload, cell.environment
    pages = work.kind == "pages"
    several_sizes = pages and (work.padded_share != 0 or work.visual_tokens is None)
    if kernel is None or cell.memory is None or several_sizes:
        return None
    # The report's queries follow from the batch; other items have the length of the record.
    tokens = work.tokens if pages or (work.texts or "").startswith("natural") else None
    capability = int((environment.compute_capability or "8").split(".")[0])
    try:
        quantization = cell.quantization
        if quantization is None and kernel not in ("", "fp8"):
            quantization = quantization_of(resolve_variant(cell.variant))
        setup = Setup(
            size=cell.size,
            quantization=quantization,
            kernel=kernel or "tritonv2",
            dtype=cell.backend.dtype or "bfloat16",
            execution=cell.execution,
            protocol=cell.protocol,
            workload=work.kind,
            tokens=tokens,
            padded=tokens is not None and not pages,
            visual_tokens=work.visual_tokens or VISUAL_TOKENS,
            capability=capability if environment.gpu else None,
            prefetched=recorded_prefetch(cell),
        )
        twin = predict(setup, cell.batch_size)
    except LabError:
        return None  # a network or a kernel that is not modelled
    workload = twin.workload.model_copy(update={"pages": work.pages})
    named = _named(twin, cell.variant, environment.gpu)
    return named.model_copy(update={"workload": workload})
