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
from colqwen_lab.runtime.gemms import ALL_PATHS, Paths

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ablation.py"


def test_paths_in_use_are_timed_one_by_one(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    assert spec
    assert spec.loader
    ablation: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablation)
    fast: Any = load_fast(
        FolderCheckpoint(packed("auto_round")), torch.device("cpu"), "int4"
    ).model.fast
    kernel = type(fast.layers[0].o)
    monkeypatch.setattr(kernel, "tunable", True)
    monkeypatch.setattr(kernel, "dequantises", True)
    for linear in fast.linears():
        linear.dequantises = True
    monkeypatch.setattr(
        kernel, "kernel_configs", lambda self, m: ["own", "faster", *["small M"] * (m < 41)]
    )
    monkeypatch.setattr(kernel, "small_m", lambda self, config: config == "small M")
    monkeypatch.setattr(tune, "_read", dict)
    monkeypatch.setattr(tune, "_key", lambda *values: "")
    seen: list[Paths] = []

    def fastest(make: Any, layers: Any, m: int, wanted: Any, paths: Paths) -> dict[str, str]:
        seen.append(paths)
        return {kind: configs[-1] for kind, configs in wanted.items()}

    monkeypatch.setattr(tune, "kernel_configs", fastest)
    monkeypatch.setattr(tune, "prefetched_kinds", lambda *values: ("o",))
    state: list[Any] = []

    def replays(works: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
        monkeypatch.setattr(type(fast), "embed", lambda self, ids, mask: state.append(self.paths))
        for work in works.values():
            work()
        return {name: [1.0 if "everything on" in name[1] else 1.1] * rounds for name in works}

    monkeypatch.setattr(ablation, "replays_ms", replays)
    rows: dict[int, dict[str, Any]] = {}
    records: list[Any] = []
    for batch in (1, 4, 32):
        state.clear()
        new = list(ablation.measured({"awq": fast}, batch))
        records += new
        rows[batch] = {row["path"]: row for row in new}
        assert state[:2] == [ALL_PATHS] * 2
    off = ["small-M GEMM", "split RMSNorm", "dequantise-then-GEMM", "kernel-config search"]
    used = {batch: [path for path in off if path in rows[batch]] for batch in rows}
    assert used == {1: off[:2], 4: off[3:], 32: off[2:]}
    assert rows[1]["split RMSNorm"]["gain_percent"] == 10
    assert rows[1]["control: everything on"]["gain_percent"] == 0
    assert rows[1]["everything on"]["kernels"] == {"small-M GEMM (W4A16)": 28}
    assert Paths(small_m=False) in seen
    assert Paths(search=False, small_m=False) in seen
    assert "+10.0" in ablation.tables(records)
