"""The tables of several configurations, on the committed run of an H200."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from colqwen_lab.analysis import ablation
from colqwen_lab.analysis.table import Results, rate
from colqwen_lab.errors import BadInput
from colqwen_lab.records import Work

RUN = Path(__file__).parents[2] / "outputs" / "h200" / "ways.jsonl"


@pytest.fixture(scope="module")
def results() -> Results:
    return Results.load(RUN)


def test_speed_in_each_configuration(results: Results) -> None:
    table = ablation.speed_table(results)
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
        table.loc[1, f"awq {name}"] for name in ("eager/published/tritonv2", "fast/lean/auto")
    )
    assert report.startswith("-49.8 [")
    assert report.endswith("slower")
    assert best.startswith("+28.5 [")
    assert best.endswith("faster")


def test_controls_come_out_as_the_same_but_for_one(results: Results) -> None:
    """At batch 256 the GPU is at its power limit, and earlier steps matter."""
    table = ablation.controls(results)
    assert list(table.columns) == [
        "base eager/published/auto",
        "base eager/lean/auto",
        "base fast/lean/auto",
    ]
    significant = ~table["base fast/lean/auto"].str.endswith("inconclusive")
    assert list(table.index[significant]) == [256]


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
    assert table["padded tokens, %"].astype(float).between(0, 5).all()


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
    assert {series.label for series in counted.series()} <= {*labels}
    with pytest.raises(BadInput, match="roofline"):
        results.plot("roofline")


def test_eight_bit_configurations_carry_their_error(results: Results) -> None:
    table = ablation.eight_bits(results)
    assert set(table["configuration"]) == {"base fast/lean/fp8", "awq fast/lean/w4-fp8"}
    assert table["cosine_mean"].ne("-").all()
    assert (
        table["against"].str.split(" ").str[0] == table["configuration"].str.split(" ").str[0]
    ).all()


def test_the_verdict_holds_the_figures(results: Results) -> None:
    verdict = ablation.verdict(results)
    assert re.search(
        r"first configuration: eager/published/tritonv2: awq is 45 to 53 % slower",
        verdict,
    )
    assert re.search(
        r"best configuration: fast/lean/auto: awq is 8.\d to 2\d.\d % faster than base",
        verdict,
    )
    assert "The best configuration of awq is 2.2 to 30.2 times as fast as its first." in verdict
    assert "A/A controls are inconclusive, as they should be." in verdict
    figure = ablation.speed_plot(results)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[-2:] == [
        "first configuration: eager/published/tritonv2",
        "best configuration: fast/lean/auto",
    ]


def test_two_runs_of_different_batches() -> None:
    both = ablation.load(f"{RUN},{RUN.with_name('ways-512.jsonl')}")
    assert list(ablation.runs(both)["batch_size"]) == ["1, 2, 4, 8, 16, 32, 64, 128, 256", "512"]
    with pytest.raises(BadInput, match="batch 1 is in two of"):
        ablation.load(f"{RUN},{RUN}")


def test_one_configuration_has_no_gain_and_no_control() -> None:
    published = Results.load("published")
    assert ablation.speed_table(published).loc[8].tolist() == ["-50.8 slower"]
    assert ablation.controls(published).empty
    assert ablation.ablation(published).empty
    assert ablation.eight_bits(published).empty
    assert ablation.shares(published).empty
    assert ablation.verdict(published) == "The run holds one configuration a variant."
    with pytest.raises(BadInput, match="two configurations of base and of a quantised model; run"):
        ablation.speed_plot(published)
