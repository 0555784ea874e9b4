"""The report's own command line."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from colqwen_lab import load, signals
from colqwen_lab.records import MIB

PROGRAM = Path(__file__).parent.parent / "benchmark.py"
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


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The program in this process, in an empty folder; it handles signals of the whole process."""
    before = {number: signal.getsignal(number) for number in signals.STOPPING}

    def run(*flags: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
        runpy.run_path(str(PROGRAM), run_name="__main__")

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.STOPPING)
def test_stopped_it_says_where_the_rows_are(
    number: int,
    benchmark: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(signals, "received", [])
    monkeypatch.setattr(
        "colqwen_lab.measure.sweep.sweep", lambda *_, **__: signal.raise_signal(number)
    )
    with pytest.raises(SystemExit, match=str(128 + number)):
        benchmark("--text_only")
    line = "benchmark.py: stopped; the records beside the JSON hold the rows\n"
    assert capsys.readouterr().err == line


@pytest.mark.exhaustive
def test_sweep_of_the_quantised_model(tmp_path: Path) -> None:
    flags = [
        "--only_awq",
        "--sweep_batch_sizes",
        "1,2",
        "--high_batch_sweep",
        "2,4",
        "--output_json",
        "x.json",
    ]
    command = [sys.executable, str(PROGRAM), *flags, "--measure_steps", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "x.json").read_text())
    names = [
        "AWQ_text_queries_bs1",
        "AWQ_text_queries_bs2",
        "AWQ_high_batch_bs2",
        "AWQ_high_batch_bs4",
    ]
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
    assert [(cell.variant, cell.batch_size) for cell in read] == [
        ("awq", 1),
        ("awq", 2),
        ("awq", 2),
        ("awq", 4),
    ]


def test_both_models_without_a_sweep(benchmark: Callable[..., None], tmp_path: Path) -> None:
    benchmark(
        "--text_only", "--text_batch_size", "2", "--measure_steps", "2", "--output_json", "y.json"
    )
    assert list(json.loads((tmp_path / "y.json").read_text())["results"]) == [
        "BASE_text_queries",
        "AWQ_text_queries",
    ]


def test_a_second_run_shows_its_own_figures(
    benchmark: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the same JSON with other settings: every scenario is measured again."""
    monkeypatch.setattr("colqwen_lab.measure.sweep.interference", lambda before: ([], None))
    flags = ["--only_base", "--text_batch_size", "1", "--image_size", "64", "--image_batch_size"]
    flags += ["1", "--image_samples", "1", "--warmup_steps", "0", "--output_json", "w.json"]
    times = []
    for samples in (2, 3):
        benchmark(*flags, "--measure_steps", "1", "--text_samples", str(samples))
        document = json.loads((tmp_path / "w.json").read_text())
        assert document["metadata"]["text_samples"] == samples
        times.append({name: row["total_time_s"] for name, row in document["results"].items()})
    assert times[0].keys() == times[1].keys() == {"BASE_text_queries", "BASE_image_documents"}
    assert all(times[0][name] != times[1][name] for name in times[0])


def test_image_documents_follow_the_queries(benchmark: Callable[..., None], tmp_path: Path) -> None:
    flags = ["--only_base", "--text_batch_size", "2", "--measure_steps", "1", "--warmup_steps", "0"]
    images = [
        "--image_size",
        "64",
        "--image_samples",
        "4",
        "--image_batch_size",
        "2",
        "--output_json",
        "z.json",
    ]
    benchmark(*flags, *images)
    results = json.loads((tmp_path / "z.json").read_text())["results"]
    assert list(results) == ["BASE_text_queries", "BASE_image_documents"]
    assert results["BASE_image_documents"]["total_items"] == 2
    pages = load(tmp_path / "z.records.jsonl").select(workload="pages").cells[0].workload
    assert (pages.pages, pages.distinct) == ("synthetic, 64 x 64 pixels", 4)
    assert [cell.workload.kind for cell in load(tmp_path / "z.json")] == ["queries", "pages"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sweep_batch_sizes", "1,a"], "must be different whole numbers"),
        (["--only_base", "--only_awq"], "not allowed with"),
        (["--nope"], "--nope"),
        (["--image_size", "-3"], "image_size"),
        (["--output_json", "."], "got a folder; name another"),
        (["--output_json", "/dev/null"], "got a device; name another"),
        (["--output_json", str(PROGRAM)], "holds content of another kind"),
        (["--output_json", "none/x.json"], "must be a file in a writable folder"),
    ],
)
def test_bad_flags(
    flags: list[str],
    says: str,
    benchmark: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark(*flags)
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1, said
    assert not list(tmp_path.iterdir())
