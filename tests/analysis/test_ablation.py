"""The tables of several ways, on the committed run of an H200."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from colqwen_lab.analysis.compare import rate
from colqwen_lab.analysis.results import Results
from colqwen_lab.errors import BadInput
from colqwen_lab.records import Work

RUN = Path(__file__).parents[2] / "outputs" / "h200" / "ways.jsonl"


@pytest.fixture(scope="module")
def results() -> Results:
    return Results.load(RUN)


def test_overhead_in_each_way(results: Results) -> None:
    table = ablation.overhead_table(results)
    assert list(table.index) == sorted(table.index)
    assert list(table.columns) == [
        "awq eager/published/tritonv2",
        "awq eager/lean/tritonv2",
        "awq eager/published/humming",
        "awq fast/lean/tritonv2",
        "awq fast/lean/auto",
        "base fast/lean/fp8",
        "awq fast/lean/w4-fp8",
    ]
    report, best = (
        table.loc[1, f"awq {way}"] for way in ("eager/published/tritonv2", "fast/lean/auto")
    )
    assert report.startswith("-49.8 [")
    assert report.endswith("slower")
    assert best.startswith("+28.5 [")
    assert best.endswith("faster")


def test_what_each_way_gains(results: Results) -> None:
    table = ablation.gains(results)
    assert (table["awq eager/published/tritonv2"] == 1).all()
    assert table.loc[8, "awq fast/lean/auto"] > 6


def test_controls_come_out_as_the_same_but_for_one(results: Results) -> None:
    """At batch 256 the GPU is at its power limit, and what ran before reaches further than one step."""
    table = ablation.controls(results)
    assert list(table.columns) == [
        "base eager/published/auto",
        "base eager/lean/auto",
        "base fast/lean/auto",
    ]
    told_apart = ~table["base fast/lean/auto"].str.endswith("cannot tell")
    assert list(table.index[told_apart]) == [256]


def test_what_each_change_buys_alone_and_together(results: Results) -> None:
    """Cache, launches and kernel, one after the other, make up all together."""
    table = ablation.ablation(results)
    steps = [
        "KV cache: eager/published/tritonv2 to eager/lean/tritonv2",
        "launches: eager/lean/tritonv2 to fast/lean/tritonv2",
        "kernel: fast/lean/tritonv2 to fast/lean/auto",
    ]
    together = "awq all: eager/published/tritonv2 to fast/lean/auto"
    for batch in table.index:
        product = math.prod(float(table.loc[batch, f"awq {step}"].split(" ")[0]) for step in steps)
        assert product == pytest.approx(float(table.loc[batch, together].split(" ")[0]), rel=0.02)
    assert "awq kernel: eager/published/tritonv2 to eager/published/humming" in table.columns
    assert table["padded tokens %"].between(0, 5).all()


def test_shares_of_the_limit_and_roofline(results: Results) -> None:
    """At rates measured in the run; work set by hand: 10 queries/s at most, for batch 4."""
    cells = [cell for cell in results if cell.batch_size == 4]
    limits = cells[0].limits
    assert limits is not None
    work = Work(flops=round(0.4 * limits.flops_per_s), min_bytes=1)
    counted = Results(tuple(cell.model_copy(update={"work": work}) for cell in cells))
    table = ablation.shares(counted)
    assert not any("fp8" in column for column in table.columns)
    (column,) = (one for one in table.columns if one.startswith("base fast/lean/auto"))
    assert column == "base fast/lean/auto (measured in the run)"
    (cell,) = (
        one
        for one in cells
        if (one.variant, one.execution, one.backend.requested) == ("base", "fast", "auto")
    )
    assert table.loc[4, column] == round(100 * rate(cell) / 10, 1)
    sheet = Results(tuple(cell.model_copy(update={"limits": None}) for cell in counted))
    assert "base fast/lean/auto (data sheet)" in ablation.shares(sheet).columns
    labels = [line.get_label() for line in counted.plot("roofline").axes[0].lines]
    assert labels[:2] == ["roof of base's weights", "roof of awq's weights"]
    assert len(labels) == 2 + len(counted.series())
    with pytest.raises(
        BadInput, match=r"no cell carries its work and a limit; valid: lab.explain\(results\)"
    ):
        results.plot("roofline")


def test_eight_bit_ways_carry_their_error(results: Results) -> None:
    table = ablation.eight_bits(results)
    assert set(table["way"]) == {"base fast/lean/fp8", "awq fast/lean/w4-fp8"}
    assert table["cosine mean"].notna().all()
    assert (table["against"].str.split(" ").str[0] == table["way"].str.split(" ").str[0]).all()


def test_the_verdict_is_made_of_the_figures(results: Results) -> None:
    said = ablation.verdict(results)
    assert "first way: eager/published/tritonv2: slower at batch 1, 2" in said
    assert "best way: fast/lean/auto: faster at batch 1, 2" in said
    assert "awq gains 2.2 to 30.2 times from the first way to the best." in said
    assert "A/A controls" in said
    lines = [line.get_label() for line in ablation.overhead_plot(results).axes[0].containers]
    assert lines == ["first way: eager/published/tritonv2", "best way: fast/lean/auto"]


def test_two_runs_of_different_batches() -> None:
    both = ablation.load(f"{RUN},{RUN.with_name('ways-512.jsonl')}")
    assert list(ablation.runs(both)["batches"]) == ["1, 2, 4, 8, 16, 32, 64, 128, 256", "512"]
    with pytest.raises(BadInput, match="batch 1 stands in two of"):
        ablation.load(f"{RUN},{RUN}")


def test_one_way_has_no_gain_and_no_control() -> None:
    published = Results.load("published")
    assert ablation.overhead_table(published).loc[8].tolist() == ["-50.8  slower"]
    assert (ablation.gains(published).dropna() == 1).all(axis=None)
    assert ablation.controls(published).empty
    assert ablation.ablation(published).empty
    assert ablation.eight_bits(published).empty
    assert ablation.shares(published).empty
    assert ablation.verdict(published) == "No run of several ways."
    with pytest.raises(BadInput, match="no two ways of base and of a quantised model"):
        ablation.overhead_plot(published)
