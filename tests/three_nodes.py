"""A Ray cluster of three nodes on this machine, of which one is killed during a sweep.

`python tests/three_nodes.py` sweeps base and awq at size tiny on it, kills the node that measures,
sweeps again without Ray, and writes both records files and a summary to `outputs/fleet/`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from colqwen_lab.records import Cell, read_cells

NODES, KILL_AT = 3, 3
# Two runs of one cell on one machine may differ in these.
TIMING = ("step_s", "control_s", "items_per_s", "limits", "gpu_state", "interference")
MOMENT = ("started_at", "commit", "threads")
SWEEP = ["sweep", "-m", "base", "-m", "awq", "--size", "tiny", "-b", "8,16,32"]


@contextmanager
def three_nodes(**of_node: Any) -> Iterator[Any]:
    """A cluster of a head without a CPU and two nodes with one; its address is in RAY_ADDRESS."""
    folder = tempfile.mkdtemp(prefix="ray-")  # a short path: it holds sockets
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder}
    import ray
    from ray.cluster_utils import Cluster

    lean = {"object_store_memory": 80 * 2**20, "include_log_monitor": False}
    earlier = {child.pid for child in psutil.Process().children(recursive=True)}
    cluster = Cluster(
        True, head_node_args=lean | {"num_cpus": 0, "include_dashboard": False, "no_monitor": True}
    )
    try:
        for _ in range(NODES - 1):
            cluster.add_node(num_cpus=1, **lean, **of_node)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        ray.shutdown()
        started = [
            child for child in psutil.Process().children(recursive=True) if child.pid not in earlier
        ]
        cluster.shutdown()
        for child in started:  # workers that outlived their node
            if child.is_running():
                child.kill()
        shutil.rmtree(folder, ignore_errors=True)


def kill_the_measuring_node(cluster: Any) -> bool:
    """Kill the node whose actor measures, with all its processes; false if none does."""
    for node in list(cluster.worker_nodes):
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        workers = raylet.children(recursive=True)
        if any("ray::Measurement" in " ".join(worker.cmdline()) for worker in workers):
            cluster.remove_node(node, allow_graceful=False)
            for worker in workers:  # as on a machine that lost its power
                if worker.is_running():
                    worker.kill()
            return True
    return False


def untimed(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """The cells without what differs from run to run, in the order of their keys."""
    rows = []
    for cell in sorted(cells, key=Cell.key):
        row = cell.model_dump(exclude={*TIMING, "timing"})
        row["environment"] = {
            name: value for name, value in row["environment"].items() if name not in MOMENT
        }
        row["interleaved_with"] = cell.timing and cell.timing.interleaved_with
        row["timed"] = bool(cell.step_s)
        rows.append(row)
    return rows


def main(folder: Path) -> dict[str, Any]:
    """The summary of both runs, written beside their records in `folder`."""
    program = [sys.executable, "-c", "from colqwen_lab.cli import main; main()", *SWEEP, "--fresh"]
    cluster_file, alone = folder / "three-nodes.jsonl", folder / "one-machine.jsonl"
    for path in (cluster_file, alone):
        path.unlink(missing_ok=True)
    with three_nodes() as cluster:
        run = subprocess.Popen(
            [*program, "--on", "ray", "-o", str(cluster_file)], stderr=subprocess.PIPE, text=True
        )
        lines = []
        for line in run.stderr or ():
            print(line, end="", file=sys.stderr)
            lines.append(line)
            if sum("queries/s" in one for one in lines) == KILL_AT and "queries/s" in line:
                assert kill_the_measuring_node(cluster)
        run.wait()
    subprocess.run([*program, "-o", str(alone)], check=True)
    rows = read_cells(cluster_file)
    record = {
        "command": f"colqwen-lab {' '.join(SWEEP)} --on ray",
        "nodes": NODES,
        "killed": f"the measuring node, after row {KILL_AT}",
        "went_on_elsewhere": sum("restarting on another node" in line for line in lines),
        "exit_code": run.returncode,
        "cells": len(rows),
        "most_often": max(Counter(map(Cell.key, rows)).values()),
        "same_as_one_machine_apart_from_timing": untimed(rows) == untimed(read_cells(alone)),
    }
    (folder / "three-nodes.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    print(json.dumps(main(Path(__file__).parent.parent / "outputs" / "fleet"), indent=1))
