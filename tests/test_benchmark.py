"""The report's own command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from colqwen_lab import load
from colqwen_lab.records import MIB

ROOT = Path(__file__).parent.parent
KEYS = {
    "scenario",
    "total_items",
    "total_time_s",
    "throughput_items_per_s",
    "latency_mean_ms_per_batch",
    "latency_std_ms_per_batch",
    "cuda_memory_allocated_MB",
    "cuda_max_memory_allocated_MB",
    "cuda_max_memory_reserved_MB",
}


def benchmark(cwd: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmark.py"), *flags], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_sweep_of_the_quantised_model(tmp_path: Path) -> None:
    flags = ["--only_awq", "--sweep_batch_sizes", "1,2", "--high_batch_sweep", "2,4", "--output_json", "x.json"]
    done = benchmark(tmp_path, *flags, "--measure_steps", "4")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "x.json").read_text())
    names = ["AWQ_text_queries_bs1", "AWQ_text_queries_bs2", "AWQ_high_batch_bs2", "AWQ_high_batch_bs4"]
    assert list(document["results"]) == names
    row = document["results"]["AWQ_text_queries_bs2"]
    assert row.keys() == KEYS
    assert row["total_items"] == 2 * 4
    assert row["throughput_items_per_s"] == row["total_items"] / row["total_time_s"]
    assert document["metadata"]["measure_steps"] == 4
    cells = {cell.batch_size: cell for cell in load(tmp_path / "x.records.jsonl")}
    assert cells[2].protocol == "published"
    assert cells[2].backend.dtype == "float16"
    assert cells[2].memory is not None
    assert row["cuda_max_memory_allocated_MB"] == cells[2].memory.peak_bytes / MIB
    read = load(tmp_path / "x.json")
    assert [(cell.variant, cell.batch_size) for cell in read] == [("awq", 1), ("awq", 2), ("awq", 2), ("awq", 4)]


def test_both_models_without_a_sweep(tmp_path: Path) -> None:
    done = benchmark(
        tmp_path, "--text_only", "--text_batch_size", "2", "--measure_steps", "2", "--output_json", "y.json"
    )
    assert done.returncode == 0, done.stderr
    assert list(json.loads((tmp_path / "y.json").read_text())["results"]) == ["BASE_text_queries", "AWQ_text_queries"]


def test_image_documents_follow_the_queries(tmp_path: Path) -> None:
    flags = ["--only_base", "--text_batch_size", "2", "--measure_steps", "1", "--warmup_steps", "0"]
    images = ["--image_size", "64", "--image_samples", "4", "--image_batch_size", "2", "--output_json", "z.json"]
    done = benchmark(tmp_path, *flags, *images)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "z.json").read_text())["results"]
    assert list(results) == ["BASE_text_queries", "BASE_image_documents"]
    assert results["BASE_image_documents"]["total_items"] == 2
    pages = load(tmp_path / "z.records.jsonl").select(workload="pages").cells[0].workload
    assert (pages.pages, pages.distinct) == ("drawn, 64 x 64 pixels", 4)
    assert [cell.workload.kind for cell in load(tmp_path / "z.json")] == ["queries", "pages"]


def test_bad_flags(tmp_path: Path) -> None:
    bad = benchmark(tmp_path, "--sweep_batch_sizes", "1,a")
    assert bad.returncode == 2
    assert "valid: different whole numbers" in bad.stderr
    for flags in (["--only_base", "--only_awq"], ["--nope"], ["--image_size", "-3"], ["--output_json", "."]):
        bad = benchmark(tmp_path, *flags)
        assert bad.returncode == 2
        assert bad.stderr.count("\n") == 1, bad.stderr
    assert not list(tmp_path.iterdir())
