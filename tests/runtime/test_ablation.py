"""The ablation script on a CPU, with fake kernel configs and fake times."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from colqwen_lab.model.checkpoint import FolderCheckpoint
from colqwen_lab.runtime import tune
from colqwen_lab.runtime.fast import load_fast
from colqwen_lab.runtime.linears import Int4Cpu
from colqwen_lab.runtime.tune import Paths

SMALL = '{"small_m": {}}'
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ablation.py"


def test_paths_in_use_are_timed_one_by_one(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    assert spec
    assert spec.loader
    ablation: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablation)
    monkeypatch.setattr(Int4Cpu, "tunable", True)
    monkeypatch.setattr(
        Int4Cpu, "kernel_configs", lambda self, m: ["own", "faster", *[SMALL] * (m < 41)]
    )
    fast: Any = load_fast(
        FolderCheckpoint(packed("auto_round")), torch.device("cpu"), "int4"
    ).model.fast
    seen: list[Paths] = []

    def choose(linears: Any, x: Any, gemm: Any, paths: Paths) -> None:
        seen.append(paths)
        linears[0].configs[len(x)] = linears[0].kernel_configs(len(x))[-1]

    monkeypatch.setattr(tune, "choose", choose)
    state: list[Any] = []

    def replays(works: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
        monkeypatch.setattr(type(fast), "embed", lambda self, ids, mask: state.append(self.paths))
        for work in works.values():
            work()
        return {name: [1.0 if "everything on" in name[1] else 1.1] * rounds for name in works}

    monkeypatch.setattr(ablation, "replays_ms", replays)
    rows: dict[int, dict[str, Any]] = {}
    records: list[Any] = []
    for batch in (1, 4):
        state.clear()
        new = list(ablation.measured({"awq": fast}, batch))
        records += new
        rows[batch] = {row["path"]: row for row in new}
        assert state[:2] == [Paths()] * 2
    both, short = "search and small-M GEMM", "short attention (Triton)"
    off = {batch: [*rows[batch]][2:] for batch in rows}
    assert off == {1: ["small-M GEMM", both, short], 4: ["kernel-config search", both, short]}
    assert rows[1]["small-M GEMM"]["gain_percent"] == 10
    assert rows[1]["control: everything on"]["gain_percent"] == 0
    assert rows[1]["everything on"]["kernels"] == {"small-M GEMM (W4A16)": 28}
    assert Paths(small_m=False) in seen
    assert Paths(search=False, small_m=False) in seen
    assert "+10.0" in ablation.tables(records)
