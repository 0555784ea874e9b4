from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from colqwen_lab.analysis import plots
from colqwen_lab.analysis.compare import Comparison, compare
from colqwen_lab.analysis.results import Results
from colqwen_lab.errors import BadInput
from colqwen_lab.records import MIB, Cell, Environment, Memory, Workload, published_cells, rate_of

FIRST = published_cells()[0]


def tiny(variant: str, batch: int, **changes: Any) -> Cell:
    steps = [0.01 * (1 + n / 100) for n in range(10)]
    same = {
        "variant": variant,
        "size": "tiny",
        "workload": Workload(kind="pages", batch_size=batch),
        "step_s": steps,
        "items_per_s": rate_of(steps, batch),
        "memory": Memory(peak_bytes=30 * MIB, method="tracked"),
        "environment": Environment(cpu="Xeon"),
        "origin": "measured",
    }
    return FIRST.model_copy(update=same | changes)


@pytest.fixture(scope="module")
def published() -> Comparison:
    results = Results.load("published")
    return compare(results, results)


def axes_of(figure: Figure) -> Axes:
    (axes,) = figure.axes
    return axes


def texts_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def line_of(axes: Axes, label: str) -> Any:
    (handle,) = [
        h for h, name in zip(*axes.get_legend_handles_labels(), strict=True) if name == label
    ]
    return handle[0] if isinstance(handle, tuple) else handle


def test_a_legend_shows_lines_without_their_error_bars() -> None:
    results = Results(tuple(tiny("awq", batch) for batch in (8, 16)))
    for figure in (results.plot(), compare(results, results).plot()):
        legend = axes_of(figure).get_legend()
        assert legend is not None
        assert not legend.findobj(LineCollection)


def test_throughput_is_over_powers_of_two_with_plain_ticks(published: Comparison) -> None:
    figure = published.plot("throughput")
    axes = axes_of(figure)
    figure.canvas.draw()
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "8",
        "16",
        "32",
        "64",
        "128",
        "256",
        "512",
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch size", "queries/s")
    assert list(line_of(axes, "base").get_ydata()) == [191, 374, 712, 896, 947, 966]
    assert "published · NVIDIA A100-SXM4-40GB · 4b" in axes.get_title()


def test_error_bars_are_the_intervals() -> None:
    figure = Results((tiny("base", 8),)).plot("throughput")
    axes = axes_of(figure)
    (bars,) = axes.collections
    low, high = sorted(y for path in bars.get_paths() for _, y in path.vertices)
    rate = tiny("base", 8).items_per_s
    assert rate is not None
    assert (low, high) == (pytest.approx(rate.low), pytest.approx(rate.high))
    assert axes.get_ylabel() == "pages/s"
    assert "CPU Xeon" in axes.get_title()


def test_variant_keeps_its_colour_and_marker_everywhere(published: Comparison) -> None:
    for kind in ("throughput", "memory", "tradeoff"):
        axes = axes_of(published.plot(kind))
        for label, (colour, marker) in plots.FIXED.items():
            line = line_of(axes, label)
            assert (to_hex(line.get_color()).upper(), line.get_marker()) == (colour, marker)
    others = axes_of(Results(tuple(tiny(name, 8) for name in ("x", "awq", "y"))).plot("memory"))
    looks = {
        (line_of(others, name).get_color(), line_of(others, name).get_marker())
        for name in ("x", "awq", "y")
    }
    assert len(looks) == 3
    assert plots.FIXED["awq"] in looks


def test_second_series_of_a_variant_is_dashed() -> None:
    axes = axes_of(Results((tiny("awq", 8), tiny("awq", 8, protocol="lean"))).plot("memory"))
    lines = [line_of(axes, label) for label in ("awq (published)", "awq (lean)")]
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    assert lines[0].get_color() == lines[1].get_color()


def test_overhead_has_a_zero_line_a_band_and_hollow_ties(published: Comparison) -> None:
    axes = axes_of(published.plot())
    assert texts_of(axes) == ["-50.8", "-59.4", "-52.8", "-27.1", "-4.0", "+0.3"]
    assert any(list(line.get_ydata()) == [0, 0] for line in axes.lines)
    (filled,) = [line for line in axes.lines if line.get_zorder() == 5]
    assert list(filled.get_xdata()) == [8, 16, 32, 64, 128]
    (band,) = axes.patches
    assert (band.get_y(), band.get_height()) == (-2, 4)
    assert "negative = slower" in axes.get_ylabel()


def test_overhead_across_machines_says_it_is_no_comparison(published: Comparison) -> None:
    elsewhere = tuple(
        c.model_copy(update={"environment": Environment(gpu="NVIDIA L4")})
        for c in published.awq.cells
    )
    figure = compare(Results(published.base.cells), Results(elsewhere)).plot()
    assert figure.get_suptitle().startswith("Not a comparison (conditions differ)")
    assert "NVIDIA A100-SXM4-40GB and NVIDIA L4" in axes_of(figure).get_title()
    assert published.plot().get_suptitle() == "awq against base at the same batch size"


def test_memory_draws_the_cards_within_reach(published: Comparison) -> None:
    assert texts_of(axes_of(published.plot("memory"))) == ["8 GB card", "12 GB card", "16 GB card"]
    figure = published.plot("memory", cards=(24, 8))
    axes = axes_of(figure)
    assert texts_of(axes) == ["8 GB card", "24 GB card"]
    assert axes.get_ylim()[1] > 24
    assert axes.get_ylabel() == "peak memory, GiB"
    results = Results.load("published")
    assert texts_of(axes_of(compare(results, results, cards=(6, 24)).plot("memory"))) == [
        "6 GB card",
        "24 GB card",
    ]


def test_memory_of_a_tiny_model_has_no_cards_and_is_in_mib() -> None:
    axes = axes_of(Results((tiny("base", 8),)).plot("memory", cards=(8,)))
    assert texts_of(axes) == []
    assert axes.get_ylabel() == "peak memory, MiB"
    assert axes.get_ylim()[1] < 40
    half_a_gib = tiny("base", 8, memory=Memory(peak_bytes=512 * MIB, method="cuda"))
    assert texts_of(axes_of(Results((half_a_gib,)).plot("memory"))) == ["8 GB card"]


def test_tradeoff_points_carry_their_batch(published: Comparison) -> None:
    axes = axes_of(published.plot("tradeoff"))
    batches = ["8", "16", "32", "64", "128", "256"]
    assert texts_of(axes) == [*batches, *batches, "512"]
    assert list(line_of(axes, "awq").get_xdata())[-1] == pytest.approx(6963 / 1024)


def test_lost_cells_are_marked_at_the_axis() -> None:
    gone = {"items_per_s": None, "memory": None, "step_s": [], "reason": "full"}
    cells = (
        tiny("base", 8),
        tiny("base", 16, status="oom", **gone),
        tiny("base", 32, status="failed", **gone),
    )
    for kind in ("throughput", "memory"):
        axes = axes_of(Results(cells).plot(kind))
        assert texts_of(axes) == ["OOM", "failed"]
        crosses = [line for line in axes.lines if line.get_marker() == "x"]
        assert [list(line.get_xdata()) for line in crosses] == [[16], [32]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["overhead", "throughput", "memory", "tradeoff"])
def test_nothing_to_draw_is_still_a_figure(kind: str, tmp_path: Path) -> None:
    gone = {
        "items_per_s": None,
        "memory": None,
        "step_s": [],
        "status": "failed",
        "reason": "broken",
    }
    cells = Results((tiny("base", 8, **gone), tiny("awq", 16, **gone)))
    assert len(plots.save(compare(cells, cells).plot(kind), kind, tmp_path)) == 2


@pytest.mark.filterwarnings("error")
def test_saved_twice_is_the_same_file(published: Comparison, tmp_path: Path) -> None:
    first = plots.save(published.plot(), "overhead", tmp_path / "a")
    second = plots.save(published.plot(), "overhead", tmp_path / "b")
    assert [path.name for path in first] == ["overhead.png", "overhead.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    svg = first[1].read_text()
    assert "<dc:date>" not in svg
    assert int.from_bytes(first[0].read_bytes()[16:20], "big") == 900


def test_folder_that_cannot_be_written_is_bad_input(published: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput):
        plots.save(published.plot(), "overhead", tmp_path / "file")


def test_unknown_kind_names_the_valid_ones(published: Comparison) -> None:
    with pytest.raises(
        BadInput, match=r"did you mean memory.*valid: overhead, throughput, memory, tradeoff"
    ):
        published.plot("memry")
    with pytest.raises(BadInput, match="valid: throughput, memory, tradeoff"):
        Results.load("published").plot("overhead")


def test_notebook_shows_a_png(published: Comparison) -> None:
    assert published.plot()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["throughput", "memory", "tradeoff"])
def test_a_name_from_a_record_is_no_formula_and_no_markup(kind: str, tmp_path: Path) -> None:
    r"""`$\frac{$` as a formula would be an error when the figure is drawn."""
    hostile = r"$\frac{$ </text><script>"
    cells = [tiny(hostile, batch, environment=Environment(cpu=hostile)) for batch in (1, 2)]
    _, svg = plots.save(Results(tuple(cells)).plot(kind), "hostile", tmp_path)
    assert "<script>" not in svg.read_text()
