from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colqwen_lab.analysis import ablation, speed
from colqwen_lab.analysis.budget import card_fits
from colqwen_lab.analysis.compare import Comparison, compare
from colqwen_lab.analysis.table import Results
from colqwen_lab.errors import BadInput
from colqwen_lab.hardware import fit_of, need_bytes, usable
from colqwen_lab.records import (
    GIB,
    MIB,
    Backend,
    Cell,
    Environment,
    Memory,
    Quantization,
    Rate,
    Timing,
    Workload,
    published_cells,
    rate_of,
)

FIRST = published_cells()[0]
MB = 10**6
OUTPUTS = Path(__file__).parents[2] / "outputs"


def cell(variant: str, batch: int, rate: float = 100.0, peak: int = GIB, **changes: Any) -> Cell:
    same = {
        "variant": variant,
        "workload": Workload(kind="queries", batch_size=batch, texts="report"),
        "items_per_s": Rate(median=rate),
        "memory": Memory(peak_bytes=peak, method="cuda"),
        "origin": "measured",
    }
    return FIRST.model_copy(update=same | changes)


def timed(
    variant: str, batch: int, step_s: float, spread: float = 0.01, seed: int = 0, **changes: Any
) -> Cell:
    draw = random.Random(seed)
    steps = [step_s * draw.gauss(1, spread) for _ in range(20)]
    return cell(variant, batch, **{"step_s": steps, "items_per_s": rate_of(steps, batch)} | changes)


def versus(base: list[Cell], awq: list[Cell], **options: Any) -> Comparison:
    return compare(Results(tuple(base)), Results(tuple(awq)), **options)


def fit(comparison: Comparison, side: str, card: int = 0) -> Any:
    """The row of one side on one card, missing values as None."""
    row = comparison.cards.query("side == @side").astype(object).iloc[card]
    return row.where(row.notna(), None)


def fit_at(comparison: Comparison, card_gb: float) -> list[Any]:
    """The rows of both sides on a card, missing values as None."""
    table = card_fits(comparison.pair, [card_gb]).astype(object)
    return [row for _, row in table.where(table.notna(), None).iterrows()]


def savings(comparison: Comparison) -> dict[int, float]:
    rows = comparison.rows.dropna(subset="saving_percent").set_index("batch_size")
    return rows["saving_percent"].round(1).to_dict()


def failed(variant: str, batch: int, status: str = "oom") -> Cell:
    return cell(
        variant, batch, status=status, reason="asked for 2 GiB", items_per_s=None, memory=None
    )


@pytest.fixture(scope="module")
def published() -> Comparison:
    results = Results.load("published")
    return compare(results, results)


# ---------------------------------------------------------------- the published figures


def test_published_speeds_at_every_shared_batch(published: Comparison) -> None:
    comparison = {speed.batch_size: round(speed.percent, 1) for speed in published.speeds}
    assert comparison == {8: -50.8, 16: -59.4, 32: -52.8, 64: -27.1, 128: -4.0, 256: 0.3}
    assert [speed.verdict for speed in published.speeds] == ["slower"] * 5 + ["inconclusive"]
    assert all(speed.low is None and speed.high is None for speed in published.speeds)


def test_published_savings(published: Comparison) -> None:
    assert savings(published) == {8: 59.4, 16: 59.1, 32: 58.3, 64: 57.1, 128: 54.6, 256: 50.0}


def test_published_cards(published: Comparison) -> None:
    base, awq = fit(published, "base"), fit(published, "awq")
    assert (base.verdict, base.batch_size, base.ratio) == ("does not fit", None, None)
    assert base.note == "batch 8: 8,527 MiB"
    assert (awq.verdict, awq.batch_size, awq.items_per_s) == ("fits", 512, 951)
    assert (awq.best_batch_size, awq.best_items_per_s) == (256, 969)
    assert awq.headroom_bytes == usable(8 * GIB) - 6963 * MIB - 700 * MB > 0
    for card in (1, 2, 3):
        base = fit(published, "base", card)
        assert (base.verdict, base.batch_size, base.items_per_s) == ("fits", 256, 966)
        assert base.note == ""
        assert base.ratio == pytest.approx(951 / 966)


def test_published_crossover(published: Comparison) -> None:
    comparison = published.crossover
    assert comparison["need_bytes"] == 10220 * MIB + 700 * MB
    assert (comparison["base_batch_size"], comparison["awq_batch_size"]) == (256, 512)
    assert (comparison["base_items_per_s"], comparison["awq_items_per_s"]) == (966, 951)


def test_published_sentences(published: Comparison) -> None:
    each = "each at its largest batch"
    assert [tuple(row) for row in published.recommendations] == [
        ("awq", "awq saves 50 to 59 % of base's peak memory at batch 8, 16, 32, 64, 128 and 256."),
        ("awq", "With 4.03 to 8.98 GiB free, only awq fits."),
        ("awq", f"awq is 1.1 to 5.0 times as fast as base with 8.98 to 9.79 GiB free, {each}."),
        (
            "either",
            f"No significant difference with 9.79 GiB or more free, {each} (-1.6 to +0.4 %).",
        ),
        ("base", "awq is 4.0 to 59.4 % slower than base at batch 8, 16, 32, 64 and 128."),
        ("either", "No significant difference at batch 256 (+0.3 %)."),
        ("base", "A batch of 8 queries takes 41.9 ms with base, 85.1 ms with awq."),
    ]
    assert published.verdict().endswith(
        f"The median rate of base is at least that of awq with 10.6 GiB or more free, {each}. "
        "There base runs batch 256, and awq batch 512."
    )


def test_a_single_batch_has_its_interval_in_the_sentence() -> None:
    comparison = versus([timed("base", 8, 0.0625, seed=1)], [timed("awq", 8, 0.05, seed=2)])
    assert re.search(
        r"awq is 2\d % faster than base \[2\d to 2\d\] at batch 8\.", comparison.verdict()
    )


def test_published_document(published: Comparison) -> None:
    document = json.loads(json.dumps(published.to_dict()))
    assert (document["schema"], document["skipped"]) == (2, [])
    (place,) = document["places"]
    parts = {"where", "base", "awq", "same_batch", "cards", "budgets", "crossover", "verdict"}
    assert parts | {"recommendations", "caveats", "claims"} == place.keys()
    assert place["where"] == "NVIDIA A100-SXM4-40GB"
    assert place["base"]["weights"] == "hub:TomoroAI/tomoro-colqwen3-embed-4b"
    assert place["base"]["device"] == "NVIDIA A100-SXM4-40GB"
    assert place["same_batch"][0]["low"] is None
    assert "These figures come from the report; they were not measured here." in place["caveats"]
    assert any(caveat.startswith("Some rates have no interval") for caveat in place["caveats"])


def test_published_on_the_screen(published: Comparison) -> None:
    table = published.speed_table()
    assert list(table["speed vs base, %"]) == ["-50.8", "-59.4", "-52.8", "-27.1", "-4.0", "+0.3"]
    assert list(table["memory saved, %"]) == [59.4, 59.1, 58.3, 57.1, 54.6, 50.0]
    cards = published.card_table()
    assert list(cards["batch"]) == ["-", 512, 256, 512, 256, 512, 256, 512]
    assert list(cards["headroom MiB"][:2]) == ["-", 291]
    assert list(cards["note"][:2]) == ["batch 8: 8,527 MiB", "-"]
    assert list(cards["GB"][:2]) == [8, 8]
    assert "<table" in published._repr_html_()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("source", ["published", "h100/ways.jsonl", "h100/pages.jsonl"])
def test_text_is_plain_and_fits_the_terminal(source: str, width: int) -> None:
    results = Results.load(source if source == "published" else OUTPUTS / source)
    text = compare(results, results).text(width)
    assert max(map(len, text.splitlines())) <= width
    assert not re.search(r"^#|\| ---|\*\*|\bnan\b|<NA>|\bNone\b|Overhead", text, re.M)


def test_comparing_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from colqwen_lab.analysis.compare import compare;"
        "from colqwen_lab.analysis.table import Results; r = Results.load('published');"
        "c = compare(r, r); c.to_dict(); c.markdown(); c.text();"
        "sys.exit(' '.join({'torch', 'matplotlib', 'transformers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- which series


def test_base_is_taken_by_name_and_the_other_as_the_only_one() -> None:
    both = [cell("awq", 8), cell("base", 8)]
    comparison = versus(both, both)
    assert (comparison.base.variant, comparison.awq.variant) == ("base", "awq")
    comparison = versus([cell("w8a16", 8)], [cell("base", 8), cell("awq", 8)])
    assert (comparison.base.variant, comparison.awq.variant) == ("w8a16", "awq")


def test_control_is_the_same_variant_twice() -> None:
    rows = [timed("awq", batch, 0.05) for batch in (8, 16)]
    comparison = versus(rows, rows)
    assert (comparison.base.label, comparison.awq.label) == ("awq (A)", "awq (B)")
    assert [row.verdict for row in comparison.speeds] == ["inconclusive"] * 2
    for row in comparison.speeds:
        assert row.low is not None
        assert row.high is not None
        assert row.low < 0 < row.high


@pytest.mark.parametrize(
    ("base", "awq", "named"),
    [
        (
            [("awq", {}), ("w8a16", {})],
            [("awq", {})],
            "base must hold one series, got awq; w8a16",
        ),
        (
            [("base", {})],
            [("awq", {"size": "8b"})],
            "must share their settings, got base with 4b .* awq with 8b ",
        ),
        (
            [("base", {})],
            [("awq", {"execution": "fast"})],
            "must share their settings, .* eager .* fast ",
        ),
        ([("base", {})], [], "awq must hold one series, got no cell"),
    ],
)
def test_ambiguous_or_unlike_series_are_bad_input(
    base: list[Any], awq: list[Any], named: str
) -> None:
    sides = [[cell(variant, 8, **changes) for variant, changes in side] for side in (base, awq)]
    with pytest.raises(BadInput, match=named) as caught:
        versus(*sides)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- speed at the same batch


@pytest.mark.parametrize(
    ("rate", "verdict"),
    [
        (98.1, "inconclusive"),
        (101.9, "inconclusive"),
        (97.9, "slower"),
        (102.1, "faster"),
        (100, "inconclusive"),
    ],
)
def test_two_percent_is_the_line_without_samples(rate: float, verdict: str) -> None:
    (row,) = versus([cell("base", 8)], [cell("awq", 8, rate)]).speeds
    assert row.verdict == verdict


def test_interval_must_lie_on_one_side_of_zero() -> None:
    narrow = versus([timed("base", 8, 0.05, seed=1)], [timed("awq", 8, 0.053, seed=2)]).speeds[0]
    wide = versus([timed("base", 8, 0.05, 0.3, 1)], [timed("awq", 8, 0.053, 0.3, 2)]).speeds[0]
    assert narrow.verdict == "slower"
    assert narrow.low is not None
    assert narrow.high is not None
    assert narrow.low < narrow.percent < narrow.high < 0
    assert abs(wide.percent) > 2
    assert wide.verdict == "inconclusive"


def test_interval_is_the_same_every_time_and_covers_the_truth() -> None:
    covered = 0
    for seed in range(0, 60, 2):
        sides = [timed("base", 8, 0.050, 0.05, seed)], [timed("awq", 8, 0.0625, 0.05, seed + 1)]
        row, again = (versus(*sides).speeds[0] for _ in range(2))
        assert (row.low, row.high) == (again.low, again.high)
        covered += row.low <= -20 <= row.high  # type: ignore[operator]
    assert 25 <= covered <= 30


@pytest.mark.parametrize("swapped", [False, True])
def test_without_a_significant_difference_no_sentence_names_a_faster_side(swapped: bool) -> None:
    """Steps that differ wildly: neither is the faster, at no batch and under no budget."""
    steps = [[0.05, 0.1] * 10, [0.045, 0.094] * 10]
    sides = [
        [cell(variant, 8, step_s=step_s, items_per_s=rate_of(step_s, 8))]
        for variant, step_s in zip(
            ("base", "awq"), reversed(steps) if swapped else steps, strict=True
        )
    ]
    comparison = versus(*sides)
    assert comparison.speeds[0].verdict == "inconclusive"
    assert (comparison.speeds[0].percent > 2) is not swapped
    text = " ".join([comparison.verdict(), *(one.sentence for one in comparison.recommendations)])
    assert "faster" not in text
    assert "slower" not in text
    assert "No significant difference at batch 8 (" in text
    crossover = "The median rate of base is at least" if swapped else "No crossover: "
    assert crossover in comparison.verdict()


LIKE = {"kind": "queries", "batch_size": 8, "texts": "report", "tokens": 18}
PAGES = {"kind": "pages", "batch_size": 8, "pages": "3 files ab", "visual_tokens": 1280}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"workload": Workload(**LIKE | {"texts": "natural"})}, "texts (report against natural)"),
        ({"workload": Workload(**LIKE | {"tokens": 20})}, "tokens (18 against 20)"),
        (
            {"backend": Backend(requested="auto", dtype="float32")},
            "dtype (float16 against float32)",
        ),
    ],
)
def test_unequal_workloads_give_no_verdict(changes: dict[str, Any], reason: str) -> None:
    base = timed("base", 8, 0.05, workload=Workload(**LIKE))
    awq = timed("awq", 8, 0.1, **{"workload": base.workload} | changes)
    comparison = versus([base], [awq])
    (row,) = comparison.speeds
    assert (row.verdict, row.low, row.reason) == ("inconclusive", None, reason)
    assert f"No verdict at batch 8 (-50.0 %): {reason}." in comparison.verdict()
    assert "slower" not in comparison.text(100)
    if not reason.startswith("tokens"):
        assert comparison.no_budgets == "the two sides were not measured under the same conditions"
        assert list(comparison.cards["ratio"].dropna()) == []


def test_a_failed_cell_that_knows_no_dtype_is_no_difference() -> None:
    lost = failed("awq", 16).model_copy(update={"backend": Backend(requested="auto")})
    comparison = versus([timed("base", 8, 0.05)], [timed("awq", 8, 0.1), lost])
    assert (comparison.no_budgets, comparison.speeds[0].verdict) == ("", "slower")


@pytest.mark.parametrize("other", [{"pages": "4 files cd"}, {"visual_tokens": 640}])
def test_other_pages_or_budgets_are_not_compared(other: dict[str, Any]) -> None:
    sides = [[timed("base", 8, 0.05, workload=Workload(**PAGES))]]
    sides += [[timed("awq", 8, 0.1, workload=Workload(**PAGES | other))]]
    with pytest.raises(BadInput, match="must share their settings"):
        versus(*sides)


def test_a_quantised_folder_named_base_is_not_base(tmp_path: Path) -> None:
    base = timed("base", 8, 0.05)
    bits = Quantization(bits=4, group_size=128, sym=True)
    packed = timed("base", 8, 0.1, quantization=bits, weights="folder:base#1")
    (tmp_path / "rows.jsonl").write_text(packed.to_line() + base.to_line())
    rows = Results.load(tmp_path / "rows.jsonl")
    comparison = compare(rows, rows)
    assert (comparison.base.variant, comparison.awq.variant) == ("base", "./base")
    assert comparison.verdict().startswith("./base is 50 % slower than base")


def test_a_million_samples_are_compared() -> None:
    """By the law of the median's rank, which resampling follows too."""
    draw = random.Random(0)
    few = [0.05 * draw.gauss(1, 0.05) for _ in range(2000)]
    sides = [cell("base", 8, step_s=few), cell("awq", 8, step_s=[0.9 * step for step in few])]
    exact = speed.speed_ratio(*sides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "MOST_SAMPLES", 1000)
        fast = speed.speed_ratio(*sides)
    for one, other in ((exact.low, fast.low), (exact.high, fast.high)):
        assert one == pytest.approx(other, abs=0.1)
    many = [few[n % 2000] for n in range(10**6)]
    row = speed.speed_ratio(sides[0], sides[1].model_copy(update={"step_s": many}))
    assert row.low is not None
    assert row.high is not None
    assert row.high - row.low < 1


def test_thousands_of_series_take_moments_and_say_what_is_left(tmp_path: Path) -> None:
    cells = [
        cell(variant, batch, size=f"size {number}")
        for number in range(1000)
        for variant in ("base", "awq")
        for batch in (8, 16)
    ]
    results = Results(tuple(cells))
    start = time.process_time()
    assert [len(series.cells) for series in results.series()] == [2] * 2000
    comparison = compare(results, results)
    assert time.process_time() - start < 3
    assert len(comparison.places) == 50
    assert comparison.skipped == ("950 of 1000 places are not compared; narrow the records.",)
    with pytest.raises(BadInput, match="at most 200 series are shown at once, got 2000"):
        results.plot()
    with pytest.raises(BadInput, match="at most 200 series are shown at once, got 2000"):
        ablation.load(str(results.save(tmp_path / "rows.jsonl")))


def test_unlike_batches_are_compared_by_the_time_of_the_whole_set() -> None:
    """awq takes half the time on two small batches and twice the time on the large one."""
    work = Workload(kind="pages", batch_size=1, shapes=[0, 0, 1])
    cells = [
        cell(variant, 1, workload=work, step_s=steps, items_per_s=rate_of(steps, 1, work.shapes))
        for variant, steps in (("base", [1.0, 1.01, 10.0] * 6), ("awq", [0.5, 0.51, 20.0] * 6))
    ]
    (row,) = versus(*([one] for one in cells)).speeds
    assert row.percent == pytest.approx(100 * (12.01 / 21.01 - 1), abs=0.1)
    assert row.low <= row.percent <= row.high
    assert row.verdict == "slower"


@pytest.mark.parametrize("side", ["base", "awq"])
def test_a_disturbed_cell_gives_no_verdict(side: str) -> None:
    note = "other processes took 40% of the CPU"
    notes: dict[str, Any] = {
        name: {"interference": [note] if name == side else []} for name in ("base", "awq")
    }
    comparison = versus(
        [timed("base", 8, 0.05, **notes["base"]), timed("base", 16, 0.05)],
        [timed("awq", 8, 0.1, **notes["awq"]), timed("awq", 16, 0.1)],
    )
    first, second = comparison.speeds
    assert (first.verdict, second.verdict) == ("inconclusive", "slower")
    assert first.reason == f"disturbed ({note})"
    assert first.low is not None
    assert f"No verdict at batch 8 (-50.0 %): disturbed ({note})." in comparison.verdict()
    assert "1 of 4 cells were disturbed: no verdict on their speed." in comparison.caveats
    assert note in comparison.text() + comparison.markdown()
    assert comparison.cells[0].interference or side == "awq"
    assert comparison.to_dict()["places"][0][side]["disturbed"] == [8]


def test_no_interval_below_six_samples() -> None:
    few = timed("base", 8, 0.05)
    few = few.model_copy(update={"step_s": few.step_s[:5]})
    (row,) = versus([few], [timed("awq", 8, 0.06)]).speeds
    assert (row.low, row.high, row.verdict) == (None, None, "slower")


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "NVIDIA L4"},
        {"driver": "550"},
        {"cuda": "13.0"},
        {"torch": "2.13.0"},
        {"cpu": "Xeon"},
        {"threads": 2},
        {"power_limit_w": 300.0},
    ],
)
def test_across_machines_no_verdict_on_speed(change: dict[str, Any]) -> None:
    there = FIRST.environment.model_copy(update=change)
    comparison = versus([timed("base", 8, 0.05)], [timed("awq", 8, 0.1, environment=there)])
    (row,) = comparison.speeds
    assert (row.verdict, row.low) == ("inconclusive", None)
    assert comparison.cards["ratio"].isna().all()
    assert comparison.crossover == {}
    assert any(
        caveat.startswith(f"No verdict on speed: the two sides differ in {next(iter(change))}")
        for caveat in comparison.caveats
    )
    assert {row.use for row in comparison.recommendations} == {"either"}
    assert "None" not in " ".join(comparison.caveats)


def test_other_hour_and_commit_are_one_machine() -> None:
    there = FIRST.environment.model_copy(update={"started_at": "later", "commit": "abc"})
    assert (
        versus([cell("base", 8)], [cell("awq", 8, 50, environment=there)]).speeds[0].verdict
        == "slower"
    )


def test_prediction_against_measurement_has_no_verdict() -> None:
    comparison = versus([cell("base", 8)], [cell("awq", 8, 50, origin="predicted")])
    assert comparison.speeds[0].verdict == "inconclusive"
    assert "These figures are predictions; they were not measured." in comparison.caveats


def test_no_shared_batch_is_an_empty_table() -> None:
    comparison = versus([cell("base", 8)], [cell("awq", 16)])
    assert (comparison.speeds, savings(comparison)) == ((), {})
    assert comparison.speed_table().empty
    json.dumps(comparison.to_dict())
    assert comparison.markdown()
    assert comparison._repr_html_()


@settings(deadline=None, max_examples=80)
@given(st.floats(0.1, 1e4), st.floats(0.1, 1e4))
def test_swapping_the_sides_inverts_the_ratio(a: float, b: float) -> None:
    there = versus([cell("base", 8, a)], [cell("awq", 8, b)]).speeds[0]
    back = versus([cell("awq", 8, b)], [cell("base", 8, a)]).speeds[0]
    assert (1 + there.percent / 100) * (1 + back.percent / 100) == pytest.approx(1)
    if abs(there.percent) > 2.1:
        assert {there.verdict, back.verdict} == {"faster", "slower"}


# ---------------------------------------------------------------- what did not work


def test_failed_cells_are_kept_and_enter_no_figure() -> None:
    broken = cell("awq", 16, status="failed", reason="a kernel broke")
    comparison = versus(
        [cell("base", 8), cell("base", 16)], [cell("awq", 8), broken, failed("awq", 32)]
    )
    assert [row.batch_size for row in comparison.speeds] == [8]
    assert comparison.to_dict()["places"][0]["awq"]["not_ok"] == [
        {"batch_size": 16, "status": "failed", "reason": "a kernel broke"},
        {"batch_size": 32, "status": "oom", "reason": "asked for 2 GiB"},
    ]
    assert "awq batch 16: failed, a kernel broke." in comparison.caveats
    assert fit(comparison, "awq").note == "batch 16: failed"


def test_nothing_worked_is_still_a_comparison() -> None:
    comparison = versus([failed("base", 8)], [failed("awq", 8)])
    assert "No crossover: one side has no row with a rate and a peak." in comparison.verdict()
    assert fit(comparison, "base").note == "batch 8: oom"
    assert comparison.markdown()
    assert repr(comparison)


# ---------------------------------------------------------------- caveats


def test_caveats_say_what_the_figures_cannot() -> None:
    on_cpu = Environment(cpu="Xeon", threads=2)
    timing = Timing(warmup_steps=3, steady=True, stopped="steps", clock="perf_counter")
    base = timed(
        "base", 8, 0.05, environment=on_cpu, memory=Memory(peak_bytes=MIB, method="tracked")
    )
    changes = {"weights": "random (seed 0)", "timing": timing, "environment": on_cpu}
    longer = Workload(kind="queries", batch_size=8, texts="natural", tokens=30)
    awq = timed("awq", 8, 0.05, workload=longer, **changes)
    caveats = versus([base], [awq]).caveats
    for start in (
        "Some rates come from a CPU",
        "Peaks come from tracked tensors and from the CUDA allocator.",
        "Random weights: the embeddings mean nothing.",
        "The two were not interleaved",
        "No verdict on speed: the two sides differ in texts (report against natural).",
    ):
        assert any(caveat.startswith(start) for caveat in caveats), (start, caveats)


def test_interleaved_has_no_such_caveat() -> None:
    turns = Timing(
        warmup_steps=3,
        steady=True,
        stopped="steps",
        interleaved_with=["base"],
        clock="perf_counter",
    )
    caveats = versus([timed("base", 8, 0.05)], [timed("awq", 8, 0.05, timing=turns)]).caveats
    assert not any("interleaved" in caveat or "error bars" in caveat for caveat in caveats)


# ---------------------------------------------------------------- under a budget


def test_need_is_measured_where_it_can_be() -> None:
    assumed = Memory(peak_bytes=GIB, method="cuda", device_bytes=3 * GIB)
    known = Memory(peak_bytes=GIB, method="cuda", device_bytes=3 * GIB, reserved_bytes=2 * GIB)
    assert need_bytes(assumed) == (GIB + 200 * MB, GIB + 700 * MB)
    assert need_bytes(known) == (2 * GIB, 2 * GIB)


def test_fits_tight_and_not() -> None:
    nominal = 8 * GIB
    sizes = [usable(nominal) - 700 * MB, nominal - 200 * MB]
    memories = [Memory(peak_bytes=size + more, method="cuda") for size in sizes for more in (0, 1)]
    assert [fit_of(memory, nominal) for memory in memories] == [
        "fits",
        "tight",
        "tight",
        "does not fit",
    ]


def test_tight_is_flagged_with_negative_headroom() -> None:
    rows = [cell("awq", 8, peak=7 * GIB + 500 * MIB), cell("awq", 16, peak=7 * GIB + 600 * MIB)]
    tight = fit(versus([cell("base", 8)], rows), "awq")
    assert (tight.verdict, tight.batch_size) == ("tight", 16)
    assert tight.headroom_bytes < 0
    mixed = fit(versus([cell("base", 4)], [cell("awq", 4, peak=GIB), *rows]), "awq")
    assert (mixed.verdict, mixed.batch_size, mixed.note) == (
        "fits",
        4,
        "batch 8: 7,668 MiB",
    )


rows = st.dictionaries(
    st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]),
    st.tuples(st.floats(1, 2000), st.integers(700 * MIB, 30 * GIB)),
    min_size=1,
    max_size=6,
)


def side(variant: str, figures: dict[int, tuple[float, int]]) -> list[Cell]:
    return [cell(variant, batch, rate, peak) for batch, (rate, peak) in figures.items()]


@settings(deadline=None, max_examples=80)
@given(rows, st.floats(0.5, 40), st.floats(0.5, 40))
def test_more_memory_never_fits_less(
    figures: dict[int, tuple[float, int]], one: float, other: float
) -> None:
    cards = tuple(sorted((one, other)))
    comparison = versus(side("base", figures), side("awq", figures), cards=cards)
    small, large = fit(comparison, "base", 0), fit(comparison, "base", 1)
    order = ["does not fit", "tight", "fits"]
    assert order.index(small.verdict) <= order.index(large.verdict)
    if small.verdict == "fits":
        assert small.batch_size <= large.batch_size
        assert small.items_per_s <= small.best_items_per_s <= large.best_items_per_s


@settings(deadline=None, max_examples=60)
@given(rows, rows)
def test_crossover_agrees_with_the_cards(base: dict[int, Any], awq: dict[int, Any]) -> None:
    comparison = versus(side("base", base), side("awq", awq), cards=(64,))
    everything = fit(comparison, "base").ratio
    assert everything is not None
    assert bool(comparison.crossover) == (everything <= 1)
    if not comparison.crossover:
        return
    start = comparison.crossover["nominal_bytes"]
    ours, _ = fit_at(comparison, start / GIB)
    assert ours.batch_size == comparison.crossover["base_batch_size"]
    assert ours.items_per_s == comparison.crossover["base_items_per_s"]
    for more in (1, 1.1, 1.5, 2, 5):
        ours, theirs = fit_at(comparison, start / GIB * more)
        assert ours.verdict == "fits"
        assert theirs.verdict != "fits" or (ours.ratio or 0) <= 1
    ours, theirs = fit_at(comparison, (start - 1) / GIB)
    holds = ours.verdict == "fits" and (theirs.verdict != "fits" or (ours.ratio or 2) <= 1)
    assert not holds


def test_budgets_say_nothing_of_models_that_every_card_holds() -> None:
    small = [[cell(variant, 8, peak=peak * MIB)] for variant, peak in (("base", 20), ("awq", 10))]
    comparison = versus(*small)
    assert "No crossover: every card holds models this small." in comparison.verdict()
    assert not any("GiB" in one.sentence for one in comparison.recommendations)
    assert list(comparison.cards["verdict"]) == ["fits"] * 8


def test_a_crossover_where_only_base_fits_names_no_batch_of_awq() -> None:
    comparison = versus([cell("base", 8, 100)], [cell("awq", 8, 50, peak=2 * GIB)])
    assert "There base runs batch 8, and awq none." in comparison.verdict()


def test_base_that_is_always_overtaken_has_no_crossover() -> None:
    comparison = versus([cell("base", 8, 100)], [cell("awq", 8, 200)])
    assert comparison.crossover == {}
    assert "No crossover: awq is faster where every row fits." in comparison.verdict()


# ---------------------------------------------------------------- several devices


def fleet() -> Comparison:
    """Two GPUs; on the small one base runs out of memory at 16. A third holds base alone."""
    rates = {
        ("A100", "base"): 100.0,
        ("A100", "awq"): 50.0,
        ("L4", "base"): 20.0,
        ("L4", "awq"): 30.0,
    }
    cells = [
        cell(variant, batch, rate * batch, environment=Environment(gpu=gpu))
        for (gpu, variant), rate in rates.items()
        for batch in (8, 16)
        if (gpu, variant, batch) != ("L4", "base", 16)
    ]
    cells += [failed("base", 16).model_copy(update={"environment": Environment(gpu="L4")})]
    cells += [cell("base", 8, environment=Environment(gpu="T4 <b>"))]
    both = Results(tuple(cells))
    return compare(both, both)


def test_each_device_has_a_comparison_of_its_own() -> None:
    comparison = fleet()
    verdicts = {
        where: {speed.batch_size: speed.verdict for speed in place.speeds}
        for where, place in comparison.places.items()
    }
    assert verdicts == {"A100": {8: "slower", 16: "slower"}, "L4": {8: "faster"}}
    assert comparison.skipped == ("T4 <b>: nothing to compare with.",)
    for place in comparison.places.values():
        assert len({c.environment.gpu for c in place.cells}) == 1
        assert not any("No verdict on speed" in caveat for caveat in place.caveats)


def test_place_table_has_the_largest_batch_and_the_rate_there() -> None:
    table = fleet().place_table().set_index(["where", "variant"])
    assert table["batch"].to_dict() == {
        ("A100", "base"): 16,
        ("A100", "awq"): 16,
        ("L4", "base"): 8,
        ("L4", "awq"): 16,
    }
    assert table.loc[("L4", "base"), "not ok"] == "16 oom"
    assert table.loc[("L4", "awq"), "items/s"] == 480


def test_side_by_side_on_the_screen_and_as_json() -> None:
    comparison = fleet()
    assert list(comparison.side_by_side().index) == [8, 16]
    assert list(comparison.side_by_side()["L4"]) == ["+50.0 % faster", "-"]
    markdown, html = comparison.markdown(), comparison._repr_html_()
    assert markdown.count("## Comparison at the same batch size") == 2
    assert "nan" not in markdown
    assert "<b>" not in markdown + html
    document = json.loads(json.dumps(comparison.to_dict()))
    assert [place["where"] for place in document["places"]] == ["A100", "L4"]
    assert document["places"][1]["same_batch"][0]["verdict"] == "faster"
    assert comparison.verdict().splitlines()[1].startswith("L4: ")
    assert len(comparison.plot("throughput").axes[0].get_lines()) >= 4


def test_one_device_is_one_place() -> None:
    both = Results((cell("base", 8), cell("awq", 8)))
    comparison = compare(both, both)
    assert comparison.places == {"NVIDIA A100-SXM4-40GB": comparison}


def test_settings_that_differ_are_places_too() -> None:
    both = Results(
        tuple(cell(v, 8, execution=e) for e in ("eager", "fast") for v in ("base", "awq"))
    )
    assert list(compare(both, both).places) == ["eager", "fast"]


def test_budgets_and_kernels_are_places_and_8_bit_base_is_no_base() -> None:
    results = Results.load(OUTPUTS / "h100" / "ways.jsonl")
    comparison = compare(results, results)
    assert list(comparison.places) == [
        "eager, published",
        "eager, lean",
        "fast, lean, awq (tritonv2)",
        "fast, lean, awq (auto)",
    ]
    assert comparison.skipped == ()
    kernels = {place.base.first.backend.requested for place in comparison.places.values()}
    assert kernels == {"auto"}
    assert len(comparison.plot("throughput").axes[0].containers) == 7
    pages = Results.load(OUTPUTS / "h100" / "pages.jsonl")
    assert len(compare(pages, pages).places) == 3


def test_several_models_are_places() -> None:
    both = Results(tuple(cell(variant, 8) for variant in ("base", "awq", "W8A16")))
    gpu = "NVIDIA A100-SXM4-40GB"
    assert list(compare(both, both).places) == [f"{gpu}, awq", f"{gpu}, W8A16"]


def test_without_cards_there_is_no_card_table() -> None:
    comparison = versus([cell("base", 8)], [cell("awq", 8)], cards=())
    assert comparison.card_table().empty
    assert all((comparison.text(80), comparison.markdown(), comparison._repr_html_()))
    assert comparison.to_dict()["places"][0]["cards"] == []


def test_the_figures_of_one_place_and_of_several() -> None:
    one = versus([timed("base", 8, 0.05)], [timed("awq", 8, 0.06)], cards=(8,))
    for comparison in (one, fleet()):
        for kind in ("speed", "throughput", "memory", "tradeoff"):
            assert comparison.plot(kind).axes
    with pytest.raises(BadInput, match="valid: speed, throughput"):
        one.plot("overhead")


def test_models_measured_up_to_unlike_batches_are_said() -> None:
    cells = [timed("base", 8, 0.05), timed("base", 64, 0.3)], [timed("awq", 8, 0.1)]
    said = "Measured were base up to batch 64 and awq up to batch 8: largest batches are of these."
    assert said in versus(*cells).caveats
    assert not [c for c in versus(*(side[:1] for side in cells)).caveats if "Measured were" in c]
