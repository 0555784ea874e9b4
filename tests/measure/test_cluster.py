"""Sweeps over a cluster that is played, and over three real nodes of which one is killed."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colqwen_lab.errors import BadInput, LabError, MissingRequirement
from colqwen_lab.measure import cluster as module
from colqwen_lab.measure.cluster import Driver, Job, accelerators_of, sweep_on_ray
from colqwen_lab.measure.sweep_file import Interrupted, opened
from colqwen_lab.records import Cell, RecordsFile, read_cells
from tests.measure import sweeps
from tests.measure.sweeps import QUICK, options_of
from tests.three_nodes import kill_the_measuring_node, three_nodes, untimed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def keys(cells: list[Cell]) -> list[tuple[str, ...]]:
    return [cell.key() for cell in cells]


def rows_of(path: Path) -> list[Cell]:
    return [Cell.model_validate_json(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- a cluster that is played


@pytest.mark.parametrize(
    ("types", "wanted", "expected"),
    [
        ([], [], [""]),
        (["A100"], [], ["A100"]),
        (["A100", "L4"], ["L4", "L4"], ["L4"]),
        (["A100", "L4"], ["L4", "A100"], ["L4", "A100"]),
        (["A100", "L4"], [], "several accelerators; name some: A100, L4"),
        (["A100"], ["H100"], "no accelerator 'H100'; valid: A100"),
        ([], ["H100"], "valid: none"),
    ],
)
def test_accelerators(types: list[str], wanted: list[str], expected: Any) -> None:
    resources = {"CPU": 4.0, "GPU": 2.0} | {f"accelerator_type:{name}": 1.0 for name in types}
    if isinstance(expected, list):
        assert accelerators_of(resources, wanted) == expected
    else:
        with pytest.raises(BadInput, match=expected):
            accelerators_of(resources, wanted)


class NodeDied(Exception):
    """Ray's errors."""


class TaskError(NodeDied):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class PlayedRay:
    """What a Driver calls of Ray. An actor runs item by item; `dies` may end it before a row."""

    exceptions = SimpleNamespace(RayError=NodeDied, RayTaskError=TaskError)

    def __init__(self, dies: Callable[[int, Cell], bool] = lambda actor, cell: False) -> None:
        self.dies, self.options, self.known, self.killed = dies, [], [], []

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": 1.0}

    def remote(self, **options: Any) -> Callable[..., Any]:
        return lambda kind: SimpleNamespace(remote=lambda *args: self.actor(options, kind(*args)))

    def actor(self, options: Any, measurement: Any) -> Any:
        self.options.append(options)
        number, known = len(self.options), measurement.items.gi_frame.f_locals["known"]
        self.known.append(known)
        return SimpleNamespace(next=SimpleNamespace(remote=lambda: (number, measurement)))

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        number, measurement = reference
        try:
            item = measurement.next()
        except LabError as error:
            raise TaskError(error) from None
        if isinstance(item, Cell) and self.dies(number, item):
            raise NodeDied
        return item

    def kill(self, actor: Any) -> None:
        number, measurement = actor.next.remote()
        measurement.items.close()
        self.killed.append(number)

    def run(
        self, path: Path, jobs: list[Job], lines: list[str] | None = None, **options: Any
    ) -> list[Cell]:
        progress = (lines if lines is not None else []).append
        with opened(path, jobs[0].options, progress, 0.0) as file:
            return Driver(self, jobs, file, QUICK, **options).run()


def jobs_of(path: Path, *accelerators: str, **options: Any) -> list[Job]:
    matrix = options_of(path, "base", "1,2,4", **options).matrix()
    return [Job(part, accelerator) for accelerator in accelerators for part in matrix]


def sizes(rows: list[Cell]) -> list[int]:
    return [row.batch_size for row in rows]


def test_a_dead_node_costs_no_finished_cell(path: Path) -> None:
    ray = PlayedRay(dies=lambda task, cell: task == 1 and cell.batch_size == 4)
    lines: list[str] = []
    cells = ray.run(path, jobs_of(path, "A100"), lines)
    assert [sizes(known) for known in ray.known] == [[], [1, 2]]
    assert sizes(cells) == [1, 2, 4]
    assert cells == rows_of(path)
    assert ray.options == [{"num_cpus": 1, "num_gpus": 1, "accelerator_type": "A100"}] * 2
    assert ray.killed == [1, 2]
    assert sum("node lost (NodeDied); restarting on another node" in line for line in lines) == 1
    assert sum("on file: " in line for line in lines) == 2
    assert not any(str(Path.home()) in line or os.uname().nodename in line for line in lines)


def test_a_job_whose_nodes_all_die_leaves_the_others(path: Path) -> None:
    ray = PlayedRay(dies=lambda task, cell: cell.execution == "fast")
    message = r"1 of 2 sweeps .*given up at try 4: NodeDied"
    with pytest.raises(MissingRequirement, match=message):
        ray.run(path, jobs_of(path, "", execution="fast,eager"))
    assert [(c.execution, c.batch_size) for c in read_cells(path)] == [
        ("eager", 1),
        ("eager", 2),
        ("eager", 4),
    ]


def test_a_job_that_cannot_run_removes_the_mark(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = path.with_suffix(".result.json")
    PlayedRay().run(path, jobs_of(path, ""))
    result = json.loads(mark.read_text())
    assert (result["complete"], result["cells"], result["ok"]) == (True, 3, 3)
    assert result["wall_s"] >= result["timed_s"] >= 0

    def no_weights(*arguments: Any) -> Any:
        raise MissingRequirement("no weights here")

    monkeypatch.setattr(module.sweep, "Run", no_weights)
    with pytest.raises(MissingRequirement, match="no weights here"):
        PlayedRay().run(path, jobs_of(path, ""))
    assert not mark.exists()


def test_a_type_whose_only_node_stays_away_is_given_up_after_a_while(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ray(PlayedRay):
        """An A100 that is gone before its actor starts; its items wait."""

        def type_of(self, number: int) -> str:
            return self.options[number - 1]["accelerator_type"]

        def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
            ready = [one for one in references if self.type_of(one[0]) == "L4"]
            return super().wait(ready, timeout)

        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 4.0, "GPU": 1.0, "accelerator_type:L4": 1.0}

    monkeypatch.setattr(module, "WAIT_S", 0.1)
    ray, lines = Ray(), []
    message = (
        "1 of 2 sweeps .* A100 .*: no node with accelerator_type:A100 for 0.1 s; start one; "
        ".*run the same command again to resume"
    )
    with pytest.raises(MissingRequirement, match=message) as error:
        ray.run(path, jobs_of(path, "A100", "L4"), lines)
    assert "\n" not in str(error.value)
    assert sorted(map(ray.type_of, ray.killed)) == ["A100", "L4"]
    assert sizes(read_cells(path)) == [1, 2, 4]


def test_resume_keeps_the_rows_of_every_machine(path: Path) -> None:
    first = PlayedRay().run(path, jobs_of(path, ""))
    other = [
        c.model_copy(update={"environment": c.environment.model_copy(update={"gpu": "L4"})})
        for c in first
    ]
    path.write_text("".join(cell.to_line() for cell in [*other, *first]))
    again = PlayedRay(dies=lambda task, cell: True).run(path, jobs_of(path, ""))
    assert again == first
    assert rows_of(path) == [*other, *first]


def test_fresh_measures_again_and_restarts_with_new_rows_only(path: Path) -> None:
    first = PlayedRay().run(path, jobs_of(path, ""))
    ray = PlayedRay(dies=lambda task, cell: task == 1 and cell.batch_size == 2)
    again = ray.run(path, jobs_of(path, "", fresh=True))
    assert [sizes(known) for known in ray.known] == [[], [1]]
    assert read_cells(path) == again
    assert rows_of(path) == [*first, *again]


def test_another_version_on_the_nodes_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = iter(["here", "there"])
    monkeypatch.setattr(module, "code_version", lambda: next(versions))
    with pytest.raises(MissingRequirement, match="another version of colqwen-lab"):
        PlayedRay().run(path, jobs_of(path, ""))


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_keeps_earlier_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first = PlayedRay().run(path, jobs_of(path, ""))
    monkeypatch.setattr(os, "fsync", full)
    message = r"cannot write .*: No space left on device; .*run the same command again to resume"
    ray = PlayedRay()
    with pytest.raises(MissingRequirement, match=message):
        ray.run(path, jobs_of(path, "", fresh=True, size="tiny,mid"))
    assert read_cells(path) == first
    assert ray.killed == [1, 2], "no actor stays"


def test_a_run_waits_for_a_file_that_another_holds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, lines = RecordsFile(path, Cell), []

    def progress(line: str) -> None:
        lines.append(line)
        held.__exit__()

    monkeypatch.setattr(module, "_cluster", lambda address: nullcontext(PlayedRay()))
    cells = sweep_on_ray(options_of(path, on="ray"), progress, stopping=QUICK)
    assert lines[0] == f"another run writes to {path}; waiting for it"
    assert cells == read_cells(path)


def test_interrupted_it_takes_what_has_arrived(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def wait(self: PlayedRay, streams: list[Any], timeout: float) -> Any:
        waits.append(timeout)
        if len(waits) == 2:
            raise KeyboardInterrupt
        return streams[:1], streams[1:]

    monkeypatch.setattr(PlayedRay, "wait", wait)
    ray = PlayedRay()
    with pytest.raises(Interrupted, match="stopped; 3 new cells on file, run again to resume"):
        ray.run(path, jobs_of(path, ""))
    assert sizes(read_cells(path)) == [1, 2, 4]
    assert ray.killed == [1], "no actor stays"


def test_interrupted_while_an_item_is_taken_no_actor_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PlayedRay, "get", stop)
    ray = PlayedRay()
    with pytest.raises(KeyboardInterrupt):
        ray.run(path, jobs_of(path, "", execution="fast,eager"))
    assert ray.killed == [1, 2]


# ---------------------------------------------------------------- three nodes, one killed


def test_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "nowhere:x"):
        with pytest.raises(
            MissingRequirement, match=f"no Ray cluster at {address} .*ray start --head"
        ) as error:
            sweep_on_ray(options_of("", on="ray", address=address))
        assert "\n" not in str(error.value)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingRequirement, match=r"pip install 'colqwen-lab\[ray\]'"):
        sweep_on_ray(options_of("", on="ray"))


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
def nodes() -> Iterator[Any]:
    pytest.importorskip("ray")
    with three_nodes(resources={"accelerator_type:A100": 1}) as cluster:
        yield cluster


@pytest.mark.exhaustive
def test_a_node_killed_in_the_middle(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    really = RecordsFile.append

    def append(file: RecordsFile[Cell], cells: list[Cell]) -> None:
        really(file, cells)
        if len(file.rows) == 2:
            monkeypatch.setattr(RecordsFile, "append", really)
            assert kill_the_measuring_node(nodes)

    monkeypatch.setattr(RecordsFile, "append", append)
    # So slow that the node is alive at the second row.
    slow = replace(QUICK, max_steps=10**6, min_s=2, max_s=2)
    path, kernel = tmp_path / "cluster.jsonl", {"kernel": "torch"}
    options = options_of(path, "base,awq", "1,2", on="ray", **kernel)
    cells = sweep_on_ray(options, lines.append, stopping=slow)
    alone = sweeps.run(tmp_path / "alone.jsonl", "base,awq", "1,2", stopping=slow, **kernel)
    assert sum("restarting on another node" in line for line in lines) == 1
    assert sum("on file: " in line for line in lines) == 2
    assert Counter(keys(read_cells(path))) == Counter(keys(alone)) == Counter(keys(cells))
    assert len(set(keys(cells))) == len(cells) == 4
    assert untimed(cells) == untimed(alone)
    with pytest.raises(BadInput, match="no accelerator 'L4'; valid: A100"):
        sweep_on_ray(options_of("", on="ray", accelerator="L4"))
    address = os.environ["RAY_ADDRESS"].split(":")[0]
    assert not any(address in line for line in [*lines, capfd.readouterr().out])
