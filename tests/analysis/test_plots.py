from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from colqwen_lab.analysis import plots
from colqwen_lab.analysis.compare import Comparison, compare
from colqwen_lab.analysis.table import Results, Series
from colqwen_lab.errors import BadInput
from colqwen_lab.hardware import OUTSIDE_TORCH_BYTES
from colqwen_lab.records import (
    MIB,
    Cell,
    Environment,
    Limits,
    Memory,
    Work,
    Workload,
    published_cells,
    rate_of,
)

FIRST = published_cells()[0]
FAILED: dict[str, Any] = {"items_per_s": None, "memory": None, "step_s": [], "reason": "full"}


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


def plot(kind: str, source: Comparison | Results, **options: Any) -> Figure:
    series = source.series() if isinstance(source, Results) else (source.base, source.awq)
    return plots.KINDS[kind](series, **options)


def axes_of(figure: Figure) -> Axes:
    (axes,) = figure.axes
    return axes


def texts_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def legend_of(figure: Figure) -> dict[str, Any]:
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    return dict(zip(labels, legend.legend_handles, strict=True))


def line_of(axes: Axes, label: str) -> Any:
    (handle,) = [line for line in axes.lines if line.get_label() == label]
    return handle


def test_throughput_is_by_powers_of_two_with_plain_ticks(published: Comparison) -> None:
    figure = plot("throughput", published)
    axes = axes_of(figure)
    figure.canvas.draw()
    assert axes.get_xscale() == "log"
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["8", "16", "32", "64", "128", "256", "512"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch size", "queries/s")
    assert list(line_of(axes, "base").get_ydata()) == [191, 374, 712, 896, 947, 966]
    assert "published · NVIDIA A100-SXM4-40GB · 4b" in axes.get_title()


def test_error_bars_are_the_intervals() -> None:
    figure = plot("throughput", Results((tiny("base", 8),)))
    axes = axes_of(figure)
    (bars,) = axes.collections
    low, high = sorted(y for path in bars.get_paths() for _, y in path.vertices)
    rate = tiny("base", 8).items_per_s
    assert rate is not None
    assert (low, high) == (pytest.approx(rate.low), pytest.approx(rate.high))
    assert axes.get_ylabel() == "pages/s"
    assert "CPU Xeon" in axes.get_title()


def test_an_interval_may_miss_an_end_or_its_estimate() -> None:
    axes = axes_of(plots.framed("title", "subtitle")[0])
    plots.intervals(axes, {1: (5, None, None), 2: (5, 6, 7)}, color="red")
    (bars,) = axes.collections
    assert [sorted(y for _, y in path.vertices) for path in bars.get_paths()] == [[5, 5], [5, 7]]


def test_a_variant_keeps_its_colour_and_marker_everywhere(published: Comparison) -> None:
    for kind in ("throughput", "memory", "tradeoff"):
        axes = axes_of(plot(kind, published))
        for label, (colour, marker) in plots.FIXED.items():
            line = line_of(axes, label)
            assert (to_hex(line.get_color()).upper(), line.get_marker()) == (colour, marker)
    others = axes_of(plot("memory", Results(tuple(tiny(name, 8) for name in ("x", "awq", "y")))))
    looks = {
        (line_of(others, name).get_color(), line_of(others, name).get_marker())
        for name in ("x", "awq", "y")
    }
    assert len(looks) == 3
    assert plots.FIXED["awq"] in looks


def test_second_series_of_a_variant_is_dashed() -> None:
    results = Results((tiny("awq", 8), tiny("awq", 8, protocol="lean")))
    axes = axes_of(plot("memory", results))
    lines = [line_of(axes, label) for label in ("awq (published)", "awq (lean)")]
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    assert lines[0].get_color() == lines[1].get_color()


def test_speed_has_a_zero_line_a_band_and_hollow_inconclusive_markers(
    published: Comparison,
) -> None:
    figure = published.plot()
    axes = axes_of(figure)
    assert texts_of(axes) == ["-50.8", "-59.4", "-52.8", "-27.1", "-4.0", "+0.3"]
    assert any(list(line.get_ydata()) == [0, 0] for line in axes.lines)
    (filled,) = [line for line in axes.lines if line.get_zorder() == 5]
    values = zip(filled.get_xdata(), filled.get_ydata(), strict=True)
    assert [batch for batch, value in values if value == value] == [8, 16, 32, 64, 128]
    (band,) = axes.patches
    assert (band.get_y(), band.get_height()) == (-2, 4)
    assert axes.get_ylabel() == "speed vs base, % (negative = slower)"
    assert {"±2 %: not significant", "awq"} <= legend_of(figure).keys()
    assert figure.get_suptitle() == "Speed of awq vs base at the same batch size"


def test_speed_across_machines_is_no_comparison(published: Comparison) -> None:
    elsewhere = tuple(
        c.model_copy(update={"environment": Environment(gpu="NVIDIA L4")})
        for c in published.awq.cells
    )
    pair = published.base, Series("awq", elsewhere)
    figure = Comparison({"A100 against L4": pair}).plot("speed")
    assert figure.get_suptitle().startswith("Not a comparison (conditions differ)")
    assert "NVIDIA A100-SXM4-40GB and NVIDIA L4" in axes_of(figure).get_title()


def test_speed_lines_differ_in_colour(published: Comparison) -> None:
    lines = {f"configuration {n}": published.speeds for n in range(7)}
    series = (published.base, published.awq)
    figure = plots.speed_lines(series, lines)
    assert lines.keys() <= legend_of(figure).keys()
    axes = axes_of(figure)
    assert len({line_of(axes, label).get_color() for label in lines}) == len(plots.FREE)


def test_memory_shows_the_cards_within_reach(published: Comparison) -> None:
    cards = ["8 GB card", "12 GB card", "16 GB card", "24 GB card"]
    assert texts_of(axes_of(plot("memory", published))) == cards
    figure = plot("memory", published, cards=(24, "RTX 4070", 500))
    axes = axes_of(figure)
    assert texts_of(axes) == ["24 GB card", "RTX 4070 card"]
    assert axes.get_ylim()[1] > 24 * 1024


def test_memory_is_in_mib_with_thousands_separated(published: Comparison) -> None:
    figure = plot("memory", published)
    axes = axes_of(figure)
    figure.canvas.draw()
    assert axes.get_ylabel() == "peak memory, MiB"
    assert "10,000" in [label.get_text() for label in axes.get_yticklabels()]
    assert line_of(axes, "awq").get_ydata()[-1] == pytest.approx(6963)


def test_memory_of_a_tiny_model_has_no_cards() -> None:
    axes = axes_of(plot("memory", Results((tiny("base", 8),)), cards=(8,)))
    assert texts_of(axes) == []
    assert axes.get_ylim()[1] < 40
    half_a_gib = tiny("base", 8, memory=Memory(peak_bytes=512 * MIB, method="cuda"))
    assert texts_of(axes_of(plot("memory", Results((half_a_gib,))))) == ["8 GB card"]


def test_tradeoff_points_carry_their_batch(published: Comparison) -> None:
    axes = axes_of(plot("tradeoff", published))
    batches = ["8", "16", "32", "64", "128", "256"]
    assert texts_of(axes) == [*batches, *batches, "512"]
    assert list(line_of(axes, "awq").get_xdata())[-1] == pytest.approx(6963)
    assert "MiB" in axes.get_xlabel()


def test_a_roofline_has_a_limit_by_variant() -> None:
    parts = {"work": Work(flops=10**9, min_bytes=10**9)}
    parts |= {"limits": Limits(flops_per_s=1e12, bytes_per_s=1e11)}
    cells = [tiny(name, batch, **parts) for name in ("base", "awq") for batch in (8, 16)]
    figure = plot("roofline", Results(tuple(cells)))
    assert [*legend_of(figure)] == ["base", "awq", "limit of base", "limit of awq"]
    assert "limits: measured in the run" in figure.get_suptitle()
    axes = axes_of(figure)
    assert list(line_of(axes, "limit of awq").get_ydata()) == pytest.approx([800, 1600])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    with pytest.raises(BadInput, match="a roofline needs the work of a step"):
        plot("roofline", Results((tiny("base", 8),)))


def test_breakdown_bars_add_up_to_the_peak_and_what_is_outside() -> None:
    old = {"text linears: codes": 10 * MIB, "vision tower": 5 * MIB, "mergers": 2 * MIB}
    old |= {"a part of tomorrow": 3 * MIB}
    memory = Memory(peak_bytes=20 * MIB, breakdown=old, method="cuda")
    on_gpu = tiny("awq", 8, memory=memory, environment=Environment(gpu="NVIDIA L4"))
    without = tiny("base", 16)
    figure = plots.breakdown([on_gpu, without])
    labels = ["text linears", "vision", "mergers", "outside torch", "unexplained", "other"]
    assert [*legend_of(figure)] == labels
    axes = axes_of(figure)
    bars = zip(*axes.containers, strict=True)
    tops = [max(part.get_y() + part.get_height() for part in parts) for parts in bars]
    outside = OUTSIDE_TORCH_BYTES[1] / MIB
    assert tops == pytest.approx([20 + outside, 30], abs=0.01)
    names = [label.get_text().split("\n") for label in axes.get_xticklabels()]
    assert names[0] == ["awq 8", "eager", "published"]
    assert axes.get_ylabel() == "memory, MiB"


def test_failed_cells_are_marked_at_the_axis() -> None:
    cells = (
        tiny("base", 8),
        tiny("base", 16, status="oom", **FAILED),
        tiny("base", 32, status="failed", **FAILED),
    )
    for kind in ("throughput", "memory"):
        axes = axes_of(plot(kind, Results(cells)))
        assert texts_of(axes) == ["OOM", "failed"]
        crosses = [line for line in axes.lines if line.get_marker() == "x"]
        assert [list(line.get_xdata()) for line in crosses] == [[16], [32]]
        assert axes.get_xlim()[1] >= 32


def test_the_subtitle_counts_disturbed_cells() -> None:
    disturbed = tiny("base", 8, interference=["another process used the GPU"])
    axes = axes_of(plot("throughput", Results((disturbed, tiny("base", 16)))))
    assert axes.get_title().endswith("1 of 2 cells disturbed")
    assert "disturbed" not in axes_of(plot("memory", Results((tiny("base", 8),)))).get_title()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["speed", "throughput", "memory", "tradeoff", "breakdown"])
def test_nothing_to_draw_is_still_a_figure(kind: str, tmp_path: Path) -> None:
    failed = FAILED | {"status": "failed"}
    cells = Results((tiny("base", 8, **failed), tiny("awq", 16, **failed)))
    figure = {
        "speed": lambda: compare(cells, cells).plot(),
        "breakdown": lambda: plots.breakdown(cells.cells),
    }.get(kind, lambda: plot(kind, cells))()
    assert len(plots.save(figure, kind, tmp_path)) == 2


@pytest.mark.filterwarnings("error")
def test_saved_twice_is_the_same_file(published: Comparison, tmp_path: Path) -> None:
    first = plots.save(published.plot(), "speed", tmp_path / "a")
    second = plots.save(published.plot(), "speed", tmp_path / "b")
    assert [path.name for path in first] == ["speed.png", "speed.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    svg = first[1].read_text()
    assert "<dc:date>" not in svg
    assert int.from_bytes(first[0].read_bytes()[16:20], "big") == 900


def test_folder_that_cannot_be_written_is_bad_input(published: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput):
        plots.save(published.plot(), "speed", tmp_path / "file")


def test_unknown_kind_names_the_valid_ones() -> None:
    with pytest.raises(BadInput, match="valid: throughput, memory, tradeoff, roofline"):
        Results.load("published").plot("overhead")


def test_notebook_shows_a_png(published: Comparison) -> None:
    assert plot("memory", published)._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["throughput", "memory", "tradeoff", "breakdown"])
def test_a_name_from_a_record_is_no_formula_and_no_markup(kind: str, tmp_path: Path) -> None:
    r"""`$\frac{$` as a formula would be an error when the figure is drawn."""
    hostile = r"$\frac{$ </text><script>"
    cells = [tiny(hostile, batch, environment=Environment(cpu=hostile)) for batch in (1, 2)]
    figure = plots.breakdown(cells) if kind == "breakdown" else plot(kind, Results(tuple(cells)))
    _, svg = plots.save(figure, "hostile", tmp_path)
    assert "<script>" not in svg.read_text()
