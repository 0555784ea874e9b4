"""Matrices of sweeps: one after the other, over a cluster that is played, and over three real nodes, one killed."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from colqwen_lab.errors import BadInput, LabError, MissingRequirement
from colqwen_lab.measure import cluster
from colqwen_lab.measure.cluster import (
    Fleet,
    Job,
    accelerators_of,
    in_turn,
    into_one_file,
    matrix,
    on_ray,
)
from colqwen_lab.measure.timing import StoppingRule
from colqwen_lab.records import Cell, Store, read_cells
from tests.three_nodes import kill_the_measuring_node, three_nodes, untimed

QUICK = StoppingRule(min_steps=2, max_steps=2, min_s=0, max_s=0, max_warmup=1)
OPTIONS: dict[str, Any] = {"size": "tiny", "weights": "random", "patience": lambda workload: QUICK}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def keys(cells: list[Cell]) -> list[tuple[str, ...]]:
    return [cell.key() for cell in cells]


# ---------------------------------------------------------------- a matrix, here


def test_matrix_is_the_product() -> None:
    requests = matrix(
        "base,awq", "1,2", **OPTIONS | {"size": "tiny, mid", "execution": "eager,fast"}
    )
    found = [(one.size, one.ways[0].execution) for one in requests]
    assert found == [("tiny", "eager"), ("tiny", "fast"), ("mid", "eager"), ("mid", "fast")]
    assert {one.output.name for one in into_one_file(requests, "fleet")} == {
        "fleet-base-awq-tiny-mid-queries.jsonl"
    }
    assert len(matrix("base", "1", size="tiny,tiny")) == 1


def test_what_pages_have_goes_to_pages() -> None:
    queries, pages = matrix(
        "base", "1", **OPTIONS | {"workload": "queries,pages", "visual_tokens": 256}
    )
    assert (pages.visual_tokens, queries.workload) == (256, "queries")
    with pytest.raises(BadInput, match="of workload pages"):
        matrix("base", "1", visual_tokens=256)


@pytest.mark.parametrize(
    "wrong", [{"size": "tiny,5b"}, {"workload": "queries,nope"}, {"execution": "eager,"}]
)
def test_one_wrong_value_refuses_the_matrix(wrong: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="valid: "):
        matrix("base", "1", **OPTIONS | wrong)


def test_in_turn_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    requests = matrix("base", "1,2", **OPTIONS | {"execution": "eager,fast", "output": path})
    really = fleet.sweep

    def no_fast(asked: Any, *more: Any, **options: Any) -> list[Cell]:
        if asked.ways[0].execution == "fast":
            raise MissingRequirement("no kernel here")
        return really(asked, *more, **options)

    requests.reverse()
    monkeypatch.setattr(fleet, "sweep", no_fast)
    with pytest.raises(
        MissingRequirement, match=r"1 of 2 sweeps .*tiny queries fast/lean/auto: no kernel here"
    ):
        in_turn(requests, print)
    assert [(c.execution, c.batch_size) for c in read_cells(path)] == [("eager", 1), ("eager", 2)]
    monkeypatch.setattr(fleet, "sweep", really)
    cells = in_turn(requests, print)
    assert Counter(keys(cells)) == Counter(keys(read_cells(path)))
    assert [cell.execution for cell in cells] == ["fast", "fast", "eager", "eager"]
    assert json.loads(path.with_suffix(".result.json").read_text())["cells"] == 4


def test_the_mark_stands_only_where_all_sweeps_ended(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a later one runs, and where one did not end after a run that did."""
    mark = path.with_suffix(".result.json")
    requests = matrix("base", "1", **OPTIONS | {"execution": "eager,fast", "output": path})
    really, there = fleet.sweep, []

    def watched(*asked: Any, **options: Any) -> list[Cell]:
        there.append(mark.exists())
        return really(*asked, **options)

    def lost(*asked: Any, **options: Any) -> list[Cell]:
        raise MissingRequirement("no weights here")

    monkeypatch.setattr(fleet, "sweep", watched)
    in_turn(requests, print)
    assert (there, mark.exists()) == ([False, False], True)
    monkeypatch.setattr(fleet, "sweep", lost)
    with pytest.raises(MissingRequirement, match="2 of 2 sweeps did not end"):
        in_turn(requests, print)
    assert not mark.exists()
    mark.write_text("{}")
    with pytest.raises(MissingRequirement, match="no weights here"):
        PlayedRay().run(path, jobs_of(path, ""))
    assert not mark.exists()


# ---------------------------------------------------------------- a cluster that is played


@pytest.mark.parametrize(
    ("there", "asked", "found"),
    [
        ([], [], [""]),
        (["A100"], [], ["A100"]),
        (["A100", "L4"], ["L4", "L4"], ["L4"]),
        (["A100", "L4"], ["L4", "A100"], ["L4", "A100"]),
        (["A100", "L4"], [], "several accelerators; name those to measure on: A100, L4"),
        (["A100"], ["H100"], "no accelerator 'H100'; valid: A100"),
        ([], ["H100"], "valid: none"),
    ],
)
def test_accelerators(there: list[str], asked: list[str], found: Any) -> None:
    resources = {"CPU": 4.0, "GPU": 2.0} | {f"accelerator_type:{name}": 1.0 for name in there}
    if isinstance(found, list):
        assert accelerators_of(resources, asked) == found
    else:
        with pytest.raises(BadInput, match=found):
            accelerators_of(resources, asked)


class NodeDied(Exception):
    pass


class TaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class PlayedRay:
    """What a Fleet calls of Ray; a task runs where it is waited for, and `dies` may end it at a row."""

    exceptions = SimpleNamespace(RayError=NodeDied, RayTaskError=TaskError)

    def __init__(self, dies: Callable[[int, Cell], bool] = lambda task, cell: False) -> None:
        self.dies, self.options, self.known, self.rows = dies, [], [], SimpleQueue()
        self.arrivals = SimpleNamespace(
            qsize=self.rows.qsize,
            get_nowait_batch=lambda count: [self.rows.get() for _ in range(count)],
        )
        self.cluster_resources = dict

    def remote(self, **options: Any) -> Callable[..., Any]:
        return lambda function: SimpleNamespace(
            remote=lambda *args: self.started(options, function, *args)
        )

    def started(
        self, options: Any, function: Any, asked: Any, known: Any, code: str, job: str, rows: Any
    ) -> Any:
        self.options.append(options)
        self.known.append(known)
        return partial(self._outcome, len(self.options), function, (asked, known, code, job))

    def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.ended = tasks[0]()
        return tasks[:1], tasks[1:]

    def _outcome(self, number: int, function: Any, arguments: Any) -> Any:
        def put(one: Any) -> None:
            if isinstance(one, Cell) and self.dies(number, one):
                raise KeyboardInterrupt  # passes every handler of a cell
            self.rows.put(one)

        try:
            return function(*arguments, SimpleNamespace(put=put))
        except KeyboardInterrupt:
            return NodeDied()
        except LabError as error:
            return TaskError(error)

    def get(self, task: Any) -> Any:
        if isinstance(self.ended, Exception):
            raise self.ended
        return self.ended

    def run(
        self, path: Path, jobs: list[Job], lines: list[str] | None = None, **options: Any
    ) -> list[Cell]:
        progress = (lines if lines is not None else []).append
        with Store(path, lambda cell: True) as store:
            return Fleet(self, jobs, store, progress, self.arrivals, gpus=1, **options).run()


def jobs_of(path: Path, *accelerators: str, **options: Any) -> list[Job]:
    asked = matrix("base", "1,2,4", **OPTIONS | options | {"output": path})
    return [Job(one, accelerator) for accelerator in accelerators for one in asked]


def test_a_dead_node_costs_no_finished_cell(path: Path) -> None:
    ray = PlayedRay(dies=lambda task, cell: task == 1 and cell.batch_size == 4)
    lines: list[str] = []
    cells = ray.run(path, jobs_of(path, "A100"), lines)
    assert [[c.batch_size for c in known] for known in ray.known] == [[], [1, 2]]
    assert [c.batch_size for c in cells] == [1, 2, 4]
    assert cells == read_cells(path)
    assert [options["accelerator_type"] for options in ray.options] == ["A100"] * 2
    assert all((options["num_gpus"], options["max_retries"]) == (1, 0) for options in ray.options)
    assert sum("it goes on elsewhere" in line for line in lines) == 1
    assert not any(str(Path.home()) in line or os.uname().nodename in line for line in lines)


def test_a_job_whose_nodes_all_die_leaves_the_others(path: Path) -> None:
    ray = PlayedRay(dies=lambda task, cell: cell.execution == "fast")
    with pytest.raises(
        MissingRequirement,
        match=r"1 of 2 sweeps .*given up after 4 tries, the last ended by NodeDied",
    ):
        ray.run(path, jobs_of(path, "", execution="fast,eager"))
    assert [(c.execution, c.batch_size) for c in read_cells(path)] == [
        ("eager", 1),
        ("eager", 2),
        ("eager", 4),
    ]


def test_a_type_whose_only_node_stays_away_is_given_up_after_a_while(path: Path) -> None:
    class Ray(PlayedRay):
        """An A100 that is gone before its task starts; its tasks wait."""

        cancelled: Any = None

        def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
            ready = [
                task for task in tasks if self.options[task.args[0] - 1]["accelerator_type"] == "L4"
            ]
            return super().wait(ready, timeout) if ready else ([], tasks)

        def cancel(self, task: Any, force: bool) -> None:
            self.cancelled = self.options[task.args[0] - 1]["accelerator_type"]

    ray, lines = Ray(), []
    ray.cluster_resources = lambda: {"CPU": 4.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
    said = "1 of 2 sweeps .* A100 .*: no node with accelerator_type:A100 for 0.1 s; start one, .*the same command goes on"
    with pytest.raises(MissingRequirement, match=said) as error:
        ray.run(path, jobs_of(path, "A100", "L4"), lines, wait_s=0.1)
    assert "\n" not in str(error.value)
    assert ray.cancelled == "A100"
    assert [c.batch_size for c in read_cells(path)] == [1, 2, 4]


def test_resume_keeps_the_rows_of_every_machine(path: Path) -> None:
    first = PlayedRay().run(path, jobs_of(path, ""))
    other = [
        c.model_copy(update={"environment": c.environment.model_copy(update={"gpu": "L4"})})
        for c in first
    ]
    path.write_text("".join(cell.to_line() for cell in [*other, *first]))
    again = PlayedRay(dies=lambda task, cell: True).run(path, jobs_of(path, ""))
    assert again == first
    assert read_cells(path) == [*other, *first]


def test_fresh_takes_the_place_of_this_machine_s_rows_also_after_a_death(path: Path) -> None:
    first = PlayedRay().run(path, jobs_of(path, ""))
    ray = PlayedRay(dies=lambda task, cell: task == 1 and cell.batch_size == 2)
    again = ray.run(path, jobs_of(path, "", fresh=True))
    assert [[c.batch_size for c in known] for known in ray.known] == [[], [1]]
    assert read_cells(path) == again
    assert read_cells(path.with_suffix(".superseded.jsonl")) == first


def test_another_version_on_the_nodes_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = iter(["here", "there"])
    monkeypatch.setattr(fleet, "code_version", lambda: next(versions))
    with pytest.raises(MissingRequirement, match="another version of colqwen-lab"):
        PlayedRay().run(path, jobs_of(path, ""))


def test_a_disk_that_fills_up_ends_the_fleet_in_one_line_and_loses_no_row_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first = PlayedRay().run(path, jobs_of(path, ""))
    ray, wait = PlayedRay(), PlayedRay.wait

    def then_full(self: PlayedRay, tasks: list[Any], timeout: float) -> Any:
        done = wait(self, tasks, timeout)
        monkeypatch.setattr(os, "fsync", full)
        return done

    monkeypatch.setattr(PlayedRay, "wait", then_full)
    with pytest.raises(
        MissingRequirement,
        match=r"cannot write .*: No space left on device; .*the same command goes on from there",
    ):
        ray.run(path, jobs_of(path, "", fresh=True))
    assert read_cells(path) == first


def test_rows_that_arrive_together_are_written_in_one_go(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PlayedRay().run(path, jobs_of(path, ""))
    added: list[int] = []
    really = Store.add
    monkeypatch.setattr(
        Store, "add", lambda store, cells: added.append(len(cells)) or really(store, cells)
    )
    monkeypatch.setattr(
        fleet, "_measure", lambda *asked: [asked[-1].put(one) or one for one in first]
    )
    PlayedRay().run(path, jobs_of(path, "", fresh=True))
    assert added == [3]
    assert read_cells(path) == first


def test_a_fleet_waits_for_a_file_that_another_sweep_holds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = PlayedRay()
    held, said = Store(path, lambda cell: True), []

    def say(line: str) -> None:
        said.append(line)
        held.__exit__()

    monkeypatch.setattr(fleet, "_cluster", lambda address: nullcontext(ray))
    monkeypatch.setattr(fleet, "_queue", lambda ray: ray.arrivals)
    cells = on_ray("base", "1", progress=say, **OPTIONS | {"output": path})
    assert said[0] == f"another sweep writes to {path}; waiting for it, then going on from its rows"
    assert cells == read_cells(path)


def test_interrupted_it_takes_in_what_had_arrived(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = PlayedRay.wait

    def interrupt(self: PlayedRay, tasks: list[Any], timeout: float) -> Any:
        wait(self, tasks, timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(PlayedRay, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        PlayedRay().run(path, jobs_of(path, ""))
    assert [c.batch_size for c in read_cells(path)] == [1, 2, 4]


# ---------------------------------------------------------------- three nodes, one killed


def test_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "nowhere:x"):
        with pytest.raises(
            MissingRequirement, match=f"no Ray cluster at {address} .*ray start --head"
        ) as error:
            on_ray("base", "1", address=address, **OPTIONS)
        assert "\n" not in str(error.value)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingRequirement, match=r"pip install 'colqwen-lab\[ray\]'"):
        on_ray("base", "1", **OPTIONS)


def test_the_committed_run_lost_nothing() -> None:
    """The record of `python tests/three_nodes.py`."""
    folder = Path(__file__).parents[2] / "outputs" / "fleet"
    cells, alone = (
        read_cells(folder / name) for name in ("three-nodes.jsonl", "one-machine.jsonl")
    )
    record = json.loads((folder / "three-nodes.json").read_text())
    assert (record["exit_code"], record["went_on_elsewhere"], record["cells"]) == (0, 1, len(cells))
    assert len(set(keys(cells))) == len(cells)
    assert untimed(cells) == untimed(alone)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray")
    with three_nodes(resources={"accelerator_type:A100": 1}) as nodes:
        yield nodes


def test_a_node_killed_in_the_middle(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    really = Store.add

    def add(store: Store, cells: list[Cell]) -> None:
        really(store, cells)
        if len(store.cells) == 2:
            monkeypatch.setattr(Store, "add", really)
            assert kill_the_measuring_node(cluster)

    monkeypatch.setattr(Store, "add", add)
    slow = replace(
        QUICK, max_steps=10**6, min_s=2, max_s=2
    )  # so that the node is alive at the second row
    options = OPTIONS | {"output": tmp_path / "fleet.jsonl", "backend": "torch"}
    cells = on_ray(
        "base,awq", "1,2", progress=lines.append, **options | {"patience": lambda workload: slow}
    )
    here = {"output": tmp_path / "alone.jsonl", "isolated": False}
    alone = in_turn(matrix("base,awq", "1,2", **options | here), lambda line: None)
    assert sum("it goes on elsewhere" in line for line in lines) == 1
    assert sum("kept" in line for line in lines) == 2
    assert (
        Counter(keys(read_cells(tmp_path / "fleet.jsonl")))
        == Counter(keys(alone))
        == Counter(keys(cells))
    )
    assert len(set(keys(cells))) == len(cells) == 4
    assert untimed(cells) == untimed(alone)
    with pytest.raises(BadInput, match="no accelerator 'L4'; valid: A100"):
        on_ray("base", "1", accelerators="L4", **OPTIONS)
    address = os.environ["RAY_ADDRESS"].split(":")[0]
    assert not any(address in line for line in [*lines, capfd.readouterr().out])
