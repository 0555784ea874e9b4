"""Interference with a measurement, against a fake driver."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch

from colqwen_lab.measure import environment
from colqwen_lab.measure.environment import (
    interference,
    others_share,
    own_bytes,
    pick_device,
    spilled,
    watch,
)
from colqwen_lab.records import GIB, Environment, Memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class FakeNvml:
    """A GPU with these processes and displays; None is what its driver does not tell."""

    def __init__(self, compute: Any = (), graphics: Any = (), display: int | None = 0) -> None:
        self.told = {"Compute": compute, "Graphics": graphics, "Display": display}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def tell(what: str) -> Any:
            if self.told[what] is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return self.told[what]

        def processes(what: str) -> list[Any]:
            return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in tell(what)]

        monkeypatch.setattr(environment, "gpu_handle", lambda device: "handle")
        monkeypatch.setattr(
            pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: processes("Compute")
        )
        monkeypatch.setattr(
            pynvml, "nvmlDeviceGetGraphicsRunningProcesses", lambda _: processes("Graphics")
        )
        monkeypatch.setattr(pynvml, "nvmlDeviceGetDisplayActive", lambda _: tell("Display"))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetDisplayMode", lambda _: 1)  # as an H100 says


@pytest.mark.parametrize(
    ("nvml", "lines"),
    [
        (FakeNvml([(os.getpid(), 5), (os.getppid(), 5)]), []),
        (FakeNvml([(os.getpid(), 5), (1, 7)], [(2, 7), (1, 7)]), ["2 other processes on the GPU"]),
        (FakeNvml([(999_999, 5)]), []),  # a container: our own, under another number
        (FakeNvml([(999_999, 5), (999_998, 5)]), ["1 other process on the GPU"]),
        (FakeNvml(None, [(os.getpid(), 5)], display=1), ["a display is attached to the GPU"]),
        (FakeNvml(None, None, None), []),
    ],
)
def test_interference_on_the_gpu(
    nvml: FakeNvml, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.install(monkeypatch)
    own = [os.getppid()] if len(nvml.told["Compute"] or ()) == 2 and not lines else []
    assert interference(watch(CUDA, own))[0] == lines


def test_interference_of_a_clock_that_was_held_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpu_handle", lambda device: None)
    states: Any = {}
    monkeypatch.setattr(environment, "gpu_state", lambda device, *_: states.get("now", {}))

    def lines(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        states["now"] = before
        start = watch(CUDA, [])
        states["now"] = after
        found, recorded = interference(start)
        assert recorded == {"before": before, "after": after}
        return found

    assert lines({"throttle_reasons": "0x1"}, {"sm_clock_mhz": 1980}) == []
    assert lines({"throttle_reasons": "0x1"}, {"throttle_reasons": hex(0x4 | 0x40)}) == [
        "the clock was held down by the power limit",
        "the clock was held down by temperature, by hardware",
    ]


def test_interference_of_another_busy_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's own processes do not count."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    own = [psutil.Process(), psutil.Process(other.pid)]
    try:
        theirs = watch(CPU, [])
        time.sleep(0.8)
        lines, states = interference(theirs)
        assert re.match(r"other processes took \d+% of the CPU", lines[0])
        assert states is None
        others_share(own)
        time.sleep(0.8)
        own_percent = sum(process.cpu_percent() for process in own)
        own[0].cpu_percent = own[1].cpu_percent = lambda: own_percent / 2  # type: ignore[method-assign]
        monkeypatch.setattr(environment.psutil, "cpu_percent", lambda: 100.0)
        monkeypatch.setattr(environment.psutil, "cpu_count", lambda: 2)
        assert own_percent > 5
        assert others_share(own) == pytest.approx(1 - own_percent / 200)
        del own[0].cpu_percent, own[1].cpu_percent
    finally:
        other.kill()
        other.wait()
    assert others_share(own) == 0, "a process that ended"


def test_memory_of_the_host_and_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Memory(peak_bytes=7 * GIB, reserved_bytes=9 * GIB, method="cuda")
    small, large = Environment(gpu_memory_bytes=8 * GIB), Environment(gpu_memory_bytes=10 * GIB)
    assert spilled(held, small) == ["9.0 GiB held on a GPU of 8.0 GiB: the host's memory is used"]
    assert spilled(held, large) == spilled(None, small) == spilled(held, Environment()) == []
    FakeNvml([(1, 3), (os.getpid(), 5)]).install(monkeypatch)
    assert own_bytes(CUDA) == 5
    FakeNvml([(1, 3)]).install(monkeypatch)
    assert own_bytes(CUDA) is None
    monkeypatch.undo()
    assert own_bytes(CPU) is None


def test_a_gpu_is_named_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to cap `cuda` without a number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert pick_device() == torch.device("cuda:0")
