"""Kernel configs chosen by timing: a CPU's kernel that claims several, and fake times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colqwen_lab.model.checkpoint import FolderCheckpoint
from colqwen_lab.runtime import tune
from colqwen_lab.runtime.fast import KINDS, load_fast
from colqwen_lab.runtime.linears import Int4Cpu
from colqwen_lab.runtime.tune import Paths

SMALL = '{"small_m": {}}'
TIMES = {"own": 3.0, "fast": 2.0, SMALL: 1.5, "wrong": 1.0, "no launch": 0.5, "no compile": 0.1}


@pytest.fixture
def fast(packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`fast` of tiny awq; config "wrong" gives wrong results, "no launch" raises."""
    multiply, last = Int4Cpu.forward, [""]

    def forward(self: Any, x: Tensor) -> Tensor:
        last[0] = config = self.configs.get(len(x), "own")
        if config == "no launch":
            raise RuntimeError("invalid configuration")
        return multiply(self, x) * (1.1 if config == "wrong" else 1)

    def captured(work: Callable[[], Any], pool: Any) -> tuple[float, None]:
        work()
        return TIMES[last[0]], None

    for name, value in {
        "tunable": True,
        "forward": forward,
        "kernel_configs": lambda self, m: [*TIMES],
        "compiles": lambda self, config: config != "no compile",
    }.items():
        monkeypatch.setattr(Int4Cpu, name, value)
    monkeypatch.setattr(tune, "captured", captured)
    monkeypatch.setattr(tune, "replay_ms", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("COLQWEN_LAB_CACHE", str(tmp_path))
    checkpoint = FolderCheckpoint(packed("auto_round"))
    return load_fast(checkpoint, torch.device("cpu"), "int4").model.fast


@pytest.mark.parametrize(
    ("paths", "best"),
    [
        (Paths(), SMALL),
        (Paths(small_m=False), "fast"),
        (Paths(search=False), SMALL),
        (Paths(small_m=False, search=False), "own"),
    ],
)
@torch.no_grad()
def test_the_fastest_right_config_is_chosen_and_cached(
    fast: Any, paths: Paths, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast.paths = paths
    fast.tune(18)
    assert fast.chosen == {f"{kind} x 18": best for kind in KINDS}
    kernel = "small-M GEMM (W4A16)" if best == SMALL else Int4Cpu.kernel
    assert fast.engaged(18) == {kernel: 28}
    assert fast.engaged(36) == fast.engaged() == {Int4Cpu.kernel: 28}
    linear = fast.layers[0].o
    assert tune.candidates(linear, 18, paths) == [best]
    assert tune.candidates(linear, 36, Paths()) == [*TIMES]
    linear.configs.clear()
    monkeypatch.setattr(tune, "captured", None)  # the cache answers
    fast.tune(18)
    assert linear.configs == {18: best}


def test_a_choice_that_is_no_longer_a_candidate_is_timed_again(fast: Any) -> None:
    linear = fast.layers[0].o
    tune._choice_file(linear, 18, Paths()).write_text("of an older release")
    assert tune.candidates(linear, 18, Paths()) == [*TIMES]


def test_the_kernels_own_config_must_run(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int4Cpu, "kernel_configs", lambda self, m: ["no launch", "own"])
    with pytest.raises(RuntimeError, match="invalid configuration"):
        fast.tune(18)


def test_configs_of_every_m_compile_at_once(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[Any, str]] = []
    monkeypatch.setattr(Int4Cpu, "kernel_configs", lambda self, m: ["own", f"config of {m}"])
    monkeypatch.setattr(
        Int4Cpu, "compiles", lambda self, config: compiled.append((self, config)) or True
    )
    fast.compile([18, 36, 18])
    linears = {getattr(fast.layers[0], kind) for kind in KINDS}
    configs = ("own", "config of 18", "config of 36")
    assert len(compiled) == len({*compiled}) == 12
    assert {*compiled} == {(linear, config) for linear in linears for config in configs}
