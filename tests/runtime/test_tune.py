"""Choices by timing, with a CPU's kernel that claims several kernel configs, and fake times."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colqwen_lab.model.checkpoint import FolderCheckpoint
from colqwen_lab.runtime import tune
from colqwen_lab.runtime.fast import load_fast
from colqwen_lab.runtime.gemms import ALL_PATHS, KINDS, Paths
from colqwen_lab.runtime.linears import Unnormed

TIMES = {"own": 3.0, "fast": 2.0, "wrong": 1.0, "no launch": 0.5, "small M": 1.5}


@pytest.fixture
def fast(packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`fast` of tiny awq; results of config "wrong" are wrong, "no launch" fails."""
    checkpoint = FolderCheckpoint(packed("auto_round"))
    model: Any = load_fast(checkpoint, torch.device("cpu"), "int4").model.fast
    kernel = type(model.layers[0].o)
    multiply = kernel.forward

    def forward(self: Any, x: Any, config: str = "own") -> Tensor:
        if config == "no launch":
            raise RuntimeError("invalid configuration")
        assert isinstance(x, Tensor) or config == "small M"
        return multiply(self, x.weighted if isinstance(x, Unnormed) else x) * (
            1.1 if config == "wrong" else 1
        )

    def add_normed(self: Any, x: Any, residual: Tensor, *values: Any) -> tuple[Tensor, Unnormed]:
        total = residual + self(x)
        return total, Unnormed(total, total, 0.0)

    def dequantise(self: Any, weight: Tensor) -> None:
        weight.copy_(multiply(self, torch.eye(self.in_features, dtype=weight.dtype)).T)

    for name, value in {
        "tunable": True,
        "forward": forward,
        "add_normed": add_normed,
        "dequantise": dequantise,
        "kernel_configs": lambda self, m: [*TIMES],
        "small_m": lambda self, config: config if config == "small M" else None,
    }.items():
        monkeypatch.setattr(kernel, name, value)
    monkeypatch.setattr(tune, "version", lambda package: "1")
    monkeypatch.setattr(tune, "_path", lambda: tmp_path / "kernel-configs.json")
    return model


def fake_medians(works: dict[Any, Callable[[], Any]], rounds: int = 5) -> dict[Any, float]:
    for work in works.values():
        work()
    return {name: TIMES.get(name, 2.0 - 0.1 * len(name)) for name in works}


@pytest.mark.parametrize(
    ("paths", "best"),
    [(ALL_PATHS, "small M"), (Paths(small_m=False), "fast"), (Paths(split_norms=False), "small M")],
)
@torch.no_grad()
def test_the_fastest_right_config_is_chosen_and_cached(
    fast: Any, paths: Paths, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "medians_ms", fake_medians)
    fast.paths = paths
    fast.tune(18)
    assert fast.configs_at(18) == dict.fromkeys(KINDS, best)
    assert fast.chosen == {f"{kind} x 18": best for kind in KINDS}
    again = tune.candidates(fast.layers[0], [18, 36], paths)
    assert {kind: again[kind, 18] for kind in KINDS} == {kind: [best] for kind in KINDS}
    assert len(again["o", 36]) > 1
    other = tune.candidates(fast.layers[0], [18], Paths(search=False))
    assert other["o", 18] == ["own", "small M"]  # the cache knows the paths of a choice


@torch.no_grad()
def test_kinds_to_dequantise_are_chosen_and_cached(
    fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        def wait_stream(self, other: Any) -> None: ...
        def wait_event(self, event: Any) -> None: ...
        def record_event(self) -> str:
            return "event"

    memory_fraction = [1.0]
    for name, value in {
        "current_stream": lambda: Stream(),
        "current_device": lambda: 0,
        "stream": lambda stream: nullcontext(),
        "get_per_process_memory_fraction": lambda: memory_fraction[0],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("colqwen_lab.runtime.gemms.side_stream", lambda *values, **_: Stream())
    monkeypatch.setattr(tune, "capture_stream", nullcontext)
    monkeypatch.setattr(tune, "medians_ms", fake_medians)
    for linear in fast.linears():
        linear.dequantises = True
    fast.tune(tune.MIN_PREFETCH_M - 1)
    assert not fast.prefetched
    fast.tune(tune.MIN_PREFETCH_M)
    assert fast.prefetched == {512: KINDS}
    assert fast.chosen["dequantise-then-GEMM x 512"] == "qkv+o+gate_up+down"
    monkeypatch.setattr(tune, "_fastest_prefetch", None)  # the cache answers
    fast.prefetched.clear()
    fast.tune(512)
    assert fast.prefetched == {512: KINDS}
    memory_fraction[0] = 0.5
    fast.prefetched.clear()
    fast.tune(512)
    assert fast.prefetched == {512: ()}
    assert fast.chosen["dequantise-then-GEMM x 512"] == "none"
