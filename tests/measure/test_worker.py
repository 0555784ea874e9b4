"""A model in a process of its own: the same rows, and what ends the process costs one cell."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import psutil
import pytest
import torch

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.measure import worker
from colqwen_lab.measure.timing import Failure
from colqwen_lab.measure.worker import Remote, Worker, failure_of
from colqwen_lab.model.checkpoint import default_checkpoint
from colqwen_lab.model.config import VARIANTS
from colqwen_lab.records import Cell, Configuration, Memory, Stages, Workload, read_cells
from colqwen_lab.retrieval import index
from colqwen_lab.runtime.batches import Batches, query_batches
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
        times = {"step_s", "control_s", "items_per_s", "timing", "loading", "energy"}
        return cell.model_dump(exclude=times | {"environment", "interference"})

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


@pytest.mark.exhaustive
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
    calls: list[int] = []

    def step(batch: dict[str, Any]) -> None:
        calls.append(int(batch["input_ids"]))
        now[0] += 1.0

    one = worker_of()
    one.inputs = [{"input_ids": torch.tensor(number)} for number in range(2)]
    one.steps = {("lean", False): step}  # type: ignore[dict-item]
    assert one.step("lean", False, 1, True) == 1.0
    assert calls == [1, 1]
    assert one.step("lean", False, 0) == 1.0
    assert calls == [1, 1, 0]


def worker_of(device: str = "cpu", make: Any = str) -> Worker:
    return Worker(None, torch.device(device), Configuration(variant="base"), make)  # type: ignore[arg-type]


def test_batches_that_wait_take_no_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(**options: Any) -> Batches:
        inputs = [{"input_ids": torch.zeros(1, n, device=options["device"])} for n in (1, 2)]
        workload = Workload(kind="queries", batch_size=1, shapes=[0, 1])
        return Batches(inputs, workload)

    one, devices = worker_of("meta", make), list[list[str]]()
    one.first_step_s = 1.0
    one.loaded = SimpleNamespace(model=SimpleNamespace(config=None, vlm={}), tokenizer=None)

    def measure(loaded: Any, batch: dict[str, torch.Tensor], *_: Any) -> Memory:
        waiting = [inputs["input_ids"].device.type for inputs in one.inputs]
        devices.append([batch["input_ids"].device.type, *waiting])
        return Memory(peak_bytes=batch["input_ids"].shape[1], method="tracked")

    monkeypatch.setattr(worker, "measure", measure)
    memory, batches = one.measure(1, "lean", True)
    assert devices == [["meta", "cpu", "cpu"]] * 2
    assert (memory.peak_bytes, batches.inputs) == (2, [])


def test_the_stages_of_unlike_batches_are_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])

    class Encoder(torch.nn.Module):
        def forward(self, seconds: torch.Tensor) -> None:
            now[0] += float(seconds)

    def step(batch: dict[str, torch.Tensor]) -> None:
        for _ in range(2):  # images of two grids
            encoder(batch["pixels"] / 2)
        now[0] += 2 * float(batch["pixels"])

    encoder, one = Encoder(), worker_of()
    vlm = SimpleNamespace(model=SimpleNamespace(visual=encoder))
    one.loaded = SimpleNamespace(model=SimpleNamespace(vlm=vlm))
    one.inputs = [{"pixels": torch.tensor(seconds)} for seconds in (1.0, 1.0, 10.0)]
    monkeypatch.setattr(one, "_steps", lambda protocol: step)
    assert one.stages("lean") == Stages(vision_encoder_s=4.0, language_model_s=8.0)


class Hostile:
    """Calls `act` where a worker reads its arguments."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def __reduce__(self) -> Any:
        return self.act, ()


def raises() -> None:
    raise ModuleNotFoundError(f"no library in {Path.home()}/x or /home/anna/y")


def aborts() -> None:
    os.write(2, b"terminate called\n  what():  CUDA error in /home/anna/y\nframe 1\n")
    os.abort()


def spawns() -> int:
    return subprocess.Popen(["sleep", "60"]).pid


def remote(act: Callable[[], Any]) -> Remote:
    return Remote(None, torch.device("cpu"), Configuration(variant="base"), Hostile(act))


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (raises, "exit code 1: ModuleNotFoundError: no library in ~/x or ~/y"),
        (aborts, "signal 6 (SIGABRT): what(): CUDA error in ~/y"),
    ],
)
def test_a_worker_that_dies_says_why_and_prints_nothing(
    act: Callable[[], Any], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    failure = remote(act).call("load", None, [1])
    assert failure == Failure("failed", f"its process ended: {reason}", ended=True)
    assert capfd.readouterr() == ("", "")


def test_what_a_worker_started_ends_with_it() -> None:
    one = remote(spawns)
    assert isinstance(one.call("rest"), Failure)  # it has no model, and lives
    (child,) = psutil.Process(one.pid).children()
    one.end()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_the_server_s_socket_has_a_short_path_that_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(worker.forkserver._forkserver, "_forkserver_address", None)
    folders: list[Path] = []

    def ensure_running() -> None:
        folders.append(Path(multiprocessing.util.get_temp_dir()))
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folders[0]}/listener-{'x' * 8}")

    monkeypatch.setattr(worker.forkserver, "ensure_running", ensure_running)
    worker._start_server(multiprocessing.get_context("forkserver"))
    assert not folders[0].exists()
    assert not list(long.iterdir())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_batches_too_large_for_the_host_cost_their_own_cells_alone() -> None:
    """Execution fast makes the batches of all sizes while it loads, one size at a time."""
    checkpoint = default_checkpoint(VARIANTS["base"], "tiny", "auto", torch.device("cpu"))
    held, most = WeakSet[torch.Tensor](), 0

    def batches(batch_size: int, **values: Any) -> Batches:
        nonlocal most
        most = max(most, len({len(ids) for ids in held}))
        if batch_size > 4:
            raise MemoryError
        made = query_batches(batch_size=batch_size, texts="report", samples=0, **values)
        held.update(batch["input_ids"] for batch in made.inputs[1:])
        return made

    configuration = Configuration(variant="base", execution="fast")
    own = Worker(checkpoint, torch.device("cpu"), configuration, batches)
    assert not isinstance(own.call("load", None, [2, 4, 8]), Failure)
    assert most == 0
    assert not isinstance(own.call("measure", 2, "lean", True), Failure)
    assert own.call("measure", 8, "lean", True).status == "oom"


def test_to_store_a_batch_reads_no_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "read", None)
    with worker.stored() as store:
        for number in range(3):
            store([number], [torch.randn(3, 320)])
