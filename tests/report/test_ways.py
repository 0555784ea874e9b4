"""The tables of several ways, on the committed run of an H200."""

from __future__ import annotations

from pathlib import Path

import pytest

from colqwen_lab.report import ways
from colqwen_lab.report.series import Results

RUN = Path(__file__).parents[2] / "outputs" / "h200" / "ways.jsonl"


@pytest.fixture(scope="module")
def results() -> Results:
    return Results.load(RUN)


def test_overhead_in_each_way(results: Results) -> None:
    table = ways.overhead_table(results)
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
    report, best = (table.loc[1, f"awq {way}"] for way in ("eager/published/tritonv2", "fast/lean/auto"))
    assert report.startswith("-49.8 [")
    assert report.endswith("slower")
    assert best.startswith("+28.5 [")
    assert best.endswith("faster")


def test_what_each_way_gains(results: Results) -> None:
    table = ways.gains(results)
    assert (table["awq eager/published/tritonv2"] == 1).all()
    assert table.loc[8, "awq fast/lean/auto"] > 6


def test_controls_come_out_as_the_same_but_for_one(results: Results) -> None:
    """At batch 256 the GPU is at its power limit, and what ran before reaches further than one step."""
    table = ways.controls(results)
    assert list(table.columns) == ["base eager/published/auto", "base eager/lean/auto", "base fast/lean/auto"]
    told_apart = ~table["base fast/lean/auto"].str.endswith("cannot tell")
    assert list(table.index[told_apart]) == [256]


def test_one_way_has_no_gain_and_no_control() -> None:
    published = Results.load("published")
    assert ways.overhead_table(published).loc[8].tolist() == ["-50.8  slower"]
    assert (ways.gains(published).dropna() == 1).all(axis=None)
    assert ways.controls(published).empty
