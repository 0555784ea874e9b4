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

from colqwen_lab.analysis.fidelity import Fidelities, loss, side_by_side
from colqwen_lab.analysis.table import Results
from colqwen_lab.errors import BadInput
from colqwen_lab.records import MIB, Cell, Environment, Workload, published_cells, rate_of
from colqwen_lab.retrieval.data import Corpus
from colqwen_lab.retrieval.record import NAMES, Fidelity

OUTPUTS = Path(__file__).parents[2] / "outputs"
Record = Callable[..., Fidelity]
FIRST = published_cells()[0]
DRAW = np.random.default_rng(1)
BASE = [float(value) for value in DRAW.uniform(0.3, 1, 200)]


def changed(mean: float, spread: float = 0.0, count: int = 200) -> list[float]:
    return [
        value + float(by)
        for value, by in zip(BASE[:count], DRAW.normal(mean, spread or 1e-9, count), strict=True)
    ]


def test_phrasings_of_one_question_are_one_sample(record: Record) -> None:
    """Asked four times, in groups, 50 questions have the interval of 50, not a narrower one."""
    values = changed(-0.01, 0.05, 50)
    once = loss(record("base", BASE[:50]), record("awq", values), "nDCG@5")
    groups = [*range(50)] * 4
    grouped = loss(
        record("base", BASE[:50] * 4, query_groups=groups), record("awq", values * 4), "nDCG@5"
    )
    apart = loss(record("base", BASE[:50] * 4), record("awq", values * 4), "nDCG@5")
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high), abs=1e-9)
    assert apart.high - apart.low < 0.6 * (once.high - once.low)  # type: ignore[operator]
    uneven = [0] * 30 + [*range(1, 171)]
    equal = loss(
        record("base", BASE, query_groups=uneven), record("awq", [v - 0.1 for v in BASE]), "nDCG@5"
    )
    assert equal.difference == pytest.approx(-0.1)
    assert equal.high == pytest.approx(-0.1 + 3 / 171)
    conditions = Fidelities((record("base", BASE[:50] * 4, query_groups=groups),)).conditions()
    assert "200 queries (50 different)" in conditions


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (changed(-0.002, 0.001), "same"),  # significantly lower, but within the margin
        (changed(-0.05, 0.1), "worse"),
        (changed(0.05, 0.1), "better"),
        (changed(0.0, 0.5), "inconclusive"),
        # Excludes zero, but reaches beyond the margin.
        (
            [value - 0.009 + (0.03 if n % 2 else -0.03) for n, value in enumerate(BASE)],
            "inconclusive",
        ),
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
    """Queries differ by 0.7, the two sides by 0.02: an unpaired interval would be far wider."""
    row = loss(record("base", BASE), record("awq", changed(-0.02, 0.001)), "nDCG@5")
    assert row.low is not None
    assert row.high is not None
    assert row.high - row.low < 0.001
    assert row.verdict == "worse"


def test_the_interval_covers(record: Record) -> None:
    """About 95 % of 200 intervals contain the true mean."""
    covered = 0
    for _ in range(200):
        row = loss(record("base", BASE[:60]), record("awq", changed(-0.03, 0.1, 60)), "nDCG@5")
        covered += (row.low or 0) <= -0.03 <= (row.high or 0)
    assert 180 <= covered <= 199


def test_the_same_records_give_the_same_interval(record: Record) -> None:
    first, second = (
        loss(record("base", BASE), record("awq", BASE[::-1]), "nDCG@5") for _ in range(2)
    )
    assert first == second


def test_few_queries_are_inconclusive(record: Record) -> None:
    few = loss(record("base", BASE[:29]), record("awq", changed(-0.3, 0.1, 29)), "nDCG@5")
    assert (few.low, few.high, few.interval) == (None, None, "")
    assert few.verdict == "inconclusive"
    assert few.reason == "29 queries are too few; use at least 30."
    enough = loss(record("base", BASE[:30]), record("awq", changed(-0.3, 0.1, 30)), "nDCG@5")
    assert enough.verdict == "worse"


@pytest.mark.parametrize(
    ("count", "lost", "verdict", "reason"),
    [
        (
            96,
            0.0,
            "inconclusive",
            "No query changed; 96 queries are too few to rule out a 3 % loss.",
        ),
        (96, 0.5, "worse", ""),
        (
            *(200, 0.012, "inconclusive"),
            "All queries changed alike; 200 queries are too few to rule out a 3 % loss.",
        ),
        (400, 0.0, "same", ""),
    ],
)
def test_equal_differences_are_no_proof(
    record: Record, count: int, lost: float, verdict: str, reason: str
) -> None:
    row = loss(record("base", [1.0] * count), record("awq", [1.0 - lost] * count), "nDCG@5")
    assert (row.low, row.high) == pytest.approx((-lost - 3 / count, -lost + 3 / count))
    assert (row.verdict, row.reason) == (verdict, reason)


def test_base_is_itself(record: Record) -> None:
    base = record("base", [1.0] * 5)
    row = loss(base, base, "nDCG@5")
    assert (row.low, row.high, row.verdict) == (0, 0, "same")


def test_the_committed_schemes() -> None:
    """The sentences and intervals of the committed records of 96 queries."""
    committed = Fidelities.load(OUTPUTS / "fidelity" / "schemes-tiny.jsonl")
    rows = {record.label: committed.loss(record, "nDCG@5") for record in committed.others}
    assert rows["W8A16"].low == -3 / 96
    verdict = committed.verdict()
    for sentence in (
        "W8A16 against base is inconclusive: nDCG@5 0.9835 against 0.9835, "
        "difference +0.000 [-0.031 to +0.031]. "
        "No query changed; 96 queries are too few to rule out a 3 % loss. "
        "It keeps 99 % of base's first five pages; its weights are 18 % smaller.",
        "W4A16 finds pages as well as base: nDCG@5 0.9830 against 0.9835, difference within 0.01.",
        "W2A16 finds pages worse than base: nDCG@5 0.9260 against 0.9835, difference -0.057",
    ):
        assert sentence in verdict
    against = loss(committed.pick("W4A16"), committed.pick("W2A16"), "nDCG@5")
    for row in (rows["W2A16"], against):
        assert row.high is not None
        assert row.high < 0


def test_a_file_gives_the_newest_records_of_the_same_inputs_and_machine(
    record: Record, tmp_path: Path
) -> None:
    def at(day: int, *names: str, threads: int = 1, **changes: Any) -> list[Fidelity]:
        machine = Environment(cpu="a CPU", threads=threads, started_at=f"2026-01-0{day}")
        ndcg = [day / 10] * 40
        return [record(name, ndcg, environment=machine, **changes) for name in names]

    other_data = {"data": "other"}
    history = [
        at(1, "base", "W8A16", "W4A16"),
        at(2, "base", "W4A16", **other_data),
        at(3, "base", "W4A16"),
        at(4, "base", "W8A16", **other_data),
        at(5, "base", "W2A16", threads=2),
        at(6, "base", "W8A16", threads=2, weights="a folder"),
    ]

    def loaded(runs: int) -> list[tuple[str, str, float]]:
        path = tmp_path / f"{runs}.jsonl"
        path.write_text("".join(row.to_line() for run in history[:runs] for row in run))
        return [(r.label, r.data, r.values["nDCG@5"][0]) for r in Fidelities.load(path).records]

    first = [("base", "drawn", 0.1), ("W8A16", "drawn", 0.1), ("W4A16", "drawn", 0.1)]
    assert loaded(1) == first
    assert loaded(2) == [("base", "other", 0.2), ("W4A16", "other", 0.2)]
    assert loaded(3) == [("base", "drawn", 0.3), ("W8A16", "drawn", 0.1), ("W4A16", "drawn", 0.3)]
    third = [("base", "other", 0.4), ("W4A16", "other", 0.2), ("W8A16", "other", 0.4)]
    assert loaded(4) == third
    assert loaded(5) == [("base", "drawn", 0.5), ("W2A16", "drawn", 0.5)]
    assert loaded(6) == [("base", "drawn", 0.6), ("W8A16", "drawn", 0.6)]


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
    with pytest.raises(BadInput, match="awq and base must have the same data, queries"):
        loss(*records, "nDCG@5")
    with pytest.raises(BadInput, match="awq and base must have the same data, queries"):
        Fidelities(records)


def test_no_base(record: Record) -> None:
    with pytest.raises(BadInput, match="the first record must be of base, got awq"):
        Fidelities((record("awq", BASE),))


@pytest.fixture
def fidelities(record: Record) -> Fidelities:
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
        "drawn", ["p0", "p1"], picture, ids, ["a query"] * 200, {query: {"p1": 1} for query in ids}
    )
    return Fidelities((*records, plain), corpus=shown)


def picture(page_id: str) -> Image.Image | str:
    return Image.new("RGB", (400, 560), "white") if page_id == "p1" else "a page of text"


def test_the_frontier_holds_what_nothing_smaller_matches(fidelities: Fidelities) -> None:
    assert [record.label for record in fidelities.frontier()] == ["W4A16", "W8A16", "base"]


def test_tables_and_words(fidelities: Fidelities) -> None:
    table = fidelities.table().set_index("variant")
    assert list(table.index) == ["base", "W8A16", "W4A16", "W3A16", "W4A16 plain"]
    assert table.verdict.to_dict() == {
        "base": "same",
        "W8A16": "same",
        "W4A16": "worse",
        "W3A16": "worse",
        "W4A16 plain": "worse",
    }
    assert table["pages/s"].tolist() == [80.0] * 5
    assert fidelities.losses("W4A16").columns[2] == "W4A16"
    assert len(fidelities.cosines()) == 2 * 4
    assert "W8A16 finds pages as well as base" in fidelities.verdict()
    assert "W3A16 finds pages worse than base" in repr(fidelities)
    document = json.loads(json.dumps(fidelities.to_dict()))
    assert document["frontier"] == ["W4A16", "W8A16", "base"]
    assert document["variants"][1]["losses"][0]["metric"] == "nDCG@5"
    assert "<table" in fidelities._repr_html_()


def test_the_verdict_names_a_base_that_finds_almost_nothing(
    fidelities: Fidelities, record: Record
) -> None:
    assert "almost nothing" not in fidelities.verdict()
    blind = Fidelities((record("base", [0.01] * 50), record("awq", [0.0] * 50)))
    assert blind.verdict().startswith("Base itself finds almost nothing here (nDCG@5 0.0100)")


def test_strings_of_a_record_are_escaped(record: Record) -> None:
    hostile = Fidelities((record("base", BASE, data="<b>"), record("<script>", BASE, data="<b>")))
    assert "<script>" not in hostile._repr_html_()
    assert "<b>" not in hostile._repr_html_()


def test_worst_and_best_query_and_their_pictures(fidelities: Fidelities) -> None:
    variant = fidelities.pick("W3A16")
    gain = np.array(variant.values["nDCG@5"]) - np.array(fidelities.base.values["nDCG@5"])
    assert fidelities.query("worst", "W3A16") == gain.argmin()
    assert fidelities.query("best", "W3A16") == gain.argmax()
    titles = [axes.get_title() for axes in fidelities.pictures("worst").axes if axes.get_title()]
    assert titles == ["1: p1, answers", "2: p0", "1: p1, answers", "2: p0"]
    assert fidelities.base.size in fidelities.pictures("worst").get_suptitle()
    with pytest.raises(BadInput, match="hold no pages"):
        Fidelities(fidelities.records).pictures()
    with pytest.raises(BadInput, match="valid: worst, best"):
        fidelities.pictures("middle")


def test_labels_of_the_frontier_lie_beside_each_other() -> None:
    fidelities = Fidelities.load(OUTPUTS / "fidelity" / "schemes-tiny.jsonl")
    figure = fidelities.plot()
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


def test_plots(fidelities: Fidelities) -> None:
    frontier = fidelities.plot().axes[0]
    assert {text.get_text() for text in frontier.texts} == {"base", "W8A16", "W4A16", "W3A16"}
    assert frontier.get_xlabel() == "weights, MiB"
    (no_sizes,) = fidelities.plot("index").axes[0].lines
    assert [*no_sizes.get_xdata()] == [*no_sizes.get_ydata()] == []
    metrics = fidelities.plot("metrics", label="W4A16").axes[0]
    assert [label.get_text() for label in metrics.get_xticklabels()] == list(NAMES)
    with pytest.raises(BadInput, match="valid: frontier, index, metrics"):
        fidelities.plot("lines")
    with pytest.raises(BadInput, match="unknown metric 'MRR'"):
        fidelities.plot(metric="MRR")


def timed(variant: str, batch: int, step_s: float) -> Cell:
    steps = [step_s] * 8
    same = {"variant": variant, "size": "tiny", "weights": f"{variant} weights", "step_s": steps}
    same |= {
        "items_per_s": rate_of(steps, batch),
        "workload": Workload(kind="queries", batch_size=batch),
    }
    return FIRST.model_copy(update=same | {"environment": Environment(cpu="a CPU")})


def test_speed_memory_and_fidelity_side_by_side(fidelities: Fidelities) -> None:
    cells = [
        timed("base", 8, 0.1),
        timed("W4A16", 8, 0.2),
        timed("W4A16", 16, 0.2),
        timed("W2A16", 8, 0.1),
    ]
    cells[0] = cells[0].model_copy(update={"weights": "trained elsewhere"})
    table = side_by_side(Results(tuple(cells)), fidelities).set_index("variant")
    assert table["batch"].to_dict() == {"base": 8, "W4A16": 16, "W2A16": 8}
    assert table["queries/s"].to_dict() == {"base": 80, "W4A16": 80, "W2A16": 80}
    assert table["verdict"].to_dict() == {"base": "same", "W4A16": "worse", "W2A16": "-"}
    assert table["weights"].to_dict() == {"base": "different", "W4A16": "same", "W2A16": "-"}
    assert table["peak MiB"].iloc[0] == 8527
