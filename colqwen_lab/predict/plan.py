"""Plans: predicted cells, and the largest batch under the memory of each card."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from colqwen_lab.errors import BadInput, LabError, one_of
from colqwen_lab.hardware import Card, Fit, fit_of, need_bytes
from colqwen_lab.model.checkpoint import FolderCheckpoint
from colqwen_lab.model.config import SIZES, Variant, built_in, resolve_variant, scheme_parts
from colqwen_lab.model.loading import skeleton
from colqwen_lab.model.network import ColQwen3Config, is_text_linear
from colqwen_lab.model.packing import gptq_packed
from colqwen_lab.options import VISUAL_TOKENS, WORKLOADS, PlanOptions
from colqwen_lab.predict.kernels import recorded_dequantised, recorded_kernel, recorded_prefetch
from colqwen_lab.predict.predictor import CPU, Setup, predict
from colqwen_lab.records import MIB, Cell, Quantization

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
    names = {"kernel", "dtype", "execution", "workload", "protocol", "visual_tokens"}
    common = options.model_dump(include=names) | {"tokens": options.tokens or None}
    for model in options.models:
        variant = resolve_variant(model)
        size, quantization = network_of(variant, options.size)
        setup = Setup(size=size, quantization=quantization, **common)
        progress(f"predicting {variant.name}, size {size}: {setup.workload}, {setup.execution}")
        for batch_size in options.batch_sizes or WORKLOADS[options.workload].batch_sizes:
            cells.append(_named(predict(setup, batch_size), variant.name, A100))
        cards += [largest_on(card, setup, variant.name) for card in options.memory_budgets]
    return cells, cards


def network_of(variant: Variant, size: str) -> tuple[str, Quantization | None]:
    """`(size, quantisation)` of a variant: of a folder from its configuration, else from its name.

    Size `auto` is a folder's own, else 4b.

    Raises:
        BadInput: a hub repository, or a folder of another size, or whose network is not modelled.
        MissingRequirement: a folder whose tensors are not those of its configuration.
    """
    name, named = variant.name, "4b" if size == "auto" else size
    if "any" in variant.hub:
        raise BadInput(f"{name} is on the hub; download it and name the folder, or name awq")
    if variant.scheme:
        bits, group_size = scheme_parts(variant.scheme)
        return named, Quantization(bits=bits, group_size=group_size, sym=True)
    if not variant.folder:
        return named, None
    checkpoint = FolderCheckpoint(variant.folder)
    if size not in ("auto", checkpoint.size):
        raise BadInput(f"{name} is of size {checkpoint.size}, not {size}; use auto or that size")
    size, packing = one_of(f"size of {name}", checkpoint.size, SIZES), checkpoint.quantization
    if packing and any(is_text_linear(file.removesuffix(".weight")) for file in checkpoint.files):
        raise BadInput(f"{name} keeps some text linears at 16 bits; plan cannot predict that")
    stored = gptq_packed(checkpoint)
    network, _ = skeleton(ColQwen3Config.of_size(size), stored.quantization, CPU, "torch")
    stored.check(network.state_dict())
    if packing is None:
        return size, None
    return size, Quantization(**{key: packing[key] for key in ("bits", "group_size", "sym")})


def _named(cell: Cell, variant: str, gpu: str | None, **changes: Any) -> Cell:
    environment = cell.environment.model_copy(update={"gpu": gpu})
    return cell.model_copy(update={"variant": variant, "environment": environment} | changes)


def largest_on(card: Card, setup: Setup, variant: str) -> CardPlan:
    """The CardPlan of a variant: the largest batch that surely fits, its bytes; else of batch 1."""
    if card.gpu:
        setup = replace(setup, capability=card.gpu.compute_capability[0])

    def memory(batch_size: int) -> Any:
        return predict(setup, batch_size).memory

    def headroom(batch_size: int) -> int:
        return card.usable_bytes - need_bytes(memory(batch_size))[1]

    verdict, batch, safe = fit_of(memory(1), card.nominal_bytes), None, None
    short = f"short by {-(headroom(1) // MIB):,} MiB"
    smallest = f"weights and one {'page' if setup.workload == 'pages' else 'query'}"
    match verdict:
        case "does not fit":
            limited_by = f"{smallest} do not fit: {short}"
        case "tight":
            batch, limited_by = 1, f"{smallest} may not fit: at worst {short}"
        case "fits":
            batch = largest(headroom, LARGEST_SEARCHED)
            safe = max(1, int(batch * (1 - MARGIN)))
            reached = batch == LARGEST_SEARCHED
            limited_by = f"no limit up to batch {batch}" if reached else "limited by memory"
    there = memory(batch or 1)
    return CardPlan(
        card=card.name,
        nominal_bytes=card.nominal_bytes,
        usable_bytes=card.usable_bytes,
        variant=variant,
        verdict=verdict,
        batch_size=batch,
        safe_batch_size=safe,
        peak_bytes=there.peak_bytes,
        min_reserved_bytes=there.min_reserved_bytes,
        headroom_bytes=headroom(batch or 1),
        limited_by=limited_by,
    )


def largest(headroom: Callable[[int], int], limit: int) -> int:
    """The largest batch size up to `limit` with 0 or more bytes of `headroom`, as batch 1 has.

    The reserved memory is not monotonic in the batch size, because of fragmentation. So some sizes
    up to a tenth below the edge are checked, and the search goes on below the first that fails.
    """
    while True:
        edge = _edge(headroom, limit)
        near = [int(edge * (1 - percent / 100)) for percent in range(10, 0, -2)]
        failing = next((size for size in near if size and headroom(size) < 0), None)
        if failing is None:
            return edge
        limit = failing


def _edge(headroom: Callable[[int], int], limit: int) -> int:
    """A number with headroom whose next has none, by interpolation or by halving."""
    low, high, halve = 1, limit, False
    if headroom(high) >= 0:
        return limit
    while high - low > 1:
        width, above, below = high - low, headroom(low), headroom(high)
        share = 0.5 if halve else above / (above - below)
        guess = min(high - 1, max(low + 1, low + int(width * share)))
        low, high = (guess, high) if headroom(guess) >= 0 else (low, guess)
        halve = high - low > width / 2 and not halve
    return low


def predictions(cells: Iterable[Cell]) -> list[Cell | None]:
    """The predicted cell for each measured or published one; None where it is not modelled."""
    return [_prediction(cell) for cell in cells]


def _prediction(cell: Cell) -> Cell | None:
    kernel, work, gpu = recorded_kernel(cell), cell.workload, cell.environment.gpu
    pages = work.kind == "pages"
    # Pages of several sizes differ from batch to batch.
    several_sizes = pages and (work.padded_share != 0 or work.visual_tokens is None)
    if kernel is None or cell.memory is None or several_sizes:
        return None
    # The report's queries follow from the batch; other items have the length of the record.
    tokens = work.tokens if pages or (work.texts or "").startswith("natural") else None
    capability = int((cell.environment.compute_capability or "8").split(".")[0])
    quantization = cell.quantization
    try:
        if quantization is None and kernel not in ("", "fp8"):  # an older record of packed weights
            if (variant := built_in(cell.variant)) is None:
                return None
            quantization = network_of(variant, cell.size)[1]
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
            capability=capability if gpu else None,
            prefetched=recorded_prefetch(cell),
            dequantised=recorded_dequantised(cell),
        )
        twin = predict(setup, cell.batch_size)
    except LabError:
        return None
    workload = twin.workload.model_copy(update={"pages": work.pages})
    return _named(twin, cell.variant, gpu, workload=workload)
