"""A sweep over a Ray cluster: each size, workload and execution is one job on each type of GPU.

A job's actor measures as a sweep on its machine does, all models interleaved on one device, and
the driver takes its rows one by one. If its node dies, another actor resumes from these rows.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from colqwen_lab import signals
from colqwen_lab.errors import BadInput, LabError, MissingRequirement
from colqwen_lab.measure import sweep
from colqwen_lab.measure.environment import code_version
from colqwen_lab.measure.sweep_file import (
    Progress,
    SweepFile,
    line_of,
    opened,
    path_of,
    stopped,
    title,
    to_stderr,
)
from colqwen_lab.measure.timing import StoppingRule
from colqwen_lab.measure.worker import failure_of
from colqwen_lab.options import SweepOptions, listed
from colqwen_lab.records import RESUME, Cell

TRIES = 4  # starts of a job whose nodes die
WAIT_S = 600.0  # wait for a node of the job's type
TYPE = "accelerator_type:"  # Ray's resource name of a GPU type


def sweep_on_ray(
    options: SweepOptions, progress: Progress = to_stderr, *, stopping: StoppingRule | None = None
) -> list[Cell]:
    """The cells of `options`, measured over a Ray cluster; rows on file are kept.

    A job whose nodes die four times, or that finds no node of its type for ten minutes, is given
    up; the others go on.

    Raises BadInput for an accelerator that the cluster does not have, MissingRequirement if there
    is no Ray, no cluster, or a job failed; measured rows are on file.
    """
    path = path_of(options, "cluster", options.size.split(","))
    with _cluster(options.address) as ray:
        types = accelerators_of(ray.cluster_resources(), listed(options.accelerator))
        jobs = [Job(part, name) for name in types for part in dict.fromkeys(options.matrix())]
        with opened(path, options, progress, time.perf_counter()) as file:
            return Driver(ray, jobs, file, stopping).run()


def accelerators_of(resources: Mapping[str, float], wanted: Sequence[str]) -> list[str]:
    """The types to measure on: `wanted`, else the cluster's only one; [""] if it names none.

    Raises BadInput for a type that the cluster does not have, or several to choose from.
    """
    types = sorted(name.removeprefix(TYPE) for name in resources if name.startswith(TYPE))
    for name in wanted:
        if name not in types:
            valid = ", ".join(types) or "none, this cluster names none"
            raise BadInput(f"the cluster has no accelerator {name!r}; valid: {valid}")
    if not wanted and len(types) > 1:
        raise BadInput(f"the cluster has several accelerators; name some: {', '.join(types)}")
    return list(dict.fromkeys(wanted)) or types or [""]


class Measurement:
    """An actor: the sweep of one job on its node, as `items`."""

    def __init__(self, *arguments: Any) -> None:
        self.items = items(*arguments)

    def next(self) -> Cell | str | list[Cell]:
        """The next item."""
        return next(self.items)


def items(
    options: SweepOptions, known: list[Cell], code: str, stopping: StoppingRule | None
) -> Iterator[Cell | str | list[Cell]]:
    """Each row and line of progress of a sweep, and last the list of all wanted cells."""
    if code != code_version():
        raise MissingRequirement(
            "the nodes have another version of colqwen-lab; install this one on them"
        )
    lines: list[str] = []
    run, new = sweep.Run(options, lines.append, stopping), []
    try:
        kept = run.kept(known)
        lines += [line_of(cell, "on file: ") for cell in kept]
        for planned in run.batches(kept):
            yield from lines
            lines.clear()
            for cell in run.measure(planned):
                new.append(cell)
                yield cell
        yield from lines
        yield run.on_file([*known, *new])
    finally:
        run.end()


@dataclass(eq=False)
class Job:
    """One sweep of the matrix on one type of accelerator ("" is any), and what arrived of it."""

    options: SweepOptions
    accelerator: str = ""
    tries: int = 0
    rows: list[Cell] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    actor: Any = None
    seen: float = 0.0  # when the cluster last had a node of this type

    def __str__(self) -> str:
        return f"{self.accelerator} {title(self.options)}".strip()


@dataclass
class Driver:
    """The jobs of one run, their actors on a cluster, and the file that takes their rows."""

    ray: Any
    jobs: Sequence[Job]
    file: SweepFile
    stopping: StoppingRule | None = None
    running: dict[Any, Job] = field(default_factory=dict)  # by the item that is waited for
    errors: dict[str, LabError] = field(default_factory=dict)

    def run(self) -> list[Cell]:
        """The cells of all jobs, in their order. A job that fails leaves the others."""
        self.known, self.gpus = self.file.kept(), int("GPU" in self.ray.cluster_resources())
        try:
            for job in self.jobs:
                self._start(job)
            while self.running:
                self._take(0.5)
                self._give_up()
        except KeyboardInterrupt:
            while self._take(0):
                pass
            raise stopped(f"{len(self.file.new)} new", self.file.options) from None
        finally:
            with signals.deferred():
                for job in self.jobs:
                    self._end(job)
        cells = [cell for job in self.jobs for cell in job.cells]
        return self.file.finish(cells, self.errors, len(self.jobs))

    def _start(self, job: Job) -> None:
        job.tries, job.seen = job.tries + 1, time.monotonic()
        where = {"accelerator_type": job.accelerator} if job.accelerator else {}
        actor = self.ray.remote(num_cpus=1, num_gpus=self.gpus, **where)(Measurement)
        known = [*self.known, *(row for row in job.rows if row.status != "failed")]
        with signals.deferred():
            job.actor = actor.remote(job.options, known, code_version(), self.stopping)
        self.running[job.actor.next.remote()] = job

    def _end(self, job: Job) -> None:
        """End the actor of a job, which frees its GPU."""
        actor, job.actor = job.actor, None
        if actor is not None:
            self.ray.kill(actor)

    def _take(self, timeout: float) -> bool:
        """Take what arrives within `timeout` seconds: rows to the file, lines to progress."""
        ready, _ = self.ray.wait(list(self.running), timeout=timeout)
        for reference in ready:
            job = self.running.pop(reference)
            try:
                item = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                self._fail(job, error)
                continue
            if isinstance(item, list):
                job.cells = item
                self._end(job)
                continue
            if isinstance(item, Cell):
                self.file.add(item)
                job.rows.append(item)
                item = line_of(item)
            self.file.progress(f"{job}: {item}")
            self.running[job.actor.next.remote()] = job
        return bool(ready)

    def _fail(self, job: Job, error: Any) -> None:
        """Restart a job whose node died, up to four tries; another error ends it."""
        self._end(job)
        while isinstance(error, self.ray.exceptions.RayTaskError):
            error = error.cause
        if isinstance(error, self.ray.exceptions.RayError) and job.tries < TRIES:
            lost = f"node lost ({type(error).__name__})"
            self.file.progress(f"{job}: {lost}; restarting on another node")
            self._start(job)
        elif isinstance(error, LabError):
            self.errors[str(job)] = error
        else:
            reason = f"given up at try {job.tries}: {failure_of(error).reason}"
            self.errors[str(job)] = MissingRequirement(reason)

    def _give_up(self) -> None:
        """End the jobs that have found no node of their type for too long."""
        resources, now = self.ray.cluster_resources(), time.monotonic()
        for reference, job in list(self.running.items()):
            needed = TYPE + job.accelerator if job.accelerator else "GPU" if self.gpus else "CPU"
            if resources.get(needed):
                job.seen = now
            elif now - job.seen >= WAIT_S:
                del self.running[reference]
                self._end(job)
                reason = f"no node with {needed} for {WAIT_S:g} s; start one; {RESUME}"
                self.errors[str(job)] = MissingRequirement(reason)


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`; an earlier connection is used and stays."""
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
        # Ray's own lines name the nodes' addresses, and go to stdout.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ImportError, OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise MissingRequirement(
            f"no Ray cluster at {address} ({error!s:.200}); start one with `ray start --head`, "
            "or name another"
        ) from None
    try:
        with redirect_stdout(StringIO()):
            yield ray
    finally:
        ray.shutdown()
