"""Records of fidelity travel through a file whole, or are refused with the line named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest

from colqwen_lab.errors import BadInput
from colqwen_lab.retrieval.metrics import NAMES
from colqwen_lab.retrieval.record import Fidelity, read, writing


def test_there_and_back(record: Callable[..., Fidelity], tmp_path: Path) -> None:
    records = [record("base", [1.0, 0.5]), record("W4A16", [1.0, 0.25], iters=0)]
    path = tmp_path / "new" / "rows.jsonl"
    with writing(path, print) as write:
        write(records)
    assert read(path) == records
    unbroken = [record("base", [1.0], data="one\u2028set\x85")]
    with writing(path, print) as write:
        write(unbroken)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == unbroken
    assert [one.label for one in records] == ["base", "W4A16 plain"]
    rate = records[0].pages_per_s
    assert rate is not None
    assert rate.median == pytest.approx(80)
    assert record("base", [1.0], page_step_s=[]).pages_per_s is None


def test_what_was_in_the_file_is_set_aside_once_there_is_another_row(
    record: Callable[..., Fidelity], tmp_path: Path
) -> None:
    path, aside = tmp_path / "rows.jsonl", tmp_path / "rows.superseded.jsonl"
    old, new = [record("base", [1.0])], [record("base", [0.5]), record("awq", [0.5])]
    path.touch()  # an empty file is nobody's
    for rows, before in ((old, []), (new, old), (old, old + new)):
        with writing(path, print) as write:
            for count in range(1, len(rows) + 1):
                write(rows[:count])
                assert read(path) == rows[:count]
        assert (read(aside) if aside.exists() else []) == before


@pytest.mark.parametrize("text", ["notes\n", '{"schema": 1, "origin": "measured"}\n'])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match="line 1 is no fidelity record"), writing(path, print):
        pytest.fail("must not start")
    assert path.read_text() == text


def test_two_runs_into_one_file_wait_for_each_other(
    record: Callable[..., Fidelity], tmp_path: Path
) -> None:
    path, said, order = tmp_path / "rows.jsonl", Queue[str](), []

    def other() -> None:
        with writing(path, said.put) as write:
            order.append("second")
            write([record("base", [0.5])])

    with writing(path, print) as write:
        thread = Thread(target=other)
        thread.start()
        assert "another run writes to" in said.get(timeout=10)
        write([record("base", [1.0])])
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert [len(read(one)) for one in (path, tmp_path / "rows.superseded.jsonl")] == [1, 1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1 is no fidelity record"),
        ("{}\n", "line 1 is no fidelity record: variant"),
        ("torn", "line 1 is no fidelity record"),
        (None, "cannot be read as fidelity records"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=says):
        read(path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"values": {"nDCG@5": [1.0, 1.0]}}, "no values of Kendall's tau, nDCG@10"),
        ({"values": {key: [1.0] for key in NAMES}}, "nDCG@5 of 1 queries, and there are 2"),
        ({"top": [["p1"]]}, "top of 1 queries, and there are 2"),
        ({"weights_bytes": 0}, "weights_bytes"),
        ({"page_batch": 0}, "page_batch"),
        ({"page_step_s": [0.0]}, "page_step_s"),
        ({"query_ids": [], "top": [], "values": {key: [] for key in NAMES}}, "query_ids"),
    ],
)
def test_a_record_that_gives_no_verdict_is_refused(
    record: Callable[..., Fidelity], changed: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        record("base", [1.0, 1.0], **changed)


def test_a_figure_that_is_none_is_refused(record: Callable[..., Fidelity]) -> None:
    with pytest.raises(ValueError, match="finite"):
        record("base", [float("nan")])
