"""Search times: what is measured, recorded and skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.options import SearchOptions
from colqwen_lab.records import read_rows
from colqwen_lab.retrieval import search
from colqwen_lab.retrieval.index import Format
from colqwen_lab.retrieval.record import SearchTime
from colqwen_lab.retrieval.search import search_times, synthetic

CPU = torch.device("cpu")


def run(path: Path, lines: list[str], **values: Any) -> list[SearchTime]:
    small = {"pages": "2,3", "queries": "1,2", "vectors": 5, "dims": 32, "query_tokens": 3}
    fast = {"formats": "bfloat16,int8-pool2", "max_s": 0.001, "output": str(path)}
    return search_times(SearchOptions.of(small | fast | values), lines.append)


def test_each_format_size_and_number_of_queries_is_timed(tmp_path: Path) -> None:
    lines: list[str] = []
    path = tmp_path / "rows.jsonl"
    records = run(path, lines)
    assert read_rows(path, SearchTime, "search-times") == records
    assert len(lines) == len(records) == len({record.key() for record in records}) == 8
    for record in records:
        # A vector has 32 values of two bytes, or of one and a scale of two; five are pooled to 3.
        stored = {"bfloat16": 5 * 64, "int8-pool2": 3 * 34}[record.index_format]
        assert record.bytes_read == record.pages * stored
        assert 0 < record.page_bytes - stored < 20
        assert (record.vectors, record.dims, record.query_tokens) == (5, 32, 3)
        assert len(record.step_s) >= 10
        assert record.bytes_per_s == pytest.approx(record.bytes_read * record.rate.median)
        assert record.limit_share is None
    assert lines[0].startswith("bfloat16, 3 pages, queries 1, torch: ")
    assert {(r.pages, r.queries) for r in records} == {(2, 1), (2, 2), (3, 1), (3, 2)}


def test_an_index_that_does_not_fit_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(search, "_room", lambda _: 2 * 5 * 64)
    records = run(tmp_path / "rows.jsonl", lines, formats="bfloat16", queries=1)
    assert [record.pages for record in records] == [2]
    assert lines[0] == "bfloat16, 3 pages: skipped, an index of 0.0 GiB does not fit the memory"
    monkeypatch.setattr(search, "_room", lambda _: 0)
    with pytest.raises(MissingRequirement, match="no index fits the memory; name fewer pages"):
        run(tmp_path / "rows.jsonl", lines)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"formats": "int4"}, "format must be bfloat16, float16, int8"),
        ({"formats": "dims33"}, "dims of a format must be at most 32, got dims33"),
        ({"kernel": "triton"}, "unknown kernel 'triton'; valid: torch"),
        ({"pages": "0"}, "pages must be different whole numbers of 1 or more"),
        ({"queries": "x"}, "queries must be different whole numbers of 1 or more"),
    ],
)
def test_a_wrong_value_is_one_line(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=says) as error:
        run(tmp_path / "rows.jsonl", [], **values)
    assert "\n" not in str(error.value)


def test_synthetic_pages_are_unit_vectors_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "ROWS", 4)
    index = synthetic(Format("float16", 2), 3, 5, 32, CPU)
    assert index.lengths.tolist() == [3, 3, 3]
    assert index.vectors.float().norm(dim=-1) == pytest.approx(torch.ones(9), abs=1e-3)
    assert len({tuple(row) for row in index.vectors.tolist()}) == 9
    assert index.first(2).scores([index.vectors[:3]]).argmax() == 0


def test_a_search_out_of_memory_is_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(self: object, queries: list[Any], kernel: str) -> Any:
        if len(queries) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1, 2)

    monkeypatch.setattr(search.Index, "scores", scores)
    lines: list[str] = []
    records = run(tmp_path / "rows.jsonl", lines, formats="int8", pages=2)
    assert [record.queries for record in records] == [1]
    assert lines[1] == "int8, 2 pages, queries 2, torch: out of memory"
