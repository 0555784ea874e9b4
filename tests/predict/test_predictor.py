"""Predictions against what the tracker measures here, what GPUs measured, and arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colqwen_lab.errors import BadInput
from colqwen_lab.measure.memory import measure
from colqwen_lab.measure.worker import Worker
from colqwen_lab.model import loading
from colqwen_lab.model.checkpoint import FolderCheckpoint, default_checkpoint
from colqwen_lab.model.config import SIZES, VARIANTS, scheme_parts
from colqwen_lab.model.network import UNUSED_HEAD
from colqwen_lab.predict import predictor
from colqwen_lab.predict.allocator import ROUNDING, WORKSPACE
from colqwen_lab.predict.kernels import BUFFERS, KINDS, recorded_kernel
from colqwen_lab.predict.plan import predictions
from colqwen_lab.predict.predictor import KV_CACHE, OUTPUT, FakeNetwork, Setup, predict
from colqwen_lab.records import MIB, Cell, Configuration, Memory, Quantization, read_cells
from colqwen_lab.runtime.batches import Batches, Pages, query_batches
from colqwen_lab.runtime.eager import PROTOCOLS, STEPS, Steps
from colqwen_lab.runtime.fast import load_fast

CPU = torch.device("cpu")
OUTPUTS = Path(__file__).parents[2] / "outputs"


def setup(variant: str = "base", size: str = "tiny", **fields: Any) -> Setup:
    scheme = {"base": None, "awq": "W4A16"}.get(variant, variant)
    quantization = None
    if scheme:
        bits, group_size = scheme_parts(scheme)
        quantization = Quantization(bits=bits, group_size=group_size, sym=True)
    return Setup(size, quantization, **fields)


def memory(cell: Cell | None) -> Memory:
    assert cell is not None
    assert cell.memory is not None
    return cell.memory


def breakdown(cell: Cell) -> dict[str, int]:
    return memory(cell).breakdown or {}


def longest(loaded: loading.Loaded, batch: int) -> dict[str, torch.Tensor]:
    """The longest batch of the report's queries."""
    batches = query_batches(loaded.model.config, loaded.tokenizer, batch, "report", 64, CPU)
    return max(batches.inputs, key=lambda inputs: inputs["input_ids"].shape[1])


# ---------------------------------------------------------------- against the tracker


@pytest.mark.parametrize("protocol", ["lean", "published"])
@pytest.mark.parametrize("variant", ["base", "awq"])
def test_agrees_with_the_tracker_here(
    variant: str, protocol: str, tiny: loading.Loaded, tiny_awq: loading.Loaded
) -> None:
    loaded = tiny if variant == "base" else tiny_awq
    host = setup(variant, kernel="torch", protocol=protocol, capability=None)
    for batch in (1, 8, 64):
        inputs = longest(loaded, batch)
        tracked = measure(loaded, inputs, Steps(loaded.model, "eager", protocol))
        predicted = memory(predict(host, batch))
        assert predicted.peak_bytes == pytest.approx(tracked.peak_bytes, rel=0.01)
        assert predicted.weights_bytes == loaded.weights_bytes


@pytest.mark.parametrize("stored", [True, False])
def test_protocol_published_holds_an_untied_head(
    stored: bool,
    base_folder: Path,
    edited: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As of the 8B, whose publisher's code loads a head that nothing calls."""
    head, host = torch.ones(1536, 128, dtype=torch.bfloat16), setup(kernel="torch", capability=None)
    folder = edited(
        base_folder,
        tensors=lambda t: t.update({UNUSED_HEAD: head} if stored else {}),
        config=lambda c: c.update(tie_word_embeddings=False),
    )
    tied = {protocol: predict(replace(host, protocol=protocol), 2) for protocol in PROTOCOLS}
    monkeypatch.setitem(SIZES["tiny"], "tie_word_embeddings", False)
    monkeypatch.setenv("COLQWEN_LAB_CACHE", str(tmp_path / "untied"))
    for cached in (predictor._network, predict):
        cached.cache_clear()
    configuration = Configuration(variant="base", kernel="torch")
    batches = partial(query_batches, texts="report", samples=64)
    worker = Worker(FolderCheckpoint(folder), CPU, configuration, batches)
    worker.load(None, [])
    # Two protocols share a worker, in any order.
    for protocol in ("published", "lean", "published"):
        more = head.nbytes if protocol == "published" else 0
        measured = worker.measure(2, protocol, True)[0]
        predicted = memory(predict(replace(host, protocol=protocol), 2))
        for one in (measured, predicted):
            assert one.unused_head_bytes == more
            assert one.weights_bytes == memory(tied[protocol]).weights_bytes + more
            assert (one.breakdown or {}).get("unused lm_head", 0) == more
        assert predicted.peak_bytes == memory(tied[protocol]).peak_bytes + more
        assert measured.peak_bytes == pytest.approx(predicted.peak_bytes, rel=0.01)
        on_gpu = predict(setup(protocol=protocol), 2)
        assert sum(breakdown(on_gpu).values()) == memory(on_gpu).peak_bytes
    for cached in (predictor._network, predict):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("variant", "requested", "kernel"),
    [("base", "auto", "torch"), ("awq", "int4", "int4"), ("awq", "torch", "torch")],
)
def test_agrees_with_the_tracker_in_fast(
    variant: str, requested: str, kernel: str, packed: Callable[[str], Path]
) -> None:
    source = default_checkpoint(VARIANTS["base"], "tiny", "auto", CPU)
    source = source if variant == "base" else FolderCheckpoint(packed("auto_round"))
    loaded = load_fast(source, CPU, requested)
    host = setup(variant, kernel=kernel, execution="fast", capability=None)
    for batch in (1, 8, 64):
        inputs = longest(loaded, batch)
        tracked = measure(loaded, inputs, Steps(loaded.model, "fast"))
        predicted = memory(predict(host, batch))
        assert predicted.peak_bytes == pytest.approx(tracked.peak_bytes, rel=0.01)
        assert predicted.weights_bytes == loaded.weights_bytes
        # The tracker of a run counts buffers and outputs among activations.
        assert set(predicted.breakdown or {}) - {BUFFERS, OUTPUT} == set(tracked.breakdown or {})


@pytest.mark.parametrize("variant", ["base", "awq"])
@pytest.mark.parametrize("protocol", ["lean", "published"])
def test_pages_agree_with_the_tracker_here(
    variant: str, protocol: str, tiny: loading.Loaded, tiny_awq: loading.Loaded
) -> None:
    loaded = tiny if variant == "base" else tiny_awq
    pages = Pages("192x256", visual_tokens=64)
    for batch in (1, 8):
        batches: Batches = pages.batches(loaded.model.config, loaded.tokenizer, batch, 0, CPU)
        inputs = batches.inputs[0]
        tracked = measure(loaded, inputs, Steps(loaded.model, "eager", protocol))
        host = setup(variant, kernel="torch", workload="pages", protocol=protocol, capability=None)
        cell = predict(replace(host, tokens=batches.workload.tokens), batch)
        assert memory(cell).peak_bytes == pytest.approx(tracked.peak_bytes, rel=0.01)
        assert sum(breakdown(cell).values()) == memory(cell).peak_bytes
        assert cell.workload.index_bytes == batches.workload.index_bytes


@pytest.mark.parametrize("variant", ["base", "awq"])
def test_pages_agree_with_the_tracker_in_fast(variant: str, packed: Callable[[str], Path]) -> None:
    source = default_checkpoint(VARIANTS["base"], "tiny", "auto", CPU)
    source = source if variant == "base" else FolderCheckpoint(packed("auto_round"))
    loaded = load_fast(source, CPU, "auto" if variant == "base" else "torch")
    pages = Pages("192x256", visual_tokens=64)
    for batch in (1, 8):
        batches = pages.batches(loaded.model.config, loaded.tokenizer, batch, 0, CPU)
        inputs = batches.inputs[0]
        tracked = measure(loaded, inputs, Steps(loaded.model, "fast"))
        host = setup(variant, kernel="torch", workload="pages", execution="fast", capability=None)
        cell = predict(replace(host, tokens=batches.workload.tokens), batch)
        assert memory(cell).peak_bytes == pytest.approx(tracked.peak_bytes, rel=0.01)


# ---------------------------------------------------------------- against GPUs


def agree(cells: list[Cell], within: float) -> None:
    for cell, twin in zip(cells, predictions(cells), strict=True):
        assert memory(twin).peak_bytes == pytest.approx(memory(cell).peak_bytes, rel=within)


@pytest.mark.parametrize(("protocol", "variant"), [("lean", "base"), ("published", "awq")])
def test_peaks_that_an_h200_measured(protocol: str, variant: str) -> None:
    """Nothing is fitted to them. One length of each, to be quick; plan.ipynb holds every row."""
    every = read_cells(OUTPUTS / "h200" / f"eager-{protocol}.jsonl")
    cells = [c for c in every if c.variant == variant and c.batch_size in (64, 128, 256)]
    assert len(cells) == 3
    agree(cells, 0.003)


@pytest.mark.exhaustive
def test_peaks_of_fast_that_an_h100_measured() -> None:
    """Base, FP8 weights, the Triton fallback, and awq with its best kernels."""
    every = read_cells(OUTPUTS / "h100" / "ways.jsonl")
    cells = [c for c in every if c.execution == "fast" and c.batch_size in (1, 256, 512)]
    assert len(cells) == 12
    agree(cells, 0.001)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "within"),
    [("acceptance/queries", 0.002), ("acceptance/pages", 0.002), ("pages-fast", 0.01)],
)
def test_peaks_of_folders_and_of_pages_in_fast(name: str, within: float) -> None:
    agree(read_cells(OUTPUTS / "h100" / f"{name}.jsonl"), within)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("variant", "within"), [("base", 0.001), ("awq", 0.004)])
def test_peaks_of_pages_that_an_h100_measured(variant: str, within: float) -> None:
    """At every batch some 10 MiB of awq are in no prediction. The other rows agree too."""
    chosen = {(1280, 2), (256, 16)}
    every = [c for c in read_cells(OUTPUTS / "h100" / "pages.jsonl") if c.variant == variant]
    cells = [c for c in every if (c.workload.visual_tokens, c.batch_size) in chosen]
    assert len(cells) == 2
    agree(cells, within)


def test_peaks_of_fast_that_a_cpu_tracked() -> None:
    every = read_cells(OUTPUTS / "cpu" / "mid.jsonl")
    cells = [c for c in every if c.execution == "fast" and c.batch_size in (1, 32)]
    assert {cell.variant for cell in cells} == {"base", "awq"}
    agree(cells, 0.01)


def test_the_largest_batch_under_a_cap_is_that_of_an_h200() -> None:
    """`sweep --card 8` of awq: 1792 queries ran under 7,588,388,798 bytes, 1824 did not."""
    (cell,) = read_cells(OUTPUTS / "h200" / "card-8.jsonl")
    assert cell.card is not None
    ran = max(batch for batch, status in cell.card.tried.items() if status == "ok")
    failed = min(batch for batch, status in cell.card.tried.items() if status == "oom")
    h200 = setup("awq", "4b", capability=9)
    assert (memory(predict(h200, ran)).min_reserved_bytes or 0) <= cell.card.cap_bytes
    assert (memory(predict(h200, failed)).min_reserved_bytes or 0) > 0.97 * cell.card.cap_bytes
    peak = memory(predict(h200, cell.batch_size)).peak_bytes
    assert memory(cell).peak_bytes == pytest.approx(peak, rel=0.001)


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("capability", [8, None])
@pytest.mark.parametrize("variant", ["base", "awq", "W8A16", "W2A16G32", "W3A16"])
def test_parts_add_up(variant: str, capability: int | None) -> None:
    cell = predict(setup(variant, kernel="torch", protocol="published", capability=capability), 8)
    parts = breakdown(cell)
    assert sum(parts.values()) == memory(cell).peak_bytes
    assert all(size >= 0 for size in parts.values())
    assert (WORKSPACE in parts) == (ROUNDING in parts) == (capability == 8)


@pytest.mark.parametrize("capability", [8, None])
@pytest.mark.parametrize(
    ("variant", "kernel"),
    [("base", "fp8"), ("awq", "fused"), ("W3A16", "humming"), ("W8A16", "tritonv2")],
)
def test_parts_add_up_in_fast(variant: str, kernel: str, capability: int | None) -> None:
    cell = predict(setup(variant, kernel=kernel, execution="fast", capability=capability), 8)
    found = memory(cell)
    assert sum(breakdown(cell).values()) == found.peak_bytes
    assert (found.min_reserved_bytes or found.peak_bytes) >= found.peak_bytes


def test_buffers_of_dequantise_then_gemm_count_in_an_earlier_run() -> None:
    fast = setup("awq", kernel="fused", execution="fast")
    network = FakeNetwork(fast)
    assert network.fast
    first = network.fast.layers[0]
    gemms = {kind: getattr(first, kind) for kind in KINDS}
    sizes = {kind: 2 * gemm.in_features * gemm.out_features for kind, gemm in gemms.items()}

    def buffers(*prefetched: str) -> int:
        return breakdown(predict(replace(fast, prefetched=prefetched), 64)).get(BUFFERS, 0)

    assert buffers() == 0
    assert buffers("o") == sizes["o"]
    assert buffers(*KINDS) == sum(sizes.values())


def test_a_weight_at_a_time_is_dequantised_for_pages_of_many_rows() -> None:
    pages = setup("awq", kernel="humming", execution="fast", workload="pages", visual_tokens=100)

    network = FakeNetwork(pages)

    def buffers(batch: int, dequantised: tuple[str, ...] | None) -> int:
        trace = network.trace(batch, replace(pages, tokens=111, dequantised=dequantised))
        return sum(n for number, n in trace.log if n > 2 and trace.labels[number] == BUFFERS)

    weights = {
        kind: 2
        * STEPS
        * sum(one.in_features * one.out_features for one in network.fast.of_kind(kind))
        for kind in KINDS
    }
    assert buffers(16, ()) == 0
    assert buffers(16, ("gate_up",)) == weights["gate_up"]
    assert buffers(16, None) == buffers(16, KINDS) == sum(weights.values()), "1,776 rows"
    assert buffers(4, None) == 0, "444 rows"


@pytest.mark.parametrize("kernel", ["fused", "humming"])
def test_zero_points_of_asymmetric_codes_count_in_a_fused_kernel(kernel: str) -> None:
    schemes = [Quantization(bits=4, group_size=128, sym=sym) for sym in (True, False)]
    sym, asym = (predict(Setup("tiny", scheme, kernel, execution="fast"), 1) for scheme in schemes)
    assert "text linears: zeros" not in breakdown(sym)
    assert breakdown(asym)["text linears: zeros"] > 0


@pytest.mark.parametrize(("execution", "linears"), [("eager", 28), ("fast", 16)])
def test_humming_has_locks_and_no_zero_points(execution: str, linears: int) -> None:
    """Each of its layers holds 2,048 locks of 4 bytes. Source: humming/layer.py."""
    fallback, humming = (
        predict(setup("awq", kernel=kernel, execution=execution), 8)
        for kernel in ("torch", "humming")
    )
    parts, others = breakdown(humming), breakdown(fallback)
    assert parts["text linears: other"] == linears * 2048 * 4
    assert "text linears: zeros" not in parts
    assert all(
        parts[f"text linears: {part}"] == others[f"text linears: {part}"]
        for part in ("codes", "scales")
    )
    more = parts["text linears: other"] - others["text linears: zeros"]
    assert memory(humming).weights_bytes == (memory(fallback).weights_bytes or 0) + more
    assert sum(parts.values()) == memory(humming).peak_bytes


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", ["h100/configurations", "h100/pages"])
def test_what_humming_s_repacking_leaves_reserved_is_followed(path: str) -> None:
    cells = [
        cell for cell in read_cells(OUTPUTS / f"{path}.jsonl") if recorded_kernel(cell) == "humming"
    ]
    for cell, twin in zip(cells, predictions(cells), strict=True):
        measured, predicted = memory(cell), memory(twin)
        assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.0015)
        if cell.workload.kind == "queries":
            assert predicted.reserved_bytes == pytest.approx(measured.reserved_bytes, rel=0.045)
    assert len(cells) >= 10


def test_kv_cache_is_two_of_them() -> None:
    base = setup(protocol="published", capability=None)
    text = FakeNetwork(setup()).config.text_config
    of_a_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2
    assert breakdown(predict(base, 64))[KV_CACHE] == pytest.approx(
        2 * of_a_token * 64 * 19, rel=0.03
    )
    assert KV_CACHE not in breakdown(predict(replace(base, protocol="lean"), 64))


def test_a_fused_kernel_needs_no_weight_of_its_own() -> None:
    fallback, fused = (predict(setup("awq", "4b", kernel=k), 8) for k in ("tritonv2", "fused"))
    largest = 2560 * 9728 * 2
    assert breakdown(fallback)[BUFFERS] == largest
    assert BUFFERS not in breakdown(fused)
    assert memory(fallback).peak_bytes - memory(fused).peak_bytes > largest / 2
    assert fallback.work
    assert fused.work
    assert fallback.work.flops == fused.work.flops


# ---------------------------------------------------------------- work, sizes and batches


def test_work_of_a_step() -> None:
    """7.267 GFLOP a token in the text linears of the 4B, and the head's."""
    cell = predict(setup(size="4b", tokens=16), 4)
    assert cell.work is not None
    linears = 2 * (3_633_315_840 + 2560 * 320) * 4 * 16
    assert linears < cell.work.flops < 1.01 * linears
    assert cell.work.min_bytes == pytest.approx(3_633_315_840 * 2, rel=0.001)


def test_8b_works_the_same_way() -> None:
    found = memory(predict(setup(size="8b", tokens=20), 4096))
    assert found.weights_bytes == pytest.approx((16_724.46 - 1_187) * MIB, rel=1e-4)
    assert found.peak_bytes > found.weights_bytes


def test_an_a4_page_of_the_4b() -> None:
    """1,271 tokens of 7.267 GFLOP, and 5,040 patches through the vision encoder's 306 M."""
    cell = predict(setup("awq", "4b", workload="pages"), 1)
    assert (cell.workload.tokens, cell.workload.pages) == (1271, Pages().label)
    assert cell.work is not None
    assert cell.work.flops > 1271 * 7.267e9 + 2 * 5040 * 300e6
    assert breakdown(cell)["vision encoder"] == pytest.approx(584.111 * MIB, rel=0.001)


@pytest.mark.parametrize("protocol", ["lean", "published"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("variant", ["base", "awq"])
def test_every_batch_of_queries_follows_from_two(variant: str, masked: bool, protocol: str) -> None:
    network = predictor._network(setup(variant, kernel="torch"))
    for batch in (1, 7, 64):
        run = setup(variant, kernel="torch", tokens=19, padded=masked, protocol=protocol)
        assert network.traced(batch, run) == network.trace(batch, run)


def test_many_pages_lie_on_a_line() -> None:
    pages = setup(kernel="torch", workload="pages", tokens=81)
    line = predict(pages, 48)
    traced = predictor._traced_cell(pages, 48)
    assert memory(line).peak_bytes == pytest.approx(memory(traced).peak_bytes, rel=0.01)
    assert (line.work, line.workload) == (traced.work, traced.workload)
    assert sum(breakdown(line).values()) == pytest.approx(memory(line).peak_bytes, abs=10)


def test_a_prediction_is_kept_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torn file and another's are written anew; other code, setups and batches have their own."""
    monkeypatch.setenv("COLQWEN_LAB_CACHE", str(tmp_path))
    base, traced = setup(tokens=5), list[int]()
    cell = predictor._traced_cell(base, 2)

    def trace(_: Setup, batch_size: int) -> Cell:
        traced.append(batch_size)
        return cell

    def traces(setup: Setup = base, batch_size: int = 2) -> int:
        traced.clear()
        assert predict.__wrapped__(setup, batch_size) == cell
        return len(traced)

    monkeypatch.setattr(predictor, "_traced_cell", trace)
    assert [traces(), traces()] == [1, 0]
    (kept,) = tmp_path.glob("predicted/*")
    line = kept.read_text()
    for other in (line[:100], "[]", line.replace("predicted", "guessed"), "\0"):
        kept.write_text(other)
        assert [traces(), traces()] == [1, 0]
    assert kept.read_text() == line
    others = (replace(base, tokens=6), 2), (base, 3)
    assert [traces(*other) for other in (*others, *others)] == [1, 1, 0, 0]
    monkeypatch.setattr(predictor, "_versions", lambda: ("other",))
    assert traces() == 1


def test_without_a_cache_folder_predictions_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/below", "\n"):
        monkeypatch.setenv("COLQWEN_LAB_CACHE", str(tmp_path / folder))
        assert predict.__wrapped__(setup(tokens=5), 2).status == "ok"
    assert capfd.readouterr() == ("", "")


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 40), st.integers(1, 40))
def test_grows_with_batch_and_tokens(batch: int, more: int, tokens: int, longer: int) -> None:
    awq = setup("awq", capability=None, tokens=tokens)
    small = memory(predict(awq, batch)).peak_bytes
    assert memory(predict(awq, batch + more)).peak_bytes >= small
    assert memory(predict(replace(awq, tokens=tokens + longer), batch)).peak_bytes >= small


@pytest.mark.parametrize(
    ("fields", "batch", "says"),
    [
        ({"execution": "fast", "protocol": "published"}, 1, "use protocol lean"),
        ({"visual_tokens": 256}, 1, "visual_tokens is an option of workload pages"),
        ({"dtype": "int4"}, 1, "unknown dtype 'int4'"),
        ({"kernel": "fp8"}, 1, "unknown kernel of 16-bit weights in execution eager 'fp8'"),
        ({"tokens": 0}, 1, "tokens must be 1 to 4096 at size tiny, got 0"),
        ({"tokens": 10**12}, 1, "tokens must be 1 to 4096 at size tiny"),
        (
            {"tokens": 5, "workload": "pages"},
            1,
            "tokens must be [0-9]+ to 4096 at size tiny, got 5",
        ),
        ({}, 65537, "batch size must be 1 to 65536, got 65537"),
    ],
)
def test_bad_input(fields: dict[str, Any], batch: int, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        predict(setup(**fields), batch)


def test_a_size_that_is_not_known() -> None:
    with pytest.raises(BadInput, match="unknown size 'custom'; valid: tiny, mid, 4b, 8b"):
        predict(Setup("custom"), 1)
