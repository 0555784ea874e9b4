from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colqwen_lab.analysis.compare import Comparison, SideBySide, by_place, compare, on_card
from colqwen_lab.analysis.results import Results, Series
from colqwen_lab.errors import BadInput
from colqwen_lab.hardware import fit_of, need_bytes, usable
from colqwen_lab.records import (
    GIB,
    MIB,
    Cell,
    Environment,
    Memory,
    Rate,
    Timing,
    Workload,
    published_cells,
    rate_of,
)

FIRST = published_cells()[0]
MB = 10**6


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


def lost(variant: str, batch: int, status: str = "oom") -> Cell:
    return cell(
        variant, batch, status=status, reason="asked for 2 GiB", items_per_s=None, memory=None
    )


@pytest.fixture(scope="module")
def published() -> Comparison:
    results = Results.load("published")
    return compare(results, results)


# ---------------------------------------------------------------- the published figures


def test_published_overheads_at_every_shared_batch(published: Comparison) -> None:
    found = {row.batch_size: round(row.overhead_percent, 1) for row in published.overhead}
    assert found == {8: -50.8, 16: -59.4, 32: -52.8, 64: -27.1, 128: -4.0, 256: 0.3}
    assert [row.verdict for row in published.overhead] == ["slower"] * 5 + ["cannot tell"]
    assert all(row.low is None and row.high is None for row in published.overhead)


def test_published_savings(published: Comparison) -> None:
    found = {row.batch_size: round(row.saving_percent, 1) for row in published.memory}
    assert found == {8: 59.4, 16: 59.1, 32: 58.3, 64: 57.1, 128: 54.6, 256: 50.0}


def test_published_cards(published: Comparison) -> None:
    eight, twelve, sixteen, twenty_four = published.cards
    assert (eight.base.verdict, eight.base.batch_size, eight.ratio) == ("does not fit", None, None)
    assert eight.base.note == "batch 8 alone peaks at 8,527 MiB"
    assert (eight.awq.verdict, eight.awq.batch_size, eight.awq.items_per_s) == ("fits", 512, 951)
    assert (eight.awq.best_batch_size, eight.awq.best_items_per_s) == (256, 969)
    assert eight.awq.headroom_bytes == usable(8 * GIB) - 6963 * MIB - 700 * MB > 0
    for card in (twelve, sixteen, twenty_four):
        assert (card.base.verdict, card.base.batch_size, card.base.items_per_s) == (
            "fits",
            256,
            966,
        )
        assert card.base.note == "larger not measured"
        assert card.ratio == pytest.approx(951 / 966)


def test_published_crossover(published: Comparison) -> None:
    found = published.crossover
    assert found.budget_bytes == 10220 * MIB + 700 * MB
    assert (found.base_batch_size, found.awq_batch_size) == (256, 512)
    assert (found.base_items_per_s, found.awq_items_per_s) == (966, 951)


def test_published_recommendations_cite_their_figures(published: Comparison) -> None:
    said = [(one.use, one.sentence) for one in published.recommendations]
    fits_at, base_at = ((peak * MIB + 700 * MB) / GIB for peak in (3458, 8527))
    assert (
        "awq",
        f"From {fits_at:.2f} GiB of usable memory to {base_at:.2f} GiB awq fits, base does not.",
    ) in said
    assert ("awq", "awq saves 50.0 to 59.4 % of the peak at batch 8, 16, 32, 64, 128, 256.") in said
    assert (
        "base",
        "At the same batch awq is slower at batch 8, 16, 32, 64, 128 (-59.4 to -4.0 %).",
    ) in said
    assert (
        "either",
        "At the same batch the rates are not told apart at batch 256 (+0.3 %).",
    ) in said
    assert (
        "base",
        f"A step of 8 takes {8000 / 191:.1f} ms with base and {8000 / 94:.1f} ms with awq.",
    ) in said
    assert any(use == "either" and "differ by less than 2 %" in sentence for use, sentence in said)


def test_published_document(published: Comparison) -> None:
    document = json.loads(json.dumps(published.to_dict()))
    parts = {
        "base",
        "awq",
        "overhead",
        "memory",
        "cards",
        "crossover",
        "recommendations",
        "caveats",
        "claims",
    }
    assert parts <= document.keys()
    assert document["base"]["weights"] == "hub:TomoroAI/tomoro-colqwen3-embed-4b"
    assert document["base"]["device"] == "NVIDIA A100-SXM4-40GB"
    assert document["overhead"][0]["low"] is None
    assert "The figures are published." in document["caveats"]
    assert any(caveat.startswith("No interval") for caveat in document["caveats"])


def test_published_on_the_screen(published: Comparison) -> None:
    assert repr(published).splitlines()[1] == "batch 8: -50.8 %  slower"
    assert "slower at batch 8, 16, 32, 64, 128; cannot tell at batch 256" in published.verdict()
    table = published.overhead_table()
    assert list(table["overhead %"]) == [-50.8, -59.4, -52.8, -27.1, -4.0, 0.3]
    assert list(table["memory saved %"]) == [59.4, 59.1, 58.3, 57.1, 54.6, 50.0]
    cards = published.card_table()
    assert cards["largest batch"].isna().sum() == 1
    assert list(cards["card GB"][:2]) == [8, 8]
    assert "<table" in published._repr_html_()


def test_comparing_needs_neither_torch_nor_pandas() -> None:
    code = (
        "from colqwen_lab.analysis.compare import compare; from colqwen_lab.analysis.results import Results; import sys;"
        "r = Results.load('published'); c = compare(r, r); c.to_dict(); c.markdown();"
        "sys.exit(' '.join({'torch', 'pandas', 'matplotlib', 'transformers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- which series


def test_base_is_taken_by_name_and_the_other_as_the_only_one() -> None:
    both = [cell("awq", 8), cell("base", 8)]
    found = versus(both, both)
    assert (found.base.variant, found.awq.variant) == ("base", "awq")
    found = versus([cell("w8a16", 8)], [cell("base", 8), cell("awq", 8)])
    assert (found.base.variant, found.awq.variant) == ("w8a16", "awq")


def test_control_is_the_same_variant_twice() -> None:
    rows = [timed("awq", batch, 0.05) for batch in (8, 16)]
    found = versus(rows, rows)
    assert (found.base.label, found.awq.label) == ("awq (A)", "awq (B)")
    assert [row.verdict for row in found.overhead] == ["cannot tell"] * 2
    for row in found.overhead:
        assert row.low is not None
        assert row.high is not None
        assert row.low < 0 < row.high


@pytest.mark.parametrize(
    ("base", "awq", "named"),
    [
        (
            [("awq", {}), ("w8a16", {})],
            [("awq", {})],
            "first argument must hold one series, and holds: awq; w8a16",
        ),
        (
            [("base", {})],
            [("awq", {}), ("w8a16", {})],
            "second argument must hold one series, and holds: awq; w8a16",
        ),
        (
            [("base", {}), ("base", {"protocol": "lean"})],
            [("awq", {})],
            r"holds: base \(published\); base \(lean\)",
        ),
        ([("base", {})], [("awq", {"size": "8b"})], "not comparable: base is 4b .*, awq is 8b "),
        ([("base", {})], [("awq", {"execution": "fast"})], "not comparable: .* eager .* fast "),
        ([("base", {})], [], "second argument .* holds: no cell"),
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
        (98.1, "cannot tell"),
        (101.9, "cannot tell"),
        (97.9, "slower"),
        (102.1, "faster"),
        (100, "cannot tell"),
    ],
)
def test_two_percent_is_the_line_without_samples(rate: float, verdict: str) -> None:
    (row,) = versus([cell("base", 8)], [cell("awq", 8, rate)]).overhead
    assert row.verdict == verdict


def test_interval_must_lie_on_one_side_of_zero() -> None:
    narrow = versus([timed("base", 8, 0.05, seed=1)], [timed("awq", 8, 0.053, seed=2)]).overhead[0]
    wide = versus([timed("base", 8, 0.05, 0.3, 1)], [timed("awq", 8, 0.053, 0.3, 2)]).overhead[0]
    assert narrow.verdict == "slower"
    assert narrow.low is not None
    assert narrow.high is not None
    assert narrow.low < narrow.overhead_percent < narrow.high < 0
    assert abs(wide.overhead_percent) > 2
    assert wide.verdict == "cannot tell"


def test_interval_is_the_same_every_time_and_covers_the_truth() -> None:
    covered = 0
    for seed in range(0, 60, 2):
        sides = [timed("base", 8, 0.050, 0.05, seed)], [timed("awq", 8, 0.0625, 0.05, seed + 1)]
        row, again = (versus(*sides).overhead[0] for _ in range(2))
        assert (row.low, row.high) == (again.low, again.high)
        covered += row.low <= -20 <= row.high  # type: ignore[operator]
    assert 25 <= covered <= 30


@pytest.mark.parametrize("swapped", [False, True])
def test_what_no_interval_tells_no_sentence_does(swapped: bool) -> None:
    """Steps that differ wildly: neither is the faster, at no batch and under no budget."""
    steps = [[0.05, 0.1] * 10, [0.045, 0.094] * 10]
    sides = [
        [cell(variant, 8, step_s=step_s, items_per_s=rate_of(step_s, 8))]
        for variant, step_s in zip(
            ("base", "awq"), reversed(steps) if swapped else steps, strict=True
        )
    ]
    found = versus(*sides)
    assert found.overhead[0].verdict == "cannot tell"
    assert (found.overhead[0].overhead_percent > 2) is not swapped
    said = " ".join(
        [found.verdict(), found.markdown(), *(one.sentence for one in found.recommendations)]
    )
    assert "faster" not in said
    assert "slower" not in said
    assert "the rates are not told apart, each at its largest batch (" in said
    what = (
        "base is at least as fast or not told apart"
        if swapped
        else "No crossover: the rates are not told apart"
    )
    assert what in found.verdict()


@pytest.mark.parametrize(("rate", "near"), [(101.0, True), (102.03, True), (103.0, False)])
def test_a_crossover_on_less_than_what_counts_says_so(rate: float, near: bool) -> None:
    found = versus([cell("base", 8, rate)], [cell("awq", 8, 100.0)])
    for text in (found.verdict(), found.markdown()):
        assert "at least as fast" in text
        assert ("at least as fast (where that begins, by less than 2 %)" in text) is near


def test_no_interval_below_six_samples() -> None:
    few = timed("base", 8, 0.05)
    few = few.model_copy(update={"step_s": few.step_s[:5]})
    (row,) = versus([few], [timed("awq", 8, 0.06)]).overhead
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
    found = versus([timed("base", 8, 0.05)], [timed("awq", 8, 0.1, environment=there)])
    (row,) = found.overhead
    assert (row.verdict, row.low) == ("cannot tell", None)
    assert all(card.ratio is None for card in found.cards)
    assert found.crossover.budget_bytes is None
    assert any(
        caveat.startswith(f"No verdict on speed: the two sides differ in {next(iter(change))}")
        for caveat in found.caveats
    )
    assert found.recommendations == ()
    assert "None" not in " ".join(found.caveats)


def test_other_hour_and_commit_are_one_machine() -> None:
    there = FIRST.environment.model_copy(update={"started_at": "later", "commit": "abc"})
    assert (
        versus([cell("base", 8)], [cell("awq", 8, 50, environment=there)]).overhead[0].verdict
        == "slower"
    )


def test_prediction_against_measurement_has_no_verdict() -> None:
    found = versus([cell("base", 8)], [cell("awq", 8, 50, origin="predicted")])
    assert found.overhead[0].verdict == "cannot tell"
    assert "The figures are measured and predicted." in found.caveats


def test_no_shared_batch_is_empty_and_said() -> None:
    found = versus([cell("base", 8)], [cell("awq", 16)])
    assert (found.overhead, found.memory) == ((), ())
    assert "No batch size was measured on both sides." in found.caveats
    assert found.overhead_table().empty
    json.dumps(found.to_dict())
    assert found.markdown()
    assert found._repr_html_()


@settings(deadline=None, max_examples=80)
@given(st.floats(0.1, 1e4), st.floats(0.1, 1e4))
def test_swapping_the_sides_inverts_the_ratio(a: float, b: float) -> None:
    there = versus([cell("base", 8, a)], [cell("awq", 8, b)]).overhead[0]
    back = versus([cell("awq", 8, b)], [cell("base", 8, a)]).overhead[0]
    assert (1 + there.overhead_percent / 100) * (1 + back.overhead_percent / 100) == pytest.approx(
        1
    )
    if abs(there.overhead_percent) > 2.1:
        assert {there.verdict, back.verdict} == {"faster", "slower"}


# ---------------------------------------------------------------- what did not work


def test_lost_cells_are_kept_and_enter_no_figure() -> None:
    broken = cell("awq", 16, status="failed", reason="a kernel broke")
    found = versus([cell("base", 8), cell("base", 16)], [cell("awq", 8), broken, lost("awq", 32)])
    assert [row.batch_size for row in found.overhead] == [8]
    assert found.to_dict()["awq"]["not_ok"] == [
        {"batch_size": 16, "status": "failed", "reason": "a kernel broke"},
        {"batch_size": 32, "status": "oom", "reason": "asked for 2 GiB"},
    ]
    assert "awq batch 16: failed, a kernel broke." in found.caveats
    there = "NVIDIA A100-SXM4-40GB"
    assert found.cards[0].awq.note == f"batch 16 failed on {there}; batch 32 oom on {there}"


def test_nothing_worked_is_still_a_comparison() -> None:
    found = versus([lost("base", 8)], [lost("awq", 8)])
    assert found.crossover.reason == "one side has no row with a rate and a peak"
    assert found.cards[0].base.note == "no row has a peak"
    assert found.markdown()
    assert repr(found)


# ---------------------------------------------------------------- caveats


def test_caveats_say_what_the_figures_cannot() -> None:
    on_cpu = Environment(cpu="Xeon", threads=2)
    unsteady = Timing(warmup_steps=3, steady=False, stopped="steps", clock="perf_counter")
    base = timed(
        "base", 8, 0.05, environment=on_cpu, memory=Memory(peak_bytes=MIB, method="tracked")
    )
    changes = {"weights": "random (seed 0)", "timing": unsteady, "environment": on_cpu}
    longer = Workload(kind="queries", batch_size=8, texts="natural", tokens=30)
    awq = timed("awq", 8, 0.05, workload=longer, **changes)
    said = versus([base], [awq, awq]).caveats
    for start in (
        "Run on a CPU",
        "Peaks by different methods",
        "awq has untrained weights",
        "awq was not steady at batch 8",
        "awq has batch 8 more than once",
        "The two were not timed in turn",
        "The texts differs: report against natural",
        "The padded length differs: not recorded against 30",
        "Memory outside torch was not measured in every row; 200 to 700 MB",
        "Rates under a memory budget are those of Xeon",
    ):
        assert any(caveat.startswith(start) for caveat in said), start


def test_timed_in_turn_has_no_such_caveat() -> None:
    turns = Timing(
        warmup_steps=3,
        steady=True,
        stopped="steps",
        interleaved_with=["base"],
        clock="perf_counter",
    )
    said = versus([timed("base", 8, 0.05)], [timed("awq", 8, 0.05, timing=turns)]).caveats
    assert not any("in turn" in caveat or "No interval" in caveat for caveat in said)


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
    rows = (cell("awq", 8, peak=7 * GIB + 500 * MIB), cell("awq", 16, peak=7 * GIB + 600 * MIB))
    fit = on_card(Series("base", (cell("base", 8),)), Series("awq", rows), 8).awq
    assert (fit.verdict, fit.batch_size) == ("tight", 16)
    assert fit.headroom_bytes is not None
    assert fit.headroom_bytes < 0
    mixed = on_card(
        Series("base", (cell("base", 8),)), Series("awq", (cell("awq", 4, peak=GIB), *rows)), 8
    ).awq
    assert (mixed.verdict, mixed.batch_size, mixed.note) == ("fits", 4, "batch 16 is tight")


@pytest.mark.parametrize("gb", [0, -8, float("nan"), float("inf")])
def test_card_must_be_a_budget(gb: float) -> None:
    with pytest.raises(BadInput, match="memory budget in GB above 0"):
        versus([cell("base", 8)], [cell("awq", 8)], cards=(gb,))


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
    small, large = sorted((one, other))
    cards = versus(side("base", figures), side("awq", figures), cards=(small, large)).cards
    order = ["does not fit", "tight", "fits"]
    assert order.index(cards[0].base.verdict) <= order.index(cards[1].base.verdict)
    if cards[0].base.verdict == "fits":
        assert (cards[0].base.batch_size or 0) <= (cards[1].base.batch_size or 0)
        assert (cards[0].base.best_items_per_s or 0) <= (cards[1].base.best_items_per_s or 0)
        assert (cards[0].base.items_per_s or 0) <= (cards[0].base.best_items_per_s or 0)


@settings(deadline=None, max_examples=150)
@given(rows, rows)
def test_crossover_agrees_with_the_cards(base: dict[int, Any], awq: dict[int, Any]) -> None:
    found = versus(side("base", base), side("awq", awq), cards=(64,))
    everything = found.cards[0].ratio
    assert everything is not None
    start = found.crossover.nominal_bytes
    assert (start is not None) == (everything <= 1)
    if start is None:
        return
    card = on_card(found.base, found.awq, start / GIB)
    assert (card.base.batch_size, card.base.items_per_s) == (
        found.crossover.base_batch_size,
        found.crossover.base_items_per_s,
    )
    later = [on_card(found.base, found.awq, start / GIB * more) for more in (1, 1.1, 1.5, 2, 5)]
    for card in later:
        assert card.base.verdict == "fits"
        assert card.awq.verdict != "fits" or (card.ratio or 0) <= 1
    before = on_card(found.base, found.awq, (start - 1) / GIB)
    holds = before.base.verdict == "fits" and (
        before.awq.verdict != "fits" or (before.ratio or 2) <= 1
    )
    assert not holds


def test_cards_and_budgets_say_nothing_of_models_that_every_card_holds() -> None:
    small = [[cell(variant, 8, peak=peak * MIB)] for variant, peak in (("base", 20), ("awq", 10))]
    found = versus(*small, cards=(8, 12))
    why = "no batch peaks above 20 MiB, which every card holds with more than 99 % to spare"
    assert f"No crossover: {why}." in found.verdict()
    assert f"They say nothing of models this small: {why}." in found.markdown()
    assert "### 8 GB" not in found.markdown()
    assert not any("usable memory" in one.sentence for one in found.recommendations)
    assert [card.base.verdict for card in found.cards] == ["fits", "fits"]
    assert "### 1 GB" in versus(*small, cards=(1, 12)).markdown()


def test_base_that_is_always_overtaken_has_no_crossover() -> None:
    found = versus([cell("base", 8, 100)], [cell("awq", 8, 200)])
    assert found.crossover.budget_bytes is None
    assert (
        found.crossover.reason
        == "awq is the faster, each at its largest batch, even where every row fits"
    )
    assert "No crossover: awq is the faster" in found.verdict()


# ---------------------------------------------------------------- several devices


def fleet() -> SideBySide:
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
    cells += [lost("base", 16).model_copy(update={"environment": Environment(gpu="L4")})]
    cells += [cell("base", 8, environment=Environment(gpu="T4 <b>"))]
    both = Results(tuple(cells))
    return by_place(both, both)


def test_each_device_has_a_comparison_of_its_own() -> None:
    found = fleet()
    verdicts = {
        where: {row.batch_size: row.verdict for row in one.overhead}
        for where, one in found.comparisons.items()
    }
    assert verdicts == {"A100": {8: "slower", 16: "slower"}, "L4": {8: "faster"}}
    assert found.left_out == ("T4 <b>: nothing to compare with there.",)
    for one in found.comparisons.values():
        assert len({c.environment.gpu for series in (one.base, one.awq) for c in series.cells}) == 1
        assert not any("No verdict on speed" in caveat for caveat in one.caveats)


def test_gpu_table_has_the_largest_batch_and_the_rate_there() -> None:
    table = fleet().gpu_table().set_index(["where", "model"])
    assert table["largest batch"].to_dict() == {
        ("A100", "base"): 16,
        ("A100", "awq"): 16,
        ("L4", "base"): 8,
        ("L4", "awq"): 16,
    }
    assert table.loc[("L4", "base"), "not ok"] == "16 oom"
    assert table.loc[("L4", "awq"), "items/s"] == 480


def test_side_by_side_on_the_screen_and_as_json() -> None:
    found = fleet()
    assert list(found.overhead_table()["batch"]) == [8, 16]
    assert found.overhead_table()["L4: overhead"][0] == "+50.0 %, faster"
    markdown, html = found.markdown(), found._repr_html_()
    assert markdown.count("## Comparison at the same batch size") == 2
    assert "nan" not in markdown
    assert "<b>" not in markdown + html
    document = json.loads(json.dumps(found.to_dict()))
    assert list(document["side_by_side"]) == ["A100", "L4"]
    assert document["side_by_side"]["L4"]["overhead"][0]["verdict"] == "faster"
    assert len(found.plot().axes[0].get_lines()) >= 4


def test_one_device_is_a_comparison_as_ever() -> None:
    both = Results((cell("base", 8), cell("awq", 8)))
    assert isinstance(by_place(both, both), Comparison)


def test_settings_that_differ_stand_side_by_side_too() -> None:
    both = Results(
        tuple(cell(v, 8, execution=e) for e in ("eager", "fast") for v in ("base", "awq"))
    )
    assert [where.split(", ")[-1] for where in by_place(both, both).comparisons] == [
        "eager",
        "fast",
    ]


def test_budgets_and_kernels_stand_side_by_side_and_8_bit_base_is_no_base() -> None:
    root = Path(__file__).parents[2] / "outputs"
    results = Results.load(root / "h100" / "ways.jsonl")
    found = by_place(results, results)
    gpu = "NVIDIA H100 80GB HBM3"
    ways = [
        "eager, published",
        "eager, lean",
        "fast, lean, awq (tritonv2)",
        "fast, lean, awq (auto)",
    ]
    assert list(found.comparisons) == [f"{gpu}, {way}" for way in ways]
    assert found.left_out == (f"{gpu}, fast, lean: base (fp8), a way of base's own.",)
    assert {one.base.first.backend.requested for one in found.comparisons.values()} == {"auto"}
    assert len(found.plot().axes[0].containers) == 7
    pages = Results.load(root / "h100" / "pages.jsonl")
    assert len(by_place(pages, pages).comparisons) == 3


def test_several_models_stand_side_by_side() -> None:
    both = Results(tuple(cell(variant, 8) for variant in ("base", "awq", "W8A16")))
    there = "NVIDIA A100-SXM4-40GB"
    assert list(by_place(both, both).comparisons) == [f"{there}, awq", f"{there}, W8A16"]
