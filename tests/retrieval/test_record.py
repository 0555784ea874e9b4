"""Fidelity records in an append-only file, and the records that are not valid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest

from colqwen_lab.errors import BadInput
from colqwen_lab.records import Environment, RecordsFile
from colqwen_lab.retrieval.record import NAMES, Fidelity, read

Make = Callable[..., Fidelity]


def open_file(path: Path, progress: Callable[[str], None] = print) -> RecordsFile[Fidelity]:
    return RecordsFile(path, Fidelity, "fidelity", progress)


def test_written_and_read_again(record: Make, tmp_path: Path) -> None:
    records = [
        record("base", [1.0, 0.5], data="one\u2028set\x85"),
        record("W4A16", [1.0, 0.25], iters=0, data="one\u2028set\x85"),
    ]
    path = tmp_path / "new" / "rows.jsonl"
    with open_file(path) as file:
        file.append(records)
    assert read(path) == records
    assert [each.label for each in records] == ["base", "W4A16 plain"]
    rate = records[0].pages_per_s
    assert rate is not None
    assert rate.median == pytest.approx(80)
    assert record("base", [1.0], page_step_s=[]).pages_per_s is None


def test_the_newest_record_of_a_variant_counts_and_no_row_is_changed(
    record: Make, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    base, awq = record("base", [1.0]), record("awq", [0.5])
    changed, longer = record("awq", [0.75]), record("awq", [0.5, 0.5])
    moved = record("awq", [0.5], environment=Environment(cpu="another CPU"))
    for rows, expected in (
        ([base, awq], [base, awq]),
        ([changed], [base, changed]),
        ([longer, moved], [base, changed, longer, moved]),
    ):
        before = path.read_bytes() if path.exists() else b""
        with open_file(path) as file:
            file.append(rows)
        assert path.read_bytes().startswith(before)
        assert read(path) == expected


def test_a_torn_last_line_is_cut_by_the_next_run(record: Make, tmp_path: Path) -> None:
    path, lines = tmp_path / "rows.jsonl", list[str]()
    old, new = [record("base", [1.0])], [record("awq", [0.5])]
    with open_file(path) as file:
        file.append(old)
    path.write_bytes(path.read_bytes() + path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="the last line is torn"):
        assert read(path) == old
    with open_file(path, lines.append) as file:
        file.append(new)
    assert "torn" in lines[0]
    assert read(path) == old + new


@pytest.mark.parametrize("text", ["notes\n", '{"schema": 1, "origin": "measured"}\n'])
def test_a_file_of_another_kind_is_not_changed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match="line 1 is not a fidelity record"):
        open_file(path)
    assert path.read_text() == text


def test_a_second_run_waits_for_the_first(record: Make, tmp_path: Path) -> None:
    path, lines, order = tmp_path / "rows.jsonl", Queue[str](), list[str]()

    def other() -> None:
        with open_file(path, lines.put) as file:
            order.append("second")
            file.append([record("base", [0.5])])

    with open_file(path) as file:
        thread = Thread(target=other)
        thread.start()
        assert "another run writes to" in lines.get(timeout=10)
        file.append([record("base", [1.0])])
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert [each.values["nDCG@5"] for each in read(path)] == [[0.5]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no row"),
        ("{}\n", "line 1 is not a fidelity record: environment"),
        ("torn", "line 1 is not a fidelity record"),
        (None, "no records file"),
    ],
)
def test_a_file_without_records(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": {"nDCG@5": [1.0, 1.0]}}, "values lack the metrics Kendall's tau, nDCG@10"),
        ({"values": {key: [1.0] for key in NAMES}}, "nDCG@5 must have 2 queries, got 1"),
        ({"top": [["p1"]]}, "top must have 2 queries, got 1"),
        ({"weights_bytes": 0}, "weights_bytes"),
        ({"page_batch": 0}, "page_batch"),
        ({"page_step_s": [0.0]}, "page_step_s"),
        ({"query_ids": [], "top": [], "values": {key: [] for key in NAMES}}, "query_ids"),
        ({"values": {key: [1.0, float("nan")] for key in NAMES}}, "finite"),
    ],
)
def test_a_record_without_a_verdict_is_an_error(
    record: Make, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        record("base", [1.0, 1.0], **changed)
