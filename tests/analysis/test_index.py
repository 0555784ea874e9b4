"""The smallest index that loses nothing; search times, and what they say of a million pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from colqwen_lab.analysis.fidelity import Fidelities
from colqwen_lab.analysis.index import SearchTimes, formats, sizes, smallest
from colqwen_lab.errors import BadInput
from colqwen_lab.records import Environment, Limits, RecordsFile
from colqwen_lab.retrieval.record import Fidelity, SearchTime


def search(pages: int, seconds: float, **changed: Any) -> SearchTime:
    values: dict[str, Any] = {
        "index_format": "int8",
        "vectors": 100,
        "dims": 10,
        "queries": 1,
        "query_tokens": 20,
        "kernel": "triton",
        "page_bytes": 1210.0,
        "bytes_read": pages * 1200,
        "step_s": [seconds] * 10,
        "limits": Limits(flops_per_s=1e15, bytes_per_s=1e9),
        "environment": Environment(gpu="a GPU"),
    }
    return SearchTime(pages=pages, **values | changed)


def times(**seconds: float) -> SearchTimes:
    sizes = {"a": 1000, "b": 10_000, "c": 50_000}
    return SearchTimes(tuple(search(sizes[name], time) for name, time in seconds.items()))


def test_a_straight_line_is_extended_to_a_million_pages() -> None:
    (line,) = times(c=1e-4 + 5e-2, a=1e-4 + 1e-3, b=1e-4 + 1e-2).lines
    assert line.million_s == pytest.approx(1e-4 + 1, rel=1e-6)
    assert line.reason == "straight, off by 0.0 % at most"
    assert [record.pages for record in line.records] == [1000, 10_000, 50_000]


@pytest.mark.parametrize(
    ("seconds", "reason"),
    [
        ({"a": 1e-3, "b": 1e-2, "c": 1e-1}, "not straight, off by"),
        ({"a": 1e-3, "c": 5e-2}, "fewer than 3 sizes"),
    ],
)
def test_another_line_is_not_extended(seconds: dict[str, float], reason: str) -> None:
    result = times(**seconds)
    (line,) = result.lines
    assert line.million_s is None
    assert line.reason.startswith(reason)
    row = result.million().iloc[0]
    assert (row["GB"], row["extrapolated s"]) == (1.21, "-")


def test_a_few_pages_say_nothing_of_a_million() -> None:
    few = SearchTimes(tuple(search(pages, pages * 1e-6) for pages in (100, 300, 1000)))
    assert few.lines[0].reason == "fewer than 10,000 pages"
    assert few.lines[0].million_s is None


def test_a_time_with_its_interval_and_its_share_of_a_copy() -> None:
    slow = search(10_000, 0.04, index_format="bfloat16", bytes_read=2 * 12_000_000)
    fast = search(10_000, 0.02, step_s=[0.019, 0.02, 0.021] * 4, interference=["a game"])
    two = search(10_000, 0.1, queries=64)
    result = SearchTimes((slow, fast, two))
    row = result.table().iloc[2]
    assert row.to_dict() == {
        "format": "int8",
        "queries": 64,
        "kernel": "triton",
        "pages": 10_000,
        "ms": 100,
        "95 % interval": "[100.0 to 100.0]",
        "GB/s": 0.12,
        "% of copy": 12,
        "disturbed": "-",
    }
    assert result.table()["95 % interval"][1] == "[19.00 to 21.00]"
    assert result.verdict() == (
        "One query over 10,000 pages: 20 ms [19.00 to 21.00] in int8 (60 % of the copy bandwidth), "
        "40 ms [40.00 to 40.00] in bfloat16 (60 % of the copy bandwidth). "
        "64 queries over 10,000 pages: 100 ms [100.0 to 100.0] in int8 (12 % of the copy "
        "bandwidth)."
    )
    assert "1 of 3 disturbed" in result.conditions()
    assert result.to_dict()["records"][0]["limit_share"] == pytest.approx(0.6)
    assert labels(result.plot()) == ["bfloat16, triton", "int8, triton"], "one query"
    assert labels(result.plot(64)) == ["int8, triton"]
    with pytest.raises(BadInput, match="unknown queries '2'; valid: 1, 64"):
        result.plot(2)


def labels(figure: Figure) -> list[str]:
    (axes,) = figure.axes
    return sorted(set(axes.get_legend_handles_labels()[1]))


def test_the_fastest_kernel_of_a_format_is_drawn() -> None:
    searches = [
        search(10_000, seconds, kernel=kernel) for seconds, kernel in ((2, "torch"), (1, "triton"))
    ]
    assert labels(SearchTimes(tuple(searches)).plot()) == ["int8, triton"]
    assert labels(SearchTimes(tuple(reversed(searches))).plot()) == ["int8, triton"]


def test_the_newest_shape_and_machine_of_a_file_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    old = Environment(gpu="a GPU", started_at="2026-01-01")
    new = Environment(gpu="another", started_at="2026-01-02")
    rows = [search(10, 1e-3, environment=new), search(20, 1e-3, environment=old)]
    with RecordsFile(path, SearchTime, "search-times") as file:
        file.append([*rows, search(30, 1e-3, environment=new)])
    assert [record.pages for record in SearchTimes.load(path).records] == [10, 30]


@pytest.fixture
def fidelities(record: Callable[..., Fidelity]) -> Fidelities:
    """Base in three formats, awq in one: the same, worse, inconclusive."""
    good = [0.8, 1.0] * 20
    return Fidelities(
        (
            record("base", good, page_bytes=1000.0),
            record("base", good, index_format="int8", page_bytes=502.0),
            record("base", [0.7, 0.9] * 20, index_format="binary", page_bytes=63.0),
            record("awq", [0.799, 0.983] * 20, index_format="hamming", page_bytes=64.0),
            record("awq", good, page_bytes=1000.0),
        )
    )


def test_the_smallest_index_follows_from_the_verdicts(fidelities: Fidelities) -> None:
    wide = Fidelities(fidelities.records, margin=0.08)  # 40 equal differences: 3/40 either side
    assert smallest(wide) == (
        "awq hamming is the smallest index that finds pages as well as base in 16 bits: 0.064 kB "
        "a page, 6 % of 1 kB, with nDCG@5 0.891 against 0.900, difference -0.009 [-0.011 to "
        "-0.007], within 0.08. Smaller and worse: base binary."
    )
    few = Fidelities(tuple(r for r in fidelities.records if r.label != "awq hamming"))
    assert smallest(few) == (
        "No smaller index is shown to find pages as well as base in 16 bits. Smaller and worse: "
        "base binary. Smaller and inconclusive: base int8."
    )


def test_formats_by_their_bytes(fidelities: Fidelities) -> None:
    table = formats(fidelities)
    assert [*table["variant"] + " " + table["format"]] == [
        *("base binary", "awq hamming", "base int8", "base 16 bits", "awq 16 bits")
    ]
    assert [*table["nDCG@5"]] == [0.8, 0.891, 0.9, 0.9, 0.9]
    best = formats(fidelities, frontier=True)
    assert [*best["format"]] == ["binary", "hamming", "int8"]


def test_a_million_pages_in_gigabytes_and_their_price(fidelities: Fidelities) -> None:
    table = sizes(fidelities)
    assert table.to_dict("list") == {
        "format": ["16 bits", "int8", "binary"],
        "kB a page": [1, 0.502, 0.063],
        "% of 16 bits": [100, 50.2, 6.3],
        "GB a million pages": [1, 0.502, 0.063],
    }
    assert [*sizes(fidelities, "20")["a month"]] == [20, 10.04, 1.26]
    with pytest.raises(BadInput, match="price must be a number, of a GB for a month, got 'x'"):
        sizes(fidelities, "x")


def test_the_figure_marks_formats_and_labels_the_frontier(fidelities: Fidelities) -> None:
    figure = fidelities.plot("index")
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries[2:] == [
        *("base", "awq", "as the model gives it, 16 bits", "int8", "binary", "hamming")
    ]
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert labels == ["base binary", "awq hamming", "base int8"]
