"""A model in a process of its own: the same rows, and what ends the process costs one cell."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.measure import worker
from colqwen_lab.measure.worker import Remote, Worker, failure_of
from colqwen_lab.records import Cell, Configuration, read_cells
from tests.measure import sweeps


def run(path: Path, model: str = "base,awq", batches: str = "1,2", **options: Any) -> list[Cell]:
    return sweeps.run(path, model, batches, **{"kernel": "torch", "isolated": True} | options)


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Callable[[Remote], None]]:
    """What to do to a process before its nth call of a method, counting all processes."""
    todo: dict[tuple[str, int], Callable[[Remote], None]] = {}
    asked: list[str] = []
    really = Remote.call

    def call(self: Remote, name: str, *arguments: Any) -> Any:
        asked.append(name)
        todo.get((name, asked.count(name)), lambda one: None)(self)
        return really(self, name, *arguments)

    monkeypatch.setattr(Remote, "call", call)
    return todo


def send(number: int) -> Callable[[Remote], None]:
    return lambda one: os.kill(one.pid or 0, number)


def test_the_same_rows_as_in_one_process(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "configuration": "eager/lean/torch,eager/published/torch,fast",
        "control": True,
        "kernel": "auto",
    }
    apart = run(tmp_path / "apart.jsonl", batches="2", **options)
    together = run(tmp_path / "together.jsonl", batches="2", isolated=False, **options)

    def untimed(cell: Cell) -> dict[str, Any]:
        return cell.model_dump(
            exclude={"step_s", "control_s", "items_per_s", "timing", "environment", "interference"}
        )

    assert [untimed(cell) for cell in apart] == [untimed(cell) for cell in together]
    assert [cell.timing and cell.timing.interleaved_configurations for cell in apart] == [
        cell.timing and cell.timing.interleaved_configurations for cell in together
    ]
    assert [bool(cell.control_s) for cell in apart] == [bool(cell.control_s) for cell in together]
    assert not multiprocessing.active_children()


@pytest.mark.gpu
@pytest.mark.parametrize("configuration", ["fast", "eager/lean/auto"])
def test_a_peak_does_not_depend_on_earlier_cells(configuration: str, tmp_path: Path) -> None:
    """Libraries on a GPU keep memory of their own."""
    (alone,) = run(
        tmp_path / "alone.jsonl", "base", "2", configuration=configuration, kernel="auto"
    )
    _, later = run(
        tmp_path / "later.jsonl", "base", "1,2", configuration=configuration, kernel="auto"
    )
    assert alone.memory
    assert later.memory
    assert later.memory.peak_bytes == alone.memory.peak_bytes


@pytest.mark.parametrize("at", [("load", 2), ("measure", 1), ("step", 4)])
def test_a_killed_process_costs_one_cell_at_most(
    tmp_path: Path, before: dict[tuple[str, int], Callable[[Remote], None]], at: tuple[str, int]
) -> None:
    before[at] = send(signal.SIGKILL)
    cells = run(tmp_path / "rows.jsonl")
    lost = [cell for cell in cells if cell.status != "ok"]
    assert len(lost) == (at[0] != "load")
    assert all(
        cell.status == "failed" and "its process ended: signal 9 (SIGKILL" in cell.reason
        for cell in lost
    )
    assert read_cells(tmp_path / "rows.jsonl") == cells
    before.clear()
    again = run(tmp_path / "rows.jsonl")
    assert [cell.status for cell in again] == ["ok"] * 4
    assert [cell for cell in cells if cell.status == "ok"] == [
        cell for cell in again if cell in cells
    ]


def test_configurations_that_share_a_killed_process_are_timed_in_another(
    tmp_path: Path, before: dict[tuple[str, int], Callable[[Remote], None]]
) -> None:
    before["step", 5] = send(signal.SIGKILL)
    cells = run(
        tmp_path / "rows.jsonl",
        "base",
        "1",
        configuration="eager/lean,eager/published",
        kernel="auto",
    )
    assert sorted(cell.status for cell in cells) == ["failed", "ok"]


def test_a_process_that_cannot_start_is_a_failed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", start)
    cells = run(tmp_path / "rows.jsonl", "base")
    assert [cell.status for cell in cells] == ["failed", "failed"]
    assert cells[0].reason == "BlockingIOError: [Errno 11] Resource temporarily unavailable"
    monkeypatch.undo()
    assert [cell.status for cell in run(tmp_path / "rows.jsonl", "base")] == ["ok", "ok"]


def test_a_process_that_hangs_is_ended(
    tmp_path: Path,
    before: dict[tuple[str, int], Callable[[Remote], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hang(one: Remote) -> None:
        send(signal.SIGSTOP)(one)
        monkeypatch.setattr(worker, "DEADLINE_S", 0.1)

    before["step", 2] = hang
    before["rest", 1] = lambda one: monkeypatch.setattr(worker, "DEADLINE_S", 60)
    cells = run(tmp_path / "rows.jsonl", "base")
    assert [cell.status for cell in cells] == ["failed", "ok"]
    assert cells[0].reason == "no answer to 'step' within 0.1 s; its process was ended"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be able to")
def test_a_missing_requirement_of_a_process_is_the_sweep_s(tmp_path: Path) -> None:
    with pytest.raises(MissingRequirement, match="kernel fp8 needs a CUDA GPU"):
        run(tmp_path / "rows.jsonl", "base", configuration="fast/lean/fp8", kernel="auto")
    assert not multiprocessing.active_children()


def test_interrupted_it_ends_its_processes_and_keeps_the_rows(
    tmp_path: Path, before: dict[tuple[str, int], Callable[[Remote], None]]
) -> None:
    def interrupt(_: Remote) -> None:
        raise KeyboardInterrupt

    before["measure", 3] = interrupt
    with pytest.raises(KeyboardInterrupt, match="stopped; 2 of 4 cells on file"):
        run(tmp_path / "rows.jsonl")
    assert not multiprocessing.active_children()
    assert [cell.batch_size for cell in read_cells(tmp_path / "rows.jsonl")] == [1, 1]


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from tests.measure.sweeps import options_of\n"
        "from colqwen_lab.measure.sweep import sweep\n"
        "print('here')\n"
        f"sweep(options_of({str(tmp_path / 'rows.jsonl')!r}, max_s=0.1, min_steps=2))\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.stdout == "here\n"
    assert "Traceback" not in done.stderr
    assert "leaked" not in done.stderr


def test_reasons_hold_no_home_user_or_token() -> None:
    text = f"no {Path.home()}/x, /home/anna/y, /Users/Anna/z, C:\\Users\\anna\\w; hf_{'a' * 30}"
    assert "anna" not in failure_of(RuntimeError(text)).reason


def test_an_untimed_step_of_the_same_batch_precedes_each_timed_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A neighbour leaves a GPU cool or throttled, which must not reach the samples."""
    now = [0.0]
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    calls: list[bool] = []

    def step(warm_up: bool = False) -> None:
        calls.append(warm_up)
        now[0] += 1.0

    one = Worker(None, torch.device("cpu"), Configuration(variant="base"), str)  # type: ignore[arg-type]
    one.steps = {("lean", False): step}  # type: ignore[dict-item]
    assert one.step("lean", False, True) == 1.0
    assert calls == [True, False]
    assert one.step("lean", False) == 1.0
    assert calls == [True, False, False]
