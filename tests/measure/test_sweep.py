"""Sweeps of the tiny network: rows on disk as they come, out of memory and kills included."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.measure import sweep as module
from colqwen_lab.measure import worker
from colqwen_lab.measure.environment import environment
from colqwen_lab.measure.sweep import failure_of, request, sweep
from colqwen_lab.measure.timing import StoppingRule
from colqwen_lab.records import Cell, Store, batch_sizes_of, read_cells
from colqwen_lab.runtime import eager as execution

QUICK = StoppingRule(min_steps=2, max_steps=2, min_s=0, max_s=0, max_warmup=1)


def run(path: Path, model: str = "base", batches: Any = "1,2,4", **options: Any) -> list[Cell]:
    options = {"patience": QUICK, "weights": "random", "isolated": False, **options}
    return sweep(request(model, batches, output=path, **options), progress=lambda line: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "sweep.jsonl"


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
    cells = run(path, "base,awq", "1,4", backend="torch", patience=StoppingRule(max_s=0.3))
    assert [(c.variant, c.batch_size) for c in cells] == [
        ("base", 1),
        ("awq", 1),
        ("base", 4),
        ("awq", 4),
    ]
    base, awq = cells[2:]
    assert awq.backend.engaged == {"auto_round:torch_zp": 28}
    assert base.backend.engaged == {"torch.nn.Linear": 28}
    assert awq.backend.kept_16bit == {"vision tower": 24, "head": 1}
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
    assert [c.status for c in read_cells(path.with_suffix(".superseded.jsonl"))] == ["failed"]


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
            samples[next(iter(samples))].error = torch.OutOfMemoryError(
                "the other one took the room"
            )
        return samples

    monkeypatch.setattr(module, "time_interleaved", crowded)
    cells = {c.variant: c for c in run(path, "base,awq", "2")}
    assert (cells["base"].status, cells["awq"].status) == ("ok", "ok")
    assert cells["base"].timing.interleaved_with == cells["awq"].timing.interleaved_with == []
    assert on_file == [[], ["awq"]], "what had ended is on file before the other is tried again"


def test_peak_is_that_of_the_longest_batch(path: Path) -> None:
    (cell,) = run(path, batches="4", texts="natural")
    tokens = cell.workload.tokens
    from colqwen_lab.model.config import VARIANTS
    from colqwen_lab.predict.predictor import HOST, Predictor

    longest = Predictor(VARIANTS["base"], "tiny").cell(4, target=HOST, tokens=tokens)
    assert cell.memory.peak_bytes == pytest.approx(longest.memory.peak_bytes, rel=0.01)


def test_backend_is_for_the_quantised_one(path: Path) -> None:
    cells = run(path, "base,awq", "1", backend="torch")
    cells += run(path, "base,awq", "1", backend="auto_round:torch_zp")
    assert cells[-1].backend.engaged == {"auto_round:torch_zp": 28}
    with pytest.raises(BadInput, match="valid for 16-bit weights: auto, torch"):
        run(path, "base", "1", backend="auto_round:torch_zp")


def test_fresh_measures_again_only_what_was_asked(path: Path) -> None:
    first = run(path, "base,awq", "1,2")
    again = run(path, "base", "1", fresh=True)
    rows = read_cells(path)
    assert len(rows) == 4
    assert {c.to_line() for c in first[1:]} | {again[0].to_line()} == {c.to_line() for c in rows}
    assert read_cells(path.with_suffix(".superseded.jsonl")) == first[:1]


def test_another_tool_s_json_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text('{"metadata": {}, "results": {}}')
    with pytest.raises(BadInput, match="another tool's JSON"):
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
    assert read_cells(path) == second
    assert all(c.environment == elsewhere for c in second)
    assert read_cells(path.with_suffix(".superseded.jsonl")) == first


def test_other_weights_supersede(path: Path, base_folder: Path) -> None:
    run(path)
    second = run(path, weights=str(base_folder))
    assert read_cells(path) == second
    assert second[0].weights.startswith("folder:checkpoint#")


def test_killed_in_its_middle_it_resumes(path: Path) -> None:
    batches = ",".join(map(str, range(1, 14)))
    asked = request(
        "base,awq", batches, weights="random", output=path, patience=QUICK, isolated=False
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["colqwen_lab.measure.sweep"])
    process = context.Process(target=sweep, args=(asked, str))
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
    counts = Counter((c.variant, c.batch_size) for c in read_cells(path))
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


@pytest.mark.parametrize(
    "value", ["0", "-1", "a", "", "8,8", "8,,16", "1.5", [], [0], 0, ["x"], ",", 8.5, None, [None]]
)
def test_bad_batch_sizes(value: Any) -> None:
    with pytest.raises(BadInput, match=r"valid: different whole numbers of 1 or more"):
        batch_sizes_of(value)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20, unique=True))
def test_batch_sizes_in_every_form(sizes: list[int]) -> None:
    assert (
        batch_sizes_of(sizes)
        == batch_sizes_of(", ".join(map(str, sizes)))
        == batch_sizes_of(str(sizes))
        == sizes
    )
    assert batch_sizes_of(sizes[0]) == sizes[:1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": "5b"}, "unknown size '5b'.*valid: auto, tiny, mid, 4b, 8b"),
        ({"workload": "pictures"}, "unknown workload 'pictures'.*valid: queries"),
        ({"execution": "slow"}, "unknown execution 'slow'.*valid: eager"),
        ({"protocol": "fat"}, "unknown protocol 'fat'.*valid: lean, published"),
        (
            {"weights": "nowhere"},
            "unknown weights 'nowhere'; valid: auto, hub, random, or a checkpoint folder",
        ),
        ({"model": "base,base"}, "models base, base; valid"),
        ({"model": ""}, "unknown model ''; valid: base, awq"),
    ],
)
def test_bad_request(options: dict[str, str], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        request(**{"model": "base", "batch_sizes": "1", **options})


def test_folder_that_cannot_be_written() -> None:
    with pytest.raises(BadInput, match=r"cannot write .*name a file in a folder you can write"):
        run(Path("/proc/nowhere/sweep.jsonl"))


def test_a_records_file_of_something_else_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("my thesis\n")
    with pytest.raises(BadInput, match="line 1 is not a record"):
        run(path)
    assert path.read_text() == "my thesis\n"


def test_two_sweeps_into_one_file_come_one_after_the_other(path: Path) -> None:
    said: list[str] = []
    held = Store(path, keep=lambda cell: True)
    asked = request("base", "1", output=path, patience=QUICK, weights="random", isolated=False)
    with ThreadPoolExecutor() as pool:
        second = pool.submit(sweep, asked, said.append)
        while not said:
            time.sleep(0.01)
        assert said == [
            f"another sweep writes to {path}; waiting for it, then going on from its rows"
        ]
        assert not second.done()
        held.__exit__()
        assert second.result() == read_cells(path)


def test_ways_are_timed_in_turn_each_where_its_kernel_can_go(path: Path) -> None:
    cells = run(path, "base,awq", "2", ways="report,best,fast/lean/torch", control=True)
    ways = [(c.variant, c.execution, c.protocol, c.backend.requested) for c in cells]
    assert ways == [
        ("base", "eager", "published", "auto"),
        ("awq", "eager", "published", "torch"),
        ("base", "fast", "lean", "auto"),
        ("awq", "fast", "lean", "auto"),
        ("awq", "fast", "lean", "torch"),
    ]
    best = cells[3]
    assert best.backend.engaged == {"torch._weight_int4pack_mm_for_cpu": 28}
    assert len(best.timing.interleaved_configurations) == 4
    assert "base fast/lean/auto" in best.timing.interleaved_configurations
    assert [bool(c.control_s) for c in cells] == [True, False, True, False, False]
    assert len({len(c.step_s) for c in cells} | {len(cells[0].control_s)}) == 1
    assert run(path, "base,awq", "2", ways="best") == [cells[2], cells[3]]
    with pytest.raises(BadInput, match="backend 'fp8' multiplies 16-bit weights"):
        run(path, "awq", "2", ways="fast/lean/fp8")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ways": "swift"}, "unknown execution 'swift'.*valid: eager, fast"),
        ({"ways": "eager/lean/auto/more"}, "valid: report, best, or EXECUTION/PROTOCOL/BACKEND"),
        ({"ways": "best", "execution": "fast"}, "give these or ways, not both"),
        (
            {"execution": "fast", "protocol": "published"},
            "keeps a KV cache, which execution fast has not; valid: lean",
        ),
        ({"backend": "fp8"}, "runs in execution fast only"),
    ],
)
def test_bad_ways(path: Path, options: dict[str, str], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        run(path, "base", "1", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be able to")
def test_a_kernel_that_this_machine_cannot_run_says_which_can(path: Path) -> None:
    says = "kernel fp8 needs a CUDA GPU of compute capability 8.9 or newer; valid here: auto"
    with pytest.raises(MissingRequirement, match=says):
        run(path, "base", "1", ways="best,fast/lean/fp8")


def test_a_disk_that_fills_up_ends_the_sweep_in_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    asked = request("base", "1,2,4", output=path, patience=QUICK, weights="random", isolated=False)
    with pytest.raises(
        MissingRequirement,
        match=r"cannot write .*: No space left on device; what was measured is on file",
    ):
        sweep(asked, lambda line: None, lambda cell: monkeypatch.setattr(os, "fsync", full))
    monkeypatch.undo()
    (kept,) = read_cells(path)
    assert not path.with_suffix(".result.json").exists()
    assert run(path)[0] == kept


def test_what_else_the_system_refuses_is_not_laid_on_the_file(path: Path) -> None:
    def emit(cell: Cell) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    asked = request("base", "1", output=path, patience=QUICK, weights="random", isolated=False)
    with pytest.raises(
        MissingRequirement,
        match=r"^the sweep ended: \[Errno 32\] Broken pipe; what was measured is on file",
    ):
        sweep(asked, lambda line: None, emit)
    assert len(read_cells(path)) == 1


def test_what_was_noticed_stands_in_the_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from colqwen_lab import load

    monkeypatch.setattr(
        module.InterferenceMonitor,
        "interference",
        lambda self, states: ["the clock was held down by the <power> limit"],
    )
    cells = run(path, batches="1")
    assert cells[0].interference == ["the clock was held down by the <power> limit"]
    table = load(path).table()
    assert table["noticed"].tolist() == cells[0].interference
    assert "&lt;power&gt;" in load(path)._repr_html_()
