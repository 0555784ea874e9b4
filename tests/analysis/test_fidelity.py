"""Verdicts from paired intervals, the frontier, tables and figures, from records alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from colqwen_lab.analysis.fidelity import Fidelities, loss, one_row
from colqwen_lab.analysis.results import Results
from colqwen_lab.errors import BadInput
from colqwen_lab.records import MIB, Cell, Environment, Workload, published_cells, rate_of
from colqwen_lab.retrieval.data import Corpus
from colqwen_lab.retrieval.record import Fidelity

OUTPUTS = Path(__file__).parents[2] / "outputs"
Record = Callable[..., Fidelity]
FIRST = published_cells()[0]
DRAW = np.random.default_rng(1)
BASE = [float(value) for value in DRAW.uniform(0.3, 1, 200)]


def changed(mean: float, spread: float = 0.0, count: int = 200) -> list[float]:
    return [
        one + float(by)
        for one, by in zip(BASE[:count], DRAW.normal(mean, spread or 1e-9, count), strict=True)
    ]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (changed(-0.002, 0.001), "same within 0.01"),  # lower for sure, by less than counts
        (changed(-0.05, 0.1), "worse"),
        (changed(0.05, 0.1), "better"),
        (changed(0.0, 0.5), "cannot tell"),
        # Told from zero, but not from the margin.
        ([one - 0.009 + (0.03 if n % 2 else -0.03) for n, one in enumerate(BASE)], "cannot tell"),
    ],
)
def test_verdicts(record: Record, values: list[float], verdict: str) -> None:
    row = loss(record("base", BASE), record("awq", values), "nDCG@5")
    assert row.verdict == verdict
    assert row.low is not None
    assert row.high is not None
    assert row.low <= row.difference <= row.high
    assert row.difference == pytest.approx(row.variant - row.base)


def test_the_interval_is_paired(record: Record) -> None:
    """Queries differ by 0.7, the two sides by 0.02: unpaired it would be drowned."""
    row = loss(record("base", BASE), record("awq", changed(-0.02, 0.001)), "nDCG@5")
    assert row.low is not None
    assert row.high is not None
    assert row.high - row.low < 0.001
    assert row.verdict == "worse"


def test_the_interval_covers(record: Record) -> None:
    """Of 200 repetitions about 95 % hold the true mean."""
    held = 0
    for _ in range(200):
        row = loss(record("base", BASE[:60]), record("awq", changed(-0.03, 0.1, 60)), "nDCG@5")
        held += (row.low or 0) <= -0.03 <= (row.high or 0)
    assert 180 <= held <= 199


def test_the_same_records_give_the_same_interval(record: Record) -> None:
    first, second = (
        loss(record("base", BASE), record("awq", BASE[::-1]), "nDCG@5") for _ in range(2)
    )
    assert first == second


def test_too_few_queries_tell_nothing(record: Record) -> None:
    few = loss(record("base", BASE[:29]), record("awq", changed(-0.3, 0.1, 29)), "nDCG@5")
    assert (few.low, few.high, few.interval) == (None, None, "")
    assert few.told == "cannot tell: 29 queries, 30 needed"
    enough = loss(record("base", BASE[:30]), record("awq", changed(-0.3, 0.1, 30)), "nDCG@5")
    assert enough.verdict == "worse"


@pytest.mark.parametrize(
    ("count", "lost", "told"),
    [
        (96, 0.0, "cannot tell: all 96 queries alike, so within 3/96"),
        (96, 0.5, "worse"),
        (200, 0.01, "cannot tell: all 200 queries alike, so within 3/200"),
        (400, 0.0, "same within 0.01"),
    ],
)
def test_no_query_that_differs_is_no_proof_that_none_would(
    record: Record, count: int, lost: float, told: str
) -> None:
    row = loss(record("base", [1.0] * count), record("awq", [1.0 - lost] * count), "nDCG@5")
    assert (row.low, row.high) == pytest.approx((-lost - 3 / count, -lost + 3 / count))
    assert row.told == told


def test_base_is_itself(record: Record) -> None:
    base = record("base", [1.0] * 5)
    row = loss(base, base, "nDCG@5")
    assert (row.low, row.high, row.verdict) == (0, 0, "same within 0.01")


def test_the_committed_schemes() -> None:
    """What the shipped records of 96 queries say, by their intervals."""
    found = Fidelities.load(OUTPUTS / "fidelity" / "schemes-tiny.jsonl")
    rows = {record.label: found.loss(record, "nDCG@5") for record in found.others}
    eight, two = rows["W8A16"], rows["W2A16"]
    assert eight.told == "cannot tell: all 96 queries alike, so within 3/96"
    assert "W8A16 cannot be told from base, nor said to be the same" in found.verdict()
    assert "(+0.000 [-0.031 to +0.031] all 96 queries alike, so within 3/96)" in found.verdict()
    assert eight.low == -3 / 96
    assert two.verdict == "worse"
    against = loss(found.pick("W4A16"), found.pick("W2A16"), "nDCG@5")
    for row in (two, against):
        assert row.high is not None
        assert row.high < 0


def test_more_error_is_worse(record: Record) -> None:
    wrong = record("awq", BASE)
    wrong.values["score error"][:] = [0.2] * 200
    assert loss(record("base", BASE), wrong, "score error").verdict == "worse"


@pytest.mark.parametrize(
    "other",
    [
        {"data": "another"},
        {"pages": 6},
        {"size": "4b"},
        {"visual_tokens": 1280},
        {"query_ids": ["x"] * 200},
    ],
)
def test_other_inputs_are_not_compared(record: Record, other: dict[str, Any]) -> None:
    records = record("base", BASE), record("awq", BASE, **other)
    with pytest.raises(BadInput, match="not the same inputs"):
        loss(*records, "nDCG@5")
    with pytest.raises(BadInput, match="not the same inputs"):
        Fidelities(records)


def test_no_base_and_no_margin(record: Record) -> None:
    with pytest.raises(BadInput, match="held against base"):
        Fidelities((record("awq", BASE),))
    with pytest.raises(BadInput, match="margin 2"):
        Fidelities((record("base", BASE),), margin=2)


@pytest.fixture
def found(record: Record) -> Fidelities:
    sizes = {
        "base": (1000, 0.0),
        "W8A16": (600, -0.001),
        "W4A16": (400, -0.03),
        "W3A16": (450, -0.2),
    }
    records = [
        record(
            name,
            changed(lost, 0.02 if lost else 0.0),
            weights_bytes=size * MIB,
            iters=50 if lost else None,
        )
        for name, (size, lost) in sizes.items()
    ]
    plain = record("W4A16", changed(-0.1), weights_bytes=400 * MIB, iters=0)
    ids = records[0].query_ids
    shown = Corpus(
        "drawn", ["p0", "p1"], picture, ids, ["a query"] * 200, {one: {"p1": 1} for one in ids}
    )
    return Fidelities((*records, plain), corpus=shown)


def picture(number: int) -> Image.Image | str:
    return Image.new("RGB", (400, 560), "white") if number else "a page of text"


def test_the_frontier_holds_what_nothing_smaller_matches(found: Fidelities) -> None:
    assert [one.label for one in found.frontier()] == ["W4A16", "W8A16", "base"]


def test_tables_and_words(found: Fidelities) -> None:
    table = found.table().set_index("variant")
    assert list(table.index) == ["base", "W8A16", "W4A16", "W3A16", "W4A16 plain"]
    assert table.verdict.to_dict() == {
        "base": "",
        "W8A16": "same within 0.01",
        "W4A16": "worse",
        "W3A16": "worse",
        "W4A16 plain": "worse",
    }
    assert table["pages/s"].tolist() == [80.0] * 5
    assert found.losses("W4A16").columns[2] == "W4A16"
    assert len(found.cosines()) == 2 * 4
    assert "W8A16 retrieves as base does, within 0.01" in found.verdict()
    assert "W3A16 retrieves worse than base" in repr(found)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["frontier"] == ["W4A16", "W8A16", "base"]
    assert document["variants"][1]["losses"][0]["metric"] == "nDCG@5"
    assert "<table" in found._repr_html_()


def test_a_base_that_finds_nothing_is_said(found: Fidelities, record: Record) -> None:
    assert "next to nothing" not in found.verdict()
    blind = Fidelities((record("base", [0.01] * 50), record("awq", [0.0] * 50)))
    assert blind.verdict().startswith("Base itself finds next to nothing here (nDCG@5 0.010)")


def test_strings_of_a_record_are_escaped(record: Record) -> None:
    hostile = Fidelities((record("base", BASE, data="<b>"), record("<script>", BASE, data="<b>")))
    assert "<script>" not in hostile._repr_html_()
    assert "<b>" not in hostile._repr_html_()


def test_worst_and_best_query_and_their_pictures(found: Fidelities) -> None:
    one = found.pick("W3A16")
    gain = np.array(one.values["nDCG@5"]) - np.array(found.base.values["nDCG@5"])
    assert found.query("worst", "W3A16") == gain.argmin()
    assert found.query("best", "W3A16") == gain.argmax()
    titles = [axes.get_title() for axes in found.pictures("worst").axes if axes.get_title()]
    assert titles == ["1: p1, answers", "2: p0", "1: p1, answers", "2: p0"]
    assert found.base.size in found.pictures("worst").get_suptitle()
    with pytest.raises(BadInput, match="hold no pages"):
        Fidelities(found.records).pictures()
    with pytest.raises(BadInput, match="valid: worst, best"):
        found.pictures("middle")


def test_labels_of_the_frontier_lie_beside_each_other() -> None:
    found = Fidelities.load(OUTPUTS / "fidelity" / "schemes-tiny.jsonl")
    figure = found.plot()
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    boxes = [
        axes.transAxes.inverted().transform_bbox(Text.get_window_extent(text))
        for text in axes.texts
    ]
    boxes.sort(key=lambda box: box.x0)
    assert len(boxes) == 9
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
    assert all(box.y1 <= 1 for box in boxes)
    assert axes.get_title().startswith("measured · CPU AMD EPYC · tiny · generated")


def test_plots(found: Fidelities) -> None:
    frontier = found.plot()
    assert {text.get_text() for text in frontier.axes[0].texts} == {
        "base",
        "W8A16",
        "W4A16",
        "W3A16",
    }
    assert found.plot("metrics", label="W4A16").axes[0].get_yticklabels()[-1].get_text() == "nDCG@5"
    with pytest.raises(BadInput, match="valid: frontier, metrics"):
        found.plot("lines")
    with pytest.raises(BadInput, match="unknown metric 'MRR'"):
        found.plot(metric="MRR")


def timed(variant: str, batch: int, step_s: float) -> Cell:
    steps = [step_s] * 8
    same = {"variant": variant, "size": "tiny", "weights": f"{variant} weights", "step_s": steps}
    same |= {
        "items_per_s": rate_of(steps, batch),
        "workload": Workload(kind="queries", batch_size=batch),
    }
    return FIRST.model_copy(update=same | {"environment": Environment(cpu="a CPU")})


def test_one_row_of_speed_memory_and_fidelity(found: Fidelities) -> None:
    cells = [
        timed("base", 8, 0.1),
        timed("W4A16", 8, 0.2),
        timed("W4A16", 16, 0.2),
        timed("W2A16", 8, 0.1),
    ]
    cells[0] = cells[0].model_copy(update={"weights": "trained elsewhere"})
    table = one_row(Results(tuple(cells)), found).set_index("variant")
    assert table["batch"].to_dict() == {"base": 8, "W4A16": 16, "W2A16": 8}
    assert table["queries/s"].to_dict() == {"base": 80, "W4A16": 80, "W2A16": 80}
    assert table["verdict"].fillna("none").to_dict() == {
        "base": "same within 0.01",
        "W4A16": "worse",
        "W2A16": "none",
    }
    assert table["weights"].fillna("none").to_dict() == {
        "base": "others",
        "W4A16": "the same",
        "W2A16": "none",
    }
