"""What may disturb a measurement, as far as the system tells: noticed while it runs, and written in its row."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import psutil
import torch

from colqwen_lab.measure.environment import gpu_handle
from colqwen_lab.records import GIB, Memory

# The share of all cores' time taken by others from which on it is said.
BUSY_SHARE = 0.1
#: Why NVML says that a clock is below its highest (nvml.h, nvmlClocksThrottleReasons); that of an idle GPU is none.
THROTTLED = {
    0x2: "an application's setting",
    0x4: "the power limit",
    0x8: "a hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature, by software",
    0x40: "temperature, by hardware",
    0x80: "an external power brake",
    0x100: "the display's clock",
}


class InterferenceMonitor:
    """Looks at the system from its making to `notes`. `own` are the processes of the sweep."""

    def __init__(self, device: torch.device, own: Iterable[int | None]) -> None:
        self.device = device
        self.own = {os.getpid(), *(pid for pid in own if pid)}
        self.began, self.others_s = time.perf_counter(), self._others_s()

    def notes(self, states: dict[str, dict[str, Any]] | None) -> list[str]:
        """What holds for every cell of this while: `states` are the GPU's, before and after."""
        return [*self._busy_cpu(), *_throttled(states), *self._on_the_gpu()]

    def _others_s(self) -> float | None:
        """Seconds of CPU time that other processes have had since the system started."""
        times = psutil.cpu_times()._asdict()
        idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in the user's already
        try:
            own = [psutil.Process(pid).cpu_times() for pid in self.own]
        except psutil.Error:
            return None
        return sum(s for name, s in times.items() if name not in idle) - sum(
            one.user + one.system for one in own
        )

    def _busy_cpu(self) -> list[str]:
        now, elapsed_s = self._others_s(), time.perf_counter() - self.began
        if now is None or self.others_s is None:
            return []
        share = (now - self.others_s) / (elapsed_s * (psutil.cpu_count() or 1))
        # The system counts in hundredths of a second.
        return (
            [f"other processes took {share:.0%} of the CPU"]
            if elapsed_s > 0.2 and share > BUSY_SHARE
            else []
        )

    def _on_the_gpu(self) -> list[str]:
        handle = gpu_handle(self.device)
        if handle is None:
            return []
        import pynvml

        others = others_on(self.device, self.own)
        found = [f"{others} other process{'es' * (others > 1)} on the GPU"] if others else []
        with suppress(pynvml.NVMLError):
            if pynvml.nvmlDeviceGetDisplayActive(
                handle
            ):  # its mode says enabled on an H100 that has none
                found.append("a display is attached to the GPU")
        return found


def spilled(memory: Memory | None, gpu_memory_bytes: int | None) -> list[str]:
    """Whether torch holds more than the GPU has, which Windows serves from the host's memory, slowly."""
    held = memory and memory.reserved_bytes
    if not held or not gpu_memory_bytes or held <= gpu_memory_bytes:
        return []
    return [
        f"{held / GIB:.1f} GiB held on a GPU of {gpu_memory_bytes / GIB:.1f} GiB: the host's memory is used"
    ]


def others_on(device: torch.device, own: set[int]) -> int:
    """How many processes the driver counts on the GPU that are not `own`."""
    handle = gpu_handle(device)
    there = {process.pid for process in _processes(handle)} if handle else set()
    # A container's process ids are not the driver's: then only the number tells, and the parent of isolated models
    # holds no memory of the GPU.
    return len(there - own) if there & own else max(0, len(there) - max(1, len(own) - 1))


def own_bytes(device: torch.device) -> int | None:
    """Bytes of the GPU that the driver counts for this process; None where it does not tell, as in a container."""
    handle = gpu_handle(device)
    used = {process.pid: process.usedGpuMemory for process in _processes(handle)} if handle else {}
    return used.get(os.getpid())


def _processes(handle: Any) -> list[Any]:
    import pynvml

    found = []
    for read in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        with suppress(pynvml.NVMLError):
            found += read(handle)
    return found


def _throttled(states: dict[str, dict[str, Any]] | None) -> list[str]:
    reasons = 0
    for state in (states or {}).values():
        reasons |= int(state.get("throttle_reasons", "0"), 16)
    named = [name for bit, name in THROTTLED.items() if reasons & bit]
    return [f"the clock was held down by {', '.join(named)}"] if named else []
