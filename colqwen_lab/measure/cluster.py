"""A matrix of sweeps, sizes x workloads x executions: one after the other on this machine, or over a Ray cluster.

A job is one size, workload and execution on one type of accelerator, with all its models: those are to be compared, so
they are timed in turn on one device. On a cluster each job is a Ray task. It measures as a sweep on that machine does,
into a file of its own there, and sends each row to the driver's file as soon as it has it. If its node dies the job
starts again elsewhere with the rows that arrived; those that the same machine type has are not measured again.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from colqwen_lab.errors import BadInput, LabError, MissingRequirement
from colqwen_lab.measure.environment import code_version
from colqwen_lab.measure.sweep import Request, mark, request, sweep, to_stderr, unmark
from colqwen_lab.measure.timing import StoppingRule
from colqwen_lab.records import GOES_ON, Cell, Store, listed
from colqwen_lab.settings import outputs_folder

#: How often a job is started before it is given up because its nodes died.
TRIES = 4
#: Seconds that a job waits for a node of its kind to be there.
WAIT_S = 600.0
TYPE = "accelerator_type:"  # how Ray names the resource of a type
Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Job:
    """One sweep of the matrix, on one type of accelerator; "" is any."""

    asked: Request
    accelerator: str = ""

    def __str__(self) -> str:
        ways = ", ".join(map(str, self.asked.ways))
        return " ".join(
            filter(None, (self.accelerator, self.asked.size, self.asked.workload, ways))
        )


def matrix(
    model: Any,
    batch_sizes: Any,
    *,
    size: str = "auto",
    workload: str = "queries",
    execution: str = "eager",
    patience: Callable[[str], StoppingRule] = lambda workload: StoppingRule(),
    **options: Any,
) -> list[Request]:
    """The requests of "tiny,4b" x "queries,pages" x "eager,fast"; `patience` is by workload, `options` as of `request`.

    Raises:
        BadInput: a wrong value.
    """
    axes = [list(dict.fromkeys(listed(axis))) for axis in (size, workload, execution)]
    # What one workload alone has is refused by the other, and where both are asked for not given to it.
    own = {"queries": ("texts",), "pages": ("pages", "visual_tokens")}

    def given(kind: str) -> dict[str, Any]:
        others = {
            name for other in own if other in axes[1] and other != kind for name in own[other]
        }
        return {name: value for name, value in options.items() if name not in others}

    return [
        request(
            model,
            batch_sizes,
            size=size,
            workload=kind,
            execution=how,
            patience=patience(kind),
            **given(kind),
        )
        for size, kind, how in product(*axes)
    ]


def into_one_file(requests: Sequence[Request], kind: str) -> list[Request]:
    """`requests` with the file that all write to: the one asked for, else one under `outputs/` that names the matrix.

    A fleet's has a name of its own, since a sweep on this machine moves other machines' rows out of its file.
    """
    axes = [[v.name.replace("/", "-") for v in requests[0].variants]]
    axes += [[one.size for one in requests], [one.workload for one in requests]]
    name = "-".join([kind, *("-".join(dict.fromkeys(axis)) for axis in axes)])
    return [
        replace(one, output=one.output or outputs_folder() / f"{name}.jsonl") for one in requests
    ]


def in_turn(requests: Sequence[Request], progress: Progress = to_stderr) -> list[Cell]:
    """The cells of all `requests`, one after the other on this machine. One that cannot run leaves the others.

    Raises:
        BadInput: a file that cannot be written.
        MissingRequirement: what a request needs is not here; the rows of the others are on file.
    """
    if len(requests) == 1:
        return sweep(requests[0], progress)
    jobs = [Job(asked) for asked in into_one_file(requests, "sweep")]
    unmark(_file_of(jobs))
    found: dict[Job, list[Cell]] = {}
    lost: dict[Job, LabError] = {}
    for job in jobs:
        try:
            found[job] = sweep(job.asked, progress, part=True)
        except LabError as error:
            lost[job] = error
    return _ended(jobs, found, lost)


def on_ray(
    model: Any,
    batch_sizes: Any,
    *,
    accelerators: str = "",
    address: str = "",
    progress: Progress = to_stderr,
    wait_s: float = WAIT_S,
    **options: Any,
) -> list[Cell]:
    """The cells of a matrix, measured over a Ray cluster, a task a job; those on file already are kept.

    Args:
        model: as of `request`.
        batch_sizes: as of `request`.
        accelerators: types to measure on, "A100,L4", each all of the matrix; by default the only one there is.
        address: of the cluster: auto, HOST:PORT or ray://HOST:PORT; by default RAY_ADDRESS, else auto.
        progress: takes each line of progress.
        wait_s: seconds after which a job is given up if no node of its type is there.
        **options: as of `matrix`.

    Raises:
        BadInput: a wrong value, or an accelerator that the cluster has not.
        MissingRequirement: no Ray, no cluster, or a job that could not end; the rows measured are on file.
    """
    matrix(model, batch_sizes, **options)  # a wrong value is refused before a cluster is asked
    with _cluster(address) as ray:
        resources = ray.cluster_resources()
        types = accelerators_of(resources, [name for name in listed(accelerators) if name])
        requests = matrix(
            model, batch_sizes, device="cuda" if resources.get("GPU") else "cpu", **options
        )
        jobs = [Job(asked, one) for one in types for asked in into_one_file(requests, "fleet")]
        with Store(
            _file_of(jobs), lambda cell: cell.environment.code == code_version(), say=progress
        ) as store:
            gpus = 1 if resources.get("GPU") else 0
            return Fleet(ray, jobs, store, progress, _queue(ray), gpus, wait_s).run()


def accelerators_of(resources: Mapping[str, float], asked: Sequence[str]) -> list[str]:
    """The types to measure on: those asked for, else the cluster's only one; [""] where it tells of none.

    Raises:
        BadInput: a type that the cluster has not, or several to choose from.
    """
    there = sorted(name.removeprefix(TYPE) for name in resources if name.startswith(TYPE))
    for one in asked:
        if one not in there:
            raise BadInput(
                f"the cluster has no accelerator {one!r}; valid: {', '.join(there) or 'none, it has none'}"
            )
    if not asked and len(there) > 1:
        raise BadInput(
            f"the cluster has several accelerators; name those to measure on: {', '.join(there)}"
        )
    return list(dict.fromkeys(asked)) or there or [""]


class Fleet:
    """The jobs of one run, their tasks on a cluster, and the driver's file that takes their rows."""

    def __init__(
        self,
        ray: Any,
        jobs: Sequence[Job],
        store: Store,
        progress: Progress,
        arrivals: Any,
        gpus: int = 0,
        wait_s: float = WAIT_S,
    ) -> None:
        self.ray, self.jobs, self.store, self.progress = ray, jobs, store, progress
        self.arrivals, self.gpus, self.wait_s = arrivals, gpus, wait_s
        self.absent: dict[str, float] = {}  # what no node has, and since when
        self.earlier = list(store.cells)
        self.tries = dict.fromkeys(jobs, 0)

    def run(self) -> list[Cell]:
        """The cells of all jobs, in the order of the jobs. A job that cannot end leaves the others.

        Raises:
            MissingRequirement: a job could not end, or the file cannot be written any more.
        """
        unmark(self.store.path)
        try:
            return self._run()
        finally:
            self._take_in()  # what had arrived before Ctrl-C

    def _run(self) -> list[Cell]:
        found: dict[Job, list[Cell]] = {}
        lost: dict[Job, LabError] = {}
        running = {self._start(job): job for job in self.jobs}
        while running:
            done, _ = self.ray.wait(list(running), timeout=0.5)
            self._take_in()
            for task in done:
                job = running.pop(task)
                try:
                    found[job] = self.ray.get(task)
                except self.ray.exceptions.RayTaskError as error:
                    why = error.cause
                    lost[job] = (
                        why
                        if isinstance(why, LabError)
                        else MissingRequirement(f"{type(why).__name__}: {why}")
                    )
                except self.ray.exceptions.RayError as error:
                    if self.tries[job] == TRIES:
                        lost[job] = MissingRequirement(
                            f"given up after {TRIES} tries, the last ended by {type(error).__name__}"
                        )
                    else:
                        self.progress(
                            f"{job}: lost its node ({type(error).__name__}); it goes on elsewhere"
                        )
                        running[self._start(job)] = job
            lost |= self._given_up(running)
        return _ended(self.jobs, found, lost)

    def _given_up(self, running: dict[Any, Job]) -> dict[Job, LabError]:
        """The jobs that no node has been there for; they are not `running` any more."""
        there, now = self.ray.cluster_resources(), time.monotonic()
        gone: dict[Job, LabError] = {}
        for task, job in list(running.items()):
            needed = TYPE + job.accelerator if job.accelerator else "GPU" if self.gpus else "CPU"
            if there.get(needed):
                self.absent.pop(needed, None)
            elif now - self.absent.setdefault(needed, now) >= self.wait_s:
                self.ray.cancel(task, force=True)
                gone[running.pop(task)] = MissingRequirement(
                    f"no node with {needed} for {self.wait_s:g} s; start one, {GOES_ON}"
                )
        return gone

    def _start(self, job: Job) -> Any:
        self.tries[job] += 1
        # With `fresh` only what this run has measured counts, also for the second try.
        known = [
            cell for cell in self.store.cells if not (job.asked.fresh and cell in self.earlier)
        ]
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": self.gpus, "max_retries": 0}
        if job.accelerator:
            options["accelerator_type"] = job.accelerator
        task = self.ray.remote(max_calls=1, **options)(
            _measure
        )  # a process a task: its GPU is free after
        asked = replace(job.asked, output=None, fresh=False)
        return task.remote(asked, known, code_version(), str(job), self.arrivals)

    def _take_in(self) -> None:
        """Rows to the file, each in place of an earlier one of the same cell on the same machine; lines to progress."""
        arrived = self.arrivals.get_nowait_batch(self.arrivals.qsize())
        rows = [one for one in arrived if isinstance(one, Cell)]
        new = [(row.key(), row.environment.identity()) for row in rows]
        old = [
            cell for cell in self.store.cells if (cell.key(), cell.environment.identity()) in new
        ]
        if rows:
            self.store.add(rows)
        if old:
            self.store.set_aside(lambda cell: any(cell is one for one in old))
        for line in (one for one in arrived if not isinstance(one, Cell)):
            self.progress(line)


def _measure(asked: Request, known: list[Cell], code: str, job: str, arrivals: Any) -> list[Cell]:
    """The task: the cells of `asked` on this node, those among `known` that this machine has included."""
    if code != code_version():
        raise MissingRequirement(
            "the cluster's nodes have another version of colqwen-lab; install this one on them"
        )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(cell.to_line() for cell in known), encoding="utf-8")
        return sweep(
            replace(asked, output=path), lambda line: arrivals.put(f"{job}: {line}"), arrivals.put
        )


def _queue(ray: Any) -> Any:
    """What tasks hand rows and lines to. It lives beside the driver, so what is in it outlives the task's node."""
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


def _ended(
    jobs: Sequence[Job], found: Mapping[Job, list[Cell]], lost: Mapping[Job, LabError]
) -> list[Cell]:
    """The cells of all jobs, and the mark beside their file; raises if a job did not end."""
    if lost and len(jobs) == 1:
        raise lost[jobs[0]]
    if lost:
        said = "; ".join(f"{job}: {error}" for job, error in lost.items())
        raise MissingRequirement(
            f"{len(lost)} of {len(jobs)} sweeps did not end, the rows of the others are on file: {said}"
        )
    cells = [cell for job in jobs for cell in found[job]]
    mark(_file_of(jobs), cells, {})
    return cells


def _file_of(jobs: Sequence[Job]) -> Path:
    path = jobs[0].asked.output
    assert path is not None
    return path


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`; a connection that was there before stays.

    Raises:
        MissingRequirement: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise MissingRequirement("ray is not installed; pip install 'colqwen-lab[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        if ":" in address:  # Ray itself would try for minutes
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        # Ray's own lines carry the nodes' addresses, and go to stdout; progress comes through the queue.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ImportError, OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"no Ray cluster at {address} ({error!s:.200})"
        raise MissingRequirement(
            f"{where}; start one with `ray start --head`, or name another"
        ) from None
    try:
        with redirect_stdout(StringIO()):
            yield ray
    finally:
        ray.shutdown()
