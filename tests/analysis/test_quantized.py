"""A quantisation record as tables and a figure."""

from __future__ import annotations

from pathlib import Path

import pytest

from colqwen_lab.analysis.quantized import Quantized
from colqwen_lab.records import MIB

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def quantized() -> Quantized:
    errors = {
        f"vlm.model.language_model.layers.{layer}.self_attn.{linear}": 0.1 + layer / 100
        for layer in (0, 1, 10)
        for linear in LINEARS
    }
    record = {
        "relative_error": errors,
        "source_bytes": 4 * MIB,
        "result_bytes": 3 * MIB,
        "recipe": {"scheme": "W4A16", "iters": 50},
        "source": "the tiny default",
    }
    return Quantized(Path("outputs/tiny-W4A16"), record)


def test_summary_and_table(quantized: Quantized) -> None:
    row = quantized.summary().loc["W4A16"]
    assert (row["iterations"], row["linears"], row["saving %"]) == (50, 21, 25.0)
    assert (row["before MiB"], row["after MiB"]) == (4, 3)
    assert (row["mean error"], row["largest error"]) == pytest.approx((0.137, 0.2), abs=5e-4)
    table = quantized.table()
    assert list(table.index) == [0, 1, 10]
    assert tuple(table.columns) == LINEARS
    assert table.loc[10, "q_proj"] == 0.2


def test_repr_and_html(quantized: Quantized) -> None:
    name, *table = repr(quantized).splitlines()
    assert name == "tiny-W4A16"
    assert table[-1].split()[:5] == ["W4A16", "50", "21", "4", "3"]
    assert "W4A16" in quantized._repr_html_()


def test_the_figure_has_a_line_for_each_linear(quantized: Quantized) -> None:
    figure = quantized.plot()
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == list(LINEARS)
    assert figure.get_suptitle() == "Weight error of W4A16, 50 iterations"
    assert axes.get_title() == "quantised from the tiny default"
    assert axes.get_xlabel() == "layer of the language model"
