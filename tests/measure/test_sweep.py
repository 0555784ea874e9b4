"""Sweeps of the tiny network: rows on disk as they come, out of memory and kills included."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import re
import signal
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.measure import sweep as module
from colqwen_lab.measure import worker
from colqwen_lab.measure.environment import environment
from colqwen_lab.measure.sweep_file import Interrupted
from colqwen_lab.measure.timing import Failure, StoppingRule
from colqwen_lab.measure.worker import failure_of
from colqwen_lab.predict.predictor import Setup, predict
from colqwen_lab.records import Cell, Quantization, RecordsFile, read_cells
from colqwen_lab.runtime import eager as execution
from tests.measure.frames import own_frames, recording_batches
from tests.measure.sweeps import options_of, run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "sweep.jsonl"


def rows_of(path: Path) -> list[Cell]:
    """Every row of the file, also those that a later one replaces."""
    return [Cell.model_validate_json(line) for line in path.read_text().splitlines()]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[int, Exception]:
    """Batch sizes at which the forward raises."""
    errors: dict[int, Exception] = {}

    def forward(model: Any, inputs: Any, use_cache: bool) -> Any:
        if error := errors.get(inputs["input_ids"].shape[0]):
            raise error
        return execution.eager(model, inputs, use_cache)

    monkeypatch.setitem(execution.EXECUTIONS, "eager", forward)
    return errors


def test_a_cell_says_all(path: Path) -> None:
    cells = run(path, "base,awq", "1,4", kernel="torch", stopping=StoppingRule(max_s=0.3))
    assert [(c.variant, c.batch_size) for c in cells] == [
        ("base", 1),
        ("awq", 1),
        ("base", 4),
        ("awq", 4),
    ]
    base, awq = cells[2:]
    assert awq.backend.engaged == {"auto_round:torch_zp": 28}
    assert base.backend.engaged == {"torch.nn.Linear": 28}
    assert awq.backend.kept_16bit == {"vision encoder": 24, "head": 1}
    assert len(awq.step_s) >= 10
    assert awq.items_per_s.low <= awq.items_per_s.median <= awq.items_per_s.high
    assert awq.timing.interleaved_with == ["base"]
    assert awq.timing.stopped in ("converged", "time", "count")
    assert awq.memory.method == "tracked"
    assert awq.memory.weights_bytes < base.memory.weights_bytes
    assert awq.memory.peak_bytes > awq.memory.weights_bytes
    assert (awq.size, awq.weights, awq.workload.tokens) == ("tiny", "random tiny (seed 0)", 18)
    here = awq.environment
    assert here.torch == torch.__version__
    assert all(
        (
            here.cpu,
            here.threads,
            here.python,
            here.transformers,
            here.auto_round,
            here.code,
            here.started_at,
        )
    )
    text = path.read_text()
    assert not any(
        secret in text for secret in (str(Path.home()), os.uname().nodename, str(Path.cwd()))
    )
    assert read_cells(path) == cells
    result = json.loads(path.with_suffix(".result.json").read_text())
    assert 0 < result.pop("timed_s") < result.pop("wall_s")
    assert result == {
        "complete": True,
        "records": "sweep.jsonl",
        "cells": 4,
        "ok": 4,
        "oom": 0,
        "failed": 0,
    }


@pytest.mark.parametrize("at", [1, 2, 4])
def test_out_of_memory_is_a_row_and_the_sweep_goes_on(
    path: Path, failing: dict[int, Exception], at: int
) -> None:
    failing[at] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    cells = run(path)
    assert {c.batch_size: c.status for c in cells} == {1: "ok", 2: "ok", 4: "ok"} | {at: "oom"}
    lost = next(c for c in cells if c.status == "oom")
    assert "Tried to allocate 2.00 GiB" in lost.reason
    assert lost.items_per_s is lost.memory is None
    failing.clear()
    assert [c.status for c in run(path)].count("oom") == 1, (
        "out of memory stays out of memory until --fresh"
    )
    assert [c.status for c in run(path, fresh=True)].count("oom") == 0


def test_out_of_memory_of_one_model_leaves_the_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(model: Any, inputs: Any, use_cache: bool) -> Any:
        if not hasattr(model.config, "quantization_config") and inputs["input_ids"].shape[0] == 4:
            raise torch.OutOfMemoryError("simulated")
        return execution.eager(model, inputs, use_cache)

    monkeypatch.setitem(execution.EXECUTIONS, "eager", forward)
    cells = {(c.variant, c.batch_size): c for c in run(path, "base,awq")}
    assert cells["base", 4].status == "oom"
    assert cells["awq", 4].status == "ok"
    assert cells["awq", 4].timing.interleaved_with == []
    assert cells["awq", 2].timing.interleaved_with == ["base"]


def test_a_failure_is_a_row_and_tried_again(path: Path, failing: dict[int, Exception]) -> None:
    failing[2] = RuntimeError("a kernel broke")
    cells = run(path)
    assert [c.status for c in cells] == ["ok", "failed", "ok"]
    assert cells[1].reason == "RuntimeError: a kernel broke"
    failing.clear()
    again = run(path)
    assert [c.status for c in again] == ["ok"] * 3
    assert again[0] == cells[0]
    assert Counter(c.batch_size for c in read_cells(path)) == {1: 1, 2: 1, 4: 1}
    assert [c.status for c in rows_of(path)] == ["ok", "failed", "ok", "ok"], "rows stay"


def test_a_size_is_never_taken_for_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(path, batches="1")
    monkeypatch.setattr(
        worker, "load", lambda *args: pytest.fail("the 8b is built, not read from the file")
    )
    with pytest.raises(pytest.fail.Exception, match="the 8b is built"):
        run(path, batches="1", size="8b")


def test_a_model_that_does_not_load_leaves_the_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BASE on an 8 GB card."""
    really = worker.load

    def load(source: Any, *args: Any) -> Any:
        if source.quantization is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return really(source, *args)

    monkeypatch.setattr(worker, "load", load)
    cells = {(c.variant, c.batch_size): c for c in run(path, "base,awq", "1,2")}
    assert [cells["base", batch].status for batch in (1, 2)] == ["oom", "oom"]
    assert [cells["awq", batch].status for batch in (1, 2)] == ["ok", "ok"]
    assert cells["base", 1].weights == "random tiny (seed 0)"


def test_models_that_do_not_fit_together_are_timed_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, alive = worker.load, []

    def load(source: Any, *args: Any) -> Any:
        alive[:] = [one for one in alive if one() is not None]
        if alive:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loaded = really(source, *args)
        alive.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(worker, "load", load)
    monkeypatch.setattr(worker, "free", lambda device: gc.collect())
    cells = run(path, "base,awq", "1,2")
    assert [c.status for c in cells] == ["ok"] * 4
    assert all(c.timing is not None and c.timing.interleaved_with == [] for c in cells)
    assert Counter((c.variant, c.batch_size) for c in read_cells(path)).most_common(1)[0][1] == 1


def test_out_of_memory_beside_another_is_tried_again_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, on_file = module.time_interleaved, []

    def crowded(steps: Any, *args: Any) -> Any:
        on_file.append(
            [cell.variant for cell in read_cells(path)]
            if path.exists() and path.stat().st_size
            else []
        )
        samples = really(steps, *args)
        if len(steps) > 1:
            failure = Failure("oom", "the other one took the memory")
            samples[next(iter(samples))].failure = failure
        return samples

    monkeypatch.setattr(module, "time_interleaved", crowded)
    cells = {c.variant: c for c in run(path, "base,awq", "2")}
    assert (cells["base"].status, cells["awq"].status) == ("ok", "ok")
    assert cells["base"].timing.interleaved_with == cells["awq"].timing.interleaved_with == []
    assert on_file == [[], ["awq"]], "what had ended is on file before the other is tried again"


def test_peak_is_that_of_the_longest_batch(path: Path) -> None:
    (cell,) = run(path, batches="4", texts="natural")
    tokens = cell.workload.tokens
    longest = predict(Setup("tiny", tokens=tokens, padded=True, capability=None), 4)
    assert cell.memory.peak_bytes == pytest.approx(longest.memory.peak_bytes, rel=0.01)


def test_a_kernel_is_for_the_quantised_one(path: Path) -> None:
    cells = run(path, "base,awq", "1", kernel="torch")
    cells += run(path, "base,awq", "1", kernel="auto_round:torch_zp")
    assert cells[-1].backend.engaged == {"auto_round:torch_zp": 28}
    with pytest.raises(BadInput, match="multiplies packed weights; valid here: auto, torch"):
        run(path, "base", "1", kernel="auto_round:torch_zp")


def test_fresh_measures_again_only_what_was_asked(path: Path) -> None:
    first = run(path, "base,awq", "1,2")
    again = run(path, "base", "1", fresh=True)
    assert rows_of(path) == [*first, *again]
    assert read_cells(path) == [again[0], *first[1:]]


def test_another_tool_s_json_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text('{"metadata": {}, "results": {}}')
    with pytest.raises(BadInput, match="is not a cell record"):
        run(path)
    assert path.read_text() == '{"metadata": {}, "results": {}}'


def test_weights_go_with_a_named_model(path: Path, base_folder: Path) -> None:
    for model in (str(base_folder), "owner/name"):
        with pytest.raises(BadInput, match="holds its own"):
            run(path, model, weights="random")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("x"), "oom"),
        (MemoryError(), "oom"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            "oom",
        ),
        (RuntimeError("shape mismatch"), "failed"),
        (ValueError("x"), "failed"),
    ],
)
def test_outcome_of_an_exception(error: Exception, status: str) -> None:
    assert failure_of(error).status == status


def test_resumes_where_it_stopped(path: Path) -> None:
    first = run(path, batches="1,2")
    more = run(path, batches="1,2,4")
    assert more[:2] == first
    assert [c.batch_size for c in more] == [1, 2, 4]
    both = run(path, "base,awq", "1,2")
    assert [c.variant for c in both] == ["base", "awq"] * 2
    assert both[0] == first[0]
    assert Counter((c.variant, c.batch_size) for c in read_cells(path)).most_common(1)[0][1] == 1


@pytest.mark.parametrize(
    "other",
    [{"protocol": "published"}, {"texts": "natural"}, {"execution": "fast"}, {"dtype": "float32"}],
)
def test_other_settings_are_other_cells(path: Path, other: dict[str, str]) -> None:
    first = run(path, batches="2")
    second = run(path, batches="2", **other)
    assert second != first
    assert read_cells(path) == [*first, *second]
    assert run(path, batches="2") == first


@pytest.mark.parametrize("other", [{"min_steps": 3}, {"max_s": 0.3}, {"control": True}])
def test_rows_that_were_timed_otherwise_are_measured_again(
    path: Path, other: dict[str, Any], failing: dict[int, Exception]
) -> None:
    failing[2] = torch.OutOfMemoryError("simulated")
    before = {"stopping": None, "min_steps": 2, "max_s": 0.2}
    first = run(path, "base,awq", "4,2", **before)
    second = run(path, "base,awq", "4,2", **before | other)
    changed = [old != new for old, new in zip(first, second, strict=True)]
    only_base = "control" in other
    assert changed == [True, not only_base, False, False]
    assert len(second[0].step_s) >= other.get("min_steps", 2)
    assert bool(second[0].control_s) == only_base
    assert run(path, "base,awq", "4,2", **before | other) == second == read_cells(path)


@pytest.mark.parametrize(
    "change", [{"torch": "1.0"}, {"gpu": "NVIDIA T4"}, {"code": "000000000000"}]
)
def test_another_environment_or_code_is_never_mixed(
    path: Path, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(path)
    elsewhere = environment(torch.device("cpu")).model_copy(update=change)
    monkeypatch.setattr(module, "environment", lambda device: elsewhere)
    second = run(path)
    assert all(c.environment == elsewhere for c in second)
    assert rows_of(path) == [*first, *second]
    assert run(path) == second


def test_other_weights_are_other_cells(path: Path, base_folder: Path) -> None:
    first = run(path)
    second = run(path, weights=str(base_folder))
    assert rows_of(path) == [*first, *second]
    assert second[0].weights.startswith("folder:checkpoint#")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_another_file_in_the_folder_is_other_cells(
    name: str, path: Path, base_folder: Path, edited: Any
) -> None:
    folder = edited(base_folder)
    first = run(path, str(folder), "1", weights="auto")
    (folder / name).write_text((folder / name).read_text() + "\n")
    second = run(path, str(folder), "1", weights="auto")
    assert second[0].weights != first[0].weights
    assert run(path, str(folder), "1", weights="auto") == second
    assert rows_of(path) == [*first, *second]


def undisturbed_run(path: Path, batches: str) -> None:
    module.interference = lambda before: ([], None)
    run(path, "base,awq", batches)


def test_killed_in_its_middle_it_resumes(path: Path) -> None:
    batches = ",".join(map(str, range(1, 14)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["colqwen_lab.measure.sweep"])
    process = context.Process(target=undisturbed_run, args=(path, batches))
    process.start()
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().count("\n") >= 5):
        assert process.is_alive(), "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    survived = read_cells(path)
    assert 5 <= len(survived) < 26
    assert not path.with_suffix(".result.json").exists()
    cells = run(path, "base,awq", batches)
    assert [c for c in cells if c in survived] == survived
    counts = Counter((c.variant, c.batch_size) for c in rows_of(path))
    assert len(counts) == 26
    assert set(counts.values()) == {1}


def test_torn_last_line_is_measured_again(path: Path) -> None:
    cells = run(path)
    path.write_text(path.read_text()[:-20])
    again = run(path)
    assert again[:2] == cells[:2]
    assert Counter(c.batch_size for c in read_cells(path)) == {1: 1, 2: 1, 4: 1}


def test_a_folder_or_a_scheme_is_a_model(path: Path, base_folder: Path) -> None:
    cells = run(path, f"{base_folder},W8A16", "2", weights="auto")
    assert [c.variant for c in cells] == ["checkpoint", "W8A16"]
    assert cells[1].weights.startswith("made here from the tiny default (tiny-W8A16-")


def test_weights_that_are_not_the_model_are_refused(path: Path, base_folder: Path) -> None:
    with pytest.raises(MissingRequirement, match="holds 16-bit weights, which is not awq"):
        run(path, "awq", weights=str(base_folder))
    with pytest.raises(BadInput, match="is of size tiny, not 4b"):
        run(path, "base", weights=str(base_folder), size="4b")
    assert not path.exists()


def test_folder_that_cannot_be_written() -> None:
    with pytest.raises(BadInput, match=r"cannot write .*name a file in a folder you can write"):
        run(Path("/proc/nowhere/sweep.jsonl"))


def test_a_records_file_of_something_else_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("my thesis\n")
    with pytest.raises(BadInput, match="line 1 is not a cell record"):
        run(path)
    assert path.read_text() == "my thesis\n"


def test_two_sweeps_into_one_file_come_one_after_the_other(path: Path) -> None:
    lines: list[str] = []
    held = RecordsFile(path, Cell)
    with ThreadPoolExecutor() as pool:
        second = pool.submit(run, path, batches="1", progress=lines.append)
        while not lines:
            time.sleep(0.01)
        assert lines == [f"another run writes to {path}; waiting for it"]
        assert not second.done()
        held.__exit__()
        assert second.result() == read_cells(path)


def test_configurations_are_interleaved_each_where_its_kernel_can_run(path: Path) -> None:
    cells = run(path, "base,awq", "2", configuration="report,best,fast/lean/torch", control=True)
    assert [str(c.configuration) for c in cells] == [
        "base eager/published/auto",
        "awq eager/published/torch",
        "base fast/lean/auto",
        "awq fast/lean/auto",
        "awq fast/lean/torch",
    ]
    best = cells[3]
    assert best.backend.engaged == {"torch._weight_int4pack_mm_for_cpu": 28}
    assert len(best.timing.interleaved_configurations) == 4
    assert "base fast/lean/auto" in best.timing.interleaved_configurations
    assert [bool(c.control_s) for c in cells] == [True, False, True, False, False]
    assert len({len(c.step_s) for c in cells} | {len(cells[0].control_s)}) == 1
    assert run(path, "base,awq", "2", configuration="best") == [cells[2], cells[3]]
    with pytest.raises(BadInput, match="kernel fp8 multiplies 16-bit weights; valid here: auto"):
        run(path, "awq", "2", configuration="fast/lean/fp8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "5b"}, "unknown size '5b'.*valid: auto, tiny, mid, 4b, 8b"),
        ({"workload": "pictures"}, "unknown .*'pictures'.*valid: queries"),
        ({"execution": "slow"}, "unknown .*'slow'.*valid: eager"),
        ({"protocol": "fat"}, "unknown .*'fat'.*valid: lean, published"),
        (
            {"weights": "nowhere"},
            "weights must be auto, hub, random or a checkpoint folder, got 'nowhere'",
        ),
        ({"model": "base,base"}, "model must be one or more different models"),
        ({"model": "base,BASE"}, "model must be one or more different models"),
        ({"configuration": "swift"}, "unknown execution 'swift'.*valid: eager, fast"),
        ({"configuration": "eager/lean/auto/more"}, "report, best or EXECUTION/PROTOCOL/KERNEL"),
        ({"configuration": "best", "execution": "fast"}, "not both"),
        ({"execution": "fast", "protocol": "published"}, "keeps no KV cache; use protocol lean"),
        ({"kernel": "fp8"}, "runs in execution fast only"),
        ({"batch_sizes": "8,8"}, "different whole numbers of 1 or more"),
    ],
)
def test_bad_options(path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(path, **options)  # type: ignore[arg-type]
    assert not path.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be able to")
def test_a_kernel_that_this_machine_cannot_run_says_which_can(path: Path) -> None:
    says = "kernel fp8 needs a CUDA GPU of compute capability 8.9 or newer; valid here: auto"
    with pytest.raises(MissingRequirement, match=says):
        run(path, "base", "1", configuration="best,fast/lean/fp8")


def test_a_disk_that_fills_up_ends_the_sweep_in_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(line: str) -> None:
        if "batch 1: " in line:
            monkeypatch.setattr(os, "fsync", full)

    message = r"cannot write .*: No space left on device; finished rows are on file"
    with pytest.raises(MissingRequirement, match=message):
        run(path, progress=fill)
    monkeypatch.undo()
    (kept,) = read_cells(path)
    assert not path.with_suffix(".result.json").exists()
    assert run(path)[0] == kept


def test_a_refusal_of_the_system_is_not_blamed_on_the_file(path: Path) -> None:
    def progress(line: str) -> None:
        if "batch 1: " in line:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    message = r"^the sweep ended: \[Errno 32\] Broken pipe; finished rows are on file"
    with pytest.raises(MissingRequirement, match=message):
        run(path, batches="1", progress=progress)
    assert len(read_cells(path)) == 1


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("other processes took 23% of the CPU", False),
        ("2 other processes on the GPU", False),
        ("the clock was held down by temperature, by hardware", False),
        ("the clock was held down by the power limit", True),
        ("a display is attached to the GPU", True),
    ],
)
def test_a_cell_with_interference_says_so_and_is_measured_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, line: str, kept: bool
) -> None:
    monkeypatch.setattr(module, "interference", lambda before: ([line], None))
    lines: list[str] = []
    first = run(path, batches="1", progress=lines.append)
    assert first[0].interference == [line]
    assert any(line in one for one in lines)
    monkeypatch.setattr(module, "interference", lambda before: ([], None))
    second = run(path, batches="1")
    assert (second == first) == kept
    assert read_cells(path) == second == run(path, batches="1")


def test_progress_is_plain(path: Path) -> None:
    lines: list[str] = []
    run(path, "base,awq", "8", progress=lines.append, kernel="torch")
    loaded, cells = lines[:4], lines[5:7]
    assert loaded[::2] == ["loading base eager/auto", "loading awq eager/torch"]
    assert loaded[3].startswith("awq eager/torch: random tiny (seed 0); bfloat16; text linears on ")
    assert lines[4] == "measuring batch 8"
    pattern = r"base eager/lean/auto batch 8: [\d,]+\.\d queries/s, peak [\d,]+ MiB "
    assert re.fullmatch(pattern + r"\(2 steps, step limit\)", cells[0])
    assert re.fullmatch(r"took \d+\.\d s, of which \d\.\d s in timed steps", lines[7])
    run(path, "base", "8", progress=lines.append)
    assert lines[8].startswith("on file: base eager/lean/auto batch 8: ")


def test_the_quantisation_of_every_checkpoint_is_on_record(
    path: Path, packed: Any, base_folder: Path
) -> None:
    w4 = Quantization(bits=4, group_size=128, sym=True)
    folders = f"{packed('auto_round')},{base_folder},W8A16"
    cells = run(path, folders, "1", weights="auto", kernel="torch")
    cells += run(path, "awq,base", "1", kernel="torch")
    w8 = Quantization(bits=8, group_size=128, sym=True)
    assert [cell.quantization for cell in cells] == [w4, None, w8, w4, None]


def test_interrupted_it_says_how_to_resume(path: Path) -> None:
    def stop(line: str) -> None:
        if "awq eager/lean/torch batch 1: " in line and "on file" not in line:
            raise KeyboardInterrupt

    said = "stopped; 2 of 6 cells on file, run again to resume"
    with pytest.raises(Interrupted, match=said) as error:
        run(path, "base,awq", progress=stop, kernel="torch")
    assert error.value._render_traceback_() == [said]
    assert len(read_cells(path)) == 2
    assert not path.with_suffix(".result.json").exists()
    assert len(run(path, "base,awq", kernel="torch")) == 6
    said = "stopped; 2 of 6 cells on file, run again without fresh to resume"
    with pytest.raises(Interrupted, match=said):
        run(path, "base,awq", progress=stop, kernel="torch", fresh=True)


def test_interrupted_before_it_measures_it_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "checkpoints_of", stop)
    with pytest.raises(Interrupted, match=r"^stopped before the first cell$"):
        run(path)
    assert not path.parent.exists()


def test_a_row_and_its_count_are_not_torn_apart_by_a_signal(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RecordsFile.append

    def interrupted(self: Any, rows: Any) -> None:
        append(self, rows)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RecordsFile, "append", interrupted)
    with pytest.raises(Interrupted, match="stopped; 1 of 3 cells on file"):
        run(path)
    assert len(read_cells(path)) == 1
    assert [file.name for file in path.parent.iterdir()] == ["sweep.jsonl"]


def test_a_notebook_shows_one_line_for_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    shell.user_ns["stopped"] = Interrupted("stopped; 4 of 12 cells on file, run again to resume")
    shell.run_cell("raise stopped")
    assert capsys.readouterr().out.strip() == str(shell.user_ns["stopped"])


# ---------------------------------------------------------------- a matrix


def test_a_matrix_goes_into_one_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, mark = module.Run.measure, path.with_suffix(".result.json")
    marked: list[bool] = []

    def no_fast(self: Any, planned: list[Cell]) -> Any:
        marked.append(mark.exists())
        if planned[0].execution == "fast":
            raise MissingRequirement("no kernel here")
        return measure(self, planned)

    monkeypatch.setattr(module.Run, "measure", no_fast)
    message = "1 of 2 sweeps failed, .*: tiny queries fast/lean/auto: no kernel here"
    with pytest.raises(MissingRequirement, match=message):
        run(path, batches="1,2", execution="fast,eager")
    assert [(c.execution, c.batch_size) for c in read_cells(path)] == [("eager", 1), ("eager", 2)]
    assert not mark.exists()
    monkeypatch.setattr(module.Run, "measure", measure)
    cells = run(path, batches="1,2", execution="fast,eager")
    assert sorted(map(Cell.key, cells)) == sorted(map(Cell.key, read_cells(path)))
    assert [cell.execution for cell in cells] == ["fast", "fast", "eager", "eager"]
    assert json.loads(mark.read_text())["cells"] == 4
    monkeypatch.setattr(module.Run, "measure", no_fast)
    with pytest.raises(MissingRequirement, match="1 of 2 sweeps failed"):
        run(path, batches="1", execution="fast,eager", fresh=True)
    assert marked[-2:] == [False, False]
    assert not mark.exists()


def test_the_default_file_names_models_sizes_and_workloads() -> None:
    options = options_of("", "base,W8A16", workload="queries,pages", size="tiny,mid")
    path = module.path_of(options, "sweep", ["tiny", "tiny", "mid"])
    assert path.name == "sweep-base-W8A16-tiny-mid-queries-pages.jsonl"
    assert module.path_of(options_of("", size="tiny,tiny"), "sweep", ["tiny", "tiny"]).name == (
        "sweep-base-tiny-queries.jsonl"
    )


# ---------------------------------------------------------------- the stack


def test_ten_frames_from_the_notebook_to_the_forward(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processes counted, for timing and memory passes; lab.sweep itself is two frames."""
    really, parent = worker.Remote.call, {}

    def call(self: worker.Remote, name: str, *arguments: Any) -> Any:
        frames = ["sweep", "sweep", *own_frames(), "call"]  # this stub stands for `call`
        parent[name] = max(parent.get(name, []), frames, key=len)
        return really(self, name, *arguments)

    monkeypatch.setattr(worker.Remote, "call", call)
    file = path.parent.parent / "frames"
    monkeypatch.setattr(module, "query_batches", partial(recording_batches, str(file)))
    cells = run(path, "base,awq", "1", isolated=True, kernel="torch", control=True)
    assert [cell.status for cell in cells] == ["ok", "ok"]
    child = {frames[1]: frames for frames in map(str.split, file.read_text().splitlines())}
    assert set(child) == {"measure", "step"}
    for name, frames in child.items():
        assert len(parent[name] + frames) <= 10, parent[name] + frames
