"""A share of the fault injection suite; `python -m tests.faults` runs all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.exhaustive
def test_nothing_measured_is_lost(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "tests.faults", "--quick", "-o", str(record)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(record.read_text())
    assert (result["lost"], result["unclear"]) == (0, 0)
    assert result["faults"]["kills"]["kills of a whole group"] >= 1
    assert result["faults"]["headers"]["refused"] > 10
    assert result["faults"]["torn_writes"]["reported"] > 10
    assert result["faults"]["out_of_memory"]["oom_cells"] >= 1


def test_the_committed_record_is_of_a_whole_run_that_lost_nothing() -> None:
    record = json.loads((ROOT / "outputs" / "faults" / "record.json").read_text())
    assert (record["lost"], record["unclear"], record["quick"]) == (0, 0, False)
    kills = record["faults"]["kills"]
    assert kills["kills of a whole group"] >= 50
    assert kills["orphans"] == 0
    assert record["faults"]["headers"]["executed"] is False
