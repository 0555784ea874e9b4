"""Predictions against what the tracker measures here and against arithmetic; plan.ipynb holds all published rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colqwen_lab.errors import BadInput
from colqwen_lab.measure.memory import measure
from colqwen_lab.model import loading
from colqwen_lab.model.checkpoint import FolderCheckpoint, default_checkpoint
from colqwen_lab.model.config import VARIANTS
from colqwen_lab.predict.plan import predictions
from colqwen_lab.predict.predictor import (
    A100,
    BUFFERS,
    HOST,
    KV_CACHE,
    OUTPUT,
    ROUNDING,
    WORKSPACE,
    Asked,
    Predictor,
    Target,
    workspace_bytes,
)
from colqwen_lab.predict.predictor import predictor as cached
from colqwen_lab.records import MIB, Cell, Memory, read_cells
from colqwen_lab.runtime.batches import query_batches
from colqwen_lab.runtime.eager import Steps
from colqwen_lab.runtime.fast import KINDS, load_fast

CPU = torch.device("cpu")
OUTPUTS = Path(__file__).parents[2] / "outputs"


def predictor(variant: str, size: str = "tiny", kernel: str = "tritonv2") -> Predictor:
    return cached(variant, size, "bfloat16", kernel)


def memory(cell: Cell) -> Memory:
    assert cell.memory is not None
    return cell.memory


@pytest.mark.parametrize("protocol", ["lean", "published"])
@pytest.mark.parametrize("variant", ["base", "awq"])
def test_agrees_with_the_tracker_here(
    variant: str, protocol: str, tiny: loading.Loaded, packed: Callable[[str], Path]
) -> None:
    loaded = (
        tiny
        if variant == "base"
        else loading.load(FolderCheckpoint(packed("auto_round")), CPU, backend="torch")
    )
    for batch in (1, 8, 64):
        made = query_batches(loaded.model.config, loaded.tokenizer, batch, "report", 64, CPU)
        longest = [max(made.inputs, key=lambda one: one["input_ids"].shape[1])]
        tracked = measure(loaded, longest, Steps(loaded.model, longest, "eager", protocol))
        predicted = memory(predictor(variant, kernel="torch").cell(batch, protocol, HOST))
        assert predicted.peak_bytes == pytest.approx(tracked.peak_bytes, rel=0.01)
        assert predicted.weights_bytes == loaded.weights_bytes


@pytest.mark.parametrize(
    ("variant", "backend", "kernel"),
    [("base", "auto", "torch"), ("awq", "int4", "int4"), ("awq", "torch", "torch")],
)
def test_agrees_with_the_tracker_in_fast(
    variant: str, backend: str, kernel: str, tiny: loading.Loaded, packed: Callable[[str], Path]
) -> None:
    source = default_checkpoint(VARIANTS["base"], "tiny", "auto", CPU)
    loaded = load_fast(
        source if variant == "base" else FolderCheckpoint(packed("auto_round")), CPU, backend
    )
    made = cached(variant, "tiny", "bfloat16", kernel, execution="fast")
    for batch in (1, 8, 64):
        batches = query_batches(loaded.model.config, loaded.tokenizer, batch, "report", 64, CPU)
        longest = [max(batches.inputs, key=lambda one: one["input_ids"].shape[1])]
        tracked = measure(loaded, longest, Steps(loaded.model, longest, "fast"))
        predicted = memory(made.cell(batch, target=HOST))
        assert predicted.peak_bytes == pytest.approx(tracked.peak_bytes, rel=0.01)
        assert predicted.weights_bytes == loaded.weights_bytes
        # A prediction names buffers and outputs, which the tracker of a run counts among activations.
        assert set(predicted.breakdown or {}) - {BUFFERS, OUTPUT} == set(tracked.breakdown or {})


@pytest.mark.parametrize("target", [A100, HOST])
@pytest.mark.parametrize(
    ("variant", "kernel"), [("base", "fp8"), ("awq", "fused"), ("W8A16", "tritonv2")]
)
def test_parts_add_up_in_fast(variant: str, kernel: str, target: Target) -> None:
    found = memory(
        cached(variant, "tiny", "bfloat16", kernel, execution="fast").cell(8, target=target)
    )
    assert sum((found.breakdown or {}).values()) == found.peak_bytes
    assert (found.min_reserved_bytes or found.peak_bytes) >= found.peak_bytes


def test_weights_dequantised_ahead_are_counted_where_a_run_may_make_them() -> None:
    made = cached("awq", "tiny", "bfloat16", "fused", execution="fast")
    hopper = Target("H100", (9, 0))
    first = made.model.fast.layers[0]
    sizes = {
        kind: 2 * getattr(first, kind).in_features * getattr(first, kind).out_features
        for kind in KINDS
    }

    def buffers(batch: int, target: Target, ahead: tuple[str, ...] | None) -> int:
        return (memory(made.cell(batch, target=target, ahead=ahead)).breakdown or {}).get(
            BUFFERS, 0
        )

    assert buffers(64, hopper, ()) == 0
    assert buffers(64, hopper, ("o",)) == sizes["o"]
    assert buffers(64, hopper, None) == sum(sizes.values())
    assert buffers(8, hopper, None) == buffers(64, A100, None) == 0
    for other, kernel in (("base", "fused"), ("W8A16", "fused"), ("W4A16G32", "fused")):
        cell = cached(other, "tiny", "bfloat16", kernel, execution="fast").cell(64, target=hopper)
        assert BUFFERS not in (memory(cell).breakdown or {})


def test_peaks_of_fast_that_an_h100_measured() -> None:
    """Nothing is fitted to them: base, FP8 weights, the Triton fallback, and awq's best way."""
    ways = read_cells(OUTPUTS / "h100" / "ways.jsonl")
    cells = [cell for cell in ways if cell.execution == "fast" and cell.batch_size in (1, 256, 512)]
    assert len(cells) == 12
    for cell, twin in zip(cells, predictions(cells), strict=True):
        assert twin is not None
        assert memory(twin).peak_bytes == pytest.approx(memory(cell).peak_bytes, rel=0.001)


@pytest.mark.parametrize("target", [A100, HOST])
@pytest.mark.parametrize("variant", ["base", "awq", "W8A16", "W2A16G32", "W3A16"])
def test_parts_add_up(variant: str, target: object) -> None:
    found = memory(predictor(variant, kernel="torch").cell(8, "published", target))  # type: ignore[arg-type]
    assert found.breakdown is not None
    assert sum(found.breakdown.values()) == found.peak_bytes
    assert all(size >= 0 for size in found.breakdown.values())
    assert (WORKSPACE in found.breakdown) == (ROUNDING in found.breakdown) == (target is A100)


def test_kv_cache_is_two_of_them() -> None:
    found = memory(predictor("base").cell(64, "published", HOST))
    text = predictor("base").config.text_config
    of_a_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2
    assert found.breakdown is not None
    assert found.breakdown[KV_CACHE] == pytest.approx(2 * of_a_token * 64 * 19, rel=0.03)
    assert KV_CACHE not in (memory(predictor("base").cell(64, "lean", HOST)).breakdown or {})


def test_a_fused_kernel_needs_no_weight_of_its_own() -> None:
    fallback, fused = (predictor("awq", "4b", kernel).cell(8) for kernel in ("tritonv2", "fused"))
    largest = 2560 * 9728 * 2
    assert (memory(fallback).breakdown or {})[BUFFERS] == largest
    assert BUFFERS not in (memory(fused).breakdown or {})
    assert memory(fallback).peak_bytes - memory(fused).peak_bytes > largest / 2
    assert fallback.work is not None
    assert fused.work is not None
    assert fallback.work.flops == fused.work.flops


def test_work_of_a_step() -> None:
    """7.267 GFLOP a token in the text linears of the 4B, and the head's; source: the project's facts."""
    cell = predictor("base", "4b").cell(4, tokens=16)
    assert cell.work is not None
    linears = 2 * (3_633_315_840 + 2560 * 320) * 4 * 16
    assert linears < cell.work.flops < 1.01 * linears
    assert cell.work.min_bytes == pytest.approx(3_633_315_840 * 2, rel=0.001)


def test_8b_works_the_same_way() -> None:
    found = memory(predictor("base", "8b").cell(4096, tokens=20))
    assert found.weights_bytes == pytest.approx((16_724.46 - 1_187) * MIB, rel=1e-4)
    assert found.peak_bytes > found.weights_bytes


def test_workspace_by_generation() -> None:
    assert workspace_bytes((8, 0)) == 8.125 * MIB
    assert workspace_bytes((9, 0)) == workspace_bytes((12, 0)) == 32 * MIB


@pytest.mark.parametrize("protocol", ["lean", "published"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("variant", ["base", "awq"])
def test_every_batch_follows_from_two(variant: str, masked: bool, protocol: str) -> None:
    made = predictor(variant, kernel="torch")
    for batch in (1, 7, 64):
        asked = Asked(19, masked, protocol)
        run, line = made._run(batch, asked), made._trace(batch, asked)
        assert run == line


def test_the_largest_batch_under_a_cap_is_what_an_h200_found() -> None:
    """`sweep --card 8`, awq, eager, lean, tritonv2: 1792 queries ran under 7,588,388,798 bytes, 1824 did not."""
    (cell,) = read_cells(OUTPUTS / "h200" / "card-8.jsonl")
    assert cell.card is not None
    ran = max(batch for batch, status in cell.card.tried.items() if status == "ok")
    lost = min(batch for batch, status in cell.card.tried.items() if status == "oom")
    h200 = Target("NVIDIA H200", (9, 0))
    needs = {
        b: memory(predictor("awq", "4b").cell(b, "lean", h200)).min_reserved_bytes or 0
        for b in (ran, lost)
    }
    assert needs[ran] <= cell.card.cap_bytes
    assert needs[lost] > 0.97 * cell.card.cap_bytes
    assert memory(cell).peak_bytes == pytest.approx(
        memory(predictor("awq", "4b").cell(cell.batch_size, "lean", h200)).peak_bytes, rel=0.001
    )


@pytest.mark.parametrize(("protocol", "variant"), [("lean", "base"), ("published", "awq")])
def test_peaks_that_an_h200_measured(protocol: str, variant: str) -> None:
    """One length of each here, to be quick; plan.ipynb under outputs/h200 holds every row."""
    every = read_cells(OUTPUTS / "h200" / f"eager-{protocol}.jsonl")
    cells = [
        cell for cell in every if cell.variant == variant and cell.batch_size in (64, 128, 256)
    ]
    assert len(cells) == 3
    for cell, twin in zip(cells, predictions(cells), strict=True):
        assert twin is not None
        assert memory(twin).peak_bytes == pytest.approx(memory(cell).peak_bytes, rel=0.003)


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 40), st.integers(1, 40))
def test_grows_with_batch_and_tokens(batch: int, more: int, tokens: int, longer: int) -> None:
    made = predictor("awq")
    small = memory(made.cell(batch, "lean", HOST, tokens)).peak_bytes
    assert memory(made.cell(batch + more, "lean", HOST, tokens)).peak_bytes >= small
    assert memory(made.cell(batch, "lean", HOST, tokens + longer)).peak_bytes >= small


def test_bad_input() -> None:
    with pytest.raises(
        BadInput, match="unknown kernel model 'fast'; valid: tritonv2, torch, fused"
    ):
        Predictor(VARIANTS["awq"], "tiny", kernel="fast")
    with pytest.raises(
        BadInput, match="kernel fp8 multiplies in execution fast only; valid in eager: tritonv2"
    ):
        Predictor(VARIANTS["base"], "tiny", kernel="fp8")
    for kernel, variant in (("fp8", "awq"), ("int4", "W8A16")):
        with pytest.raises(
            BadInput, match=f"kernel {kernel} does not multiply {variant}; valid: tritonv2, torch"
        ):
            cached(variant, "tiny", "bfloat16", kernel, execution="fast")
    with pytest.raises(
        BadInput, match="'published' keeps a KV cache, which execution fast has not; valid: lean"
    ):
        cached("base", "tiny", execution="fast").cell(1, "published")
    with pytest.raises(BadInput, match="unknown dtype 'int4'"):
        Predictor(VARIANTS["awq"], "tiny", dtype="int4")
    for tokens in (0, 4097, 10**12):
        with pytest.raises(BadInput, match=f"tokens {tokens}; valid at size tiny: 1 to 4096"):
            predictor("base").cell(1, tokens=tokens)
    with pytest.raises(BadInput, match="batch 65537; valid for a prediction: up to 65536"):
        predictor("base").cell(65537)
    with pytest.raises(
        BadInput, match="tritonv2 multiplies 2, 4 and 8 bits; valid for W3A16: torch"
    ):
        predictor("W3A16")
    with pytest.raises(BadInput, match="owner/name is not predicted by its name; valid: base, awq"):
        predictor("owner/name")


def test_peaks_of_fast_that_a_cpu_tracked() -> None:
    every = read_cells(OUTPUTS / "cpu" / "mid.jsonl")
    cells = [cell for cell in every if cell.execution == "fast" and cell.batch_size in (1, 32)]
    assert {cell.variant for cell in cells} == {"base", "awq"}
    for cell, twin in zip(cells, predictions(cells), strict=True):
        assert twin is not None
        assert memory(twin).peak_bytes == pytest.approx(memory(cell).peak_bytes, rel=0.01)
