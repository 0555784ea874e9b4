"""The JSON of the report's own script, out and in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colqwen_lab import report_script
from colqwen_lab.errors import BadInput
from colqwen_lab.records import (
    MIB,
    Cell,
    Memory,
    Workload,
    published_cells,
    rate_of,
    read_cells,
)


def sampled(batch: int, status: str = "ok") -> Cell:
    (first,) = [cell for cell in published_cells() if (cell.variant, cell.batch_size) == ("awq", 8)]
    steps = [0.010, 0.011, 0.012, 0.010, 0.011, 0.013, 0.010] if status == "ok" else []
    return first.model_copy(
        update={
            "status": status,
            "step_s": steps,
            "items_per_s": rate_of(steps, batch) if steps else None,
            "workload": Workload(kind="queries", batch_size=batch),
            "memory": Memory(peak_bytes=30 * MIB, resident_bytes=10 * MIB, method="cuda"),
        }
    )


def test_script_document_goes_out_and_comes_in(tmp_path: Path) -> None:
    cells = [
        sampled(8),
        sampled(16),
        sampled(32, "oom"),
        *published_cells(),
    ]
    named = [(f"AWQ_text_queries_bs{cell.batch_size}", cell) for cell in cells]
    document = report_script.document(named, {"gpu": "NVIDIA A100", "cuda_version": "12.8"})
    row = document["results"]["AWQ_text_queries_bs16"]
    assert row["total_items"] == 112
    assert row["total_time_s"] == pytest.approx(0.077)
    assert row["throughput_items_per_s"] == pytest.approx(112 / 0.077)
    assert row["latency_mean_ms_per_batch"] == pytest.approx(11)
    assert (row["cuda_max_memory_allocated_MB"], row["cuda_memory_allocated_MB"]) == (30, 10)
    path = tmp_path / "script.json"
    path.write_text(json.dumps(document, indent=2))
    back = read_cells(path)
    assert [(cell.variant, cell.batch_size, cell.environment.gpu) for cell in back] == [
        ("awq", 8, "NVIDIA A100"),
        ("awq", 16, "NVIDIA A100"),
    ]
    assert back[0].memory is not None
    assert back[0].memory.peak_bytes == 30 * MIB


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BASE_text_queries_bs8", ("base", "queries", 8)),
        ("AWQ_text_queries", ("awq", "queries", 4)),
        ("AWQ_image_documents", ("awq", "pages", 2)),
        ("AWQ_high_batch_bs1024", ("awq", "queries", 1024)),
    ],
)
def test_script_names_say_variant_workload_and_batch(
    tmp_path: Path, name: str, expected: tuple[str, str, int]
) -> None:
    row = {"throughput_items_per_s": 10.0, "cuda_max_memory_allocated_MB": 100.0}
    metadata = {"text_batch_size": 4, "image_batch_size": 2}
    path = tmp_path / "script.json"
    path.write_text(json.dumps({"metadata": metadata, "results": {name: row}}))
    (cell,) = read_cells(path)
    assert (cell.variant, cell.workload.kind, cell.batch_size) == expected


def test_a_document_saved_by_an_editor_of_windows_is_read(tmp_path: Path) -> None:
    row = {"throughput_items_per_s": 10.0, "cuda_max_memory_allocated_MB": 100.0}
    text = json.dumps({"results": {"AWQ_text_queries_bs8": row}}, indent=2)
    (tmp_path / "script.json").write_bytes(f"\ufeff{text}\n".replace("\n", "\r\n").encode())
    (cell,) = read_cells(tmp_path / "script.json")
    assert (cell.variant, cell.batch_size) == ("awq", 8)


@pytest.mark.parametrize(
    "results", [{"AWQ_text_queries": {}}, {"AWQ_bsx": {"a": 1}}, [1], {"AWQ_text_queries_bs8": 3}]
)
def test_odd_script_document_is_bad_input(tmp_path: Path, results: Any) -> None:
    path = tmp_path / "script.json"
    path.write_text(json.dumps({"metadata": {}, "results": results}))
    with pytest.raises(BadInput, match="not a document of the report's script"):
        read_cells(path)


@pytest.mark.parametrize(
    "value", ["Infinity", "NaN", "1" + "0" * 400, "1" + "0" * 5000, "1e400", "-1", "0"]
)
@pytest.mark.parametrize("field", ["throughput_items_per_s", "cuda_max_memory_allocated_MB"])
def test_odd_figures_of_the_script_are_bad_input(tmp_path: Path, field: str, value: str) -> None:
    row = {"throughput_items_per_s": "1.5", "cuda_max_memory_allocated_MB": "10"} | {field: value}
    content = ", ".join(f'"{name}": {figure}' for name, figure in row.items())
    (tmp_path / "script.json").write_text(
        f'{{"metadata": {{}}, "results": {{"BASE_bs8": {{{content}}}}}}}'
    )
    with pytest.raises(BadInput):
        read_cells(tmp_path / "script.json")
