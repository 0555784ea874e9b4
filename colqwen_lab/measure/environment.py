"""The machine and the versions that a record names, and what interferes with a measurement.

Host, user and folder names stay out of records.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import cpuinfo  # comes with auto-round
import psutil
import pynvml
import torch

from colqwen_lab.records import GIB, Environment, Memory
from colqwen_lab.settings import PACKAGE

# Folders whose code a measured figure depends on.
MEASURING = ("model", "runtime", "measure", "data")
# Other processes' share of all cores above which a cell says so.
BUSY_SHARE = 0.1
# Why a clock is below its highest (nvml.h, nvmlClocksThrottleReasons), apart from an idle GPU.
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


# ---------------------------------------------------------------- machine and versions


def pick_device() -> torch.device:
    """The CUDA GPU with its number, else the CPU; CUDA_VISIBLE_DEVICES chooses and hides GPUs."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@cache
def code_version() -> str:
    """Twelve hex digits of the sources that a figure depends on, in a checkout or installed."""
    state = hashlib.sha256()
    for folder in MEASURING:
        for path in sorted((PACKAGE / folder).iterdir()):
            state.update(path.name.encode() + path.read_bytes() if path.is_file() else b"")
    state.update((PACKAGE / "records.py").read_bytes())
    return state.hexdigest()[:12]


def _commit() -> str | None:
    """The commit of the checkout, with `+` if files differ from it; None if not in a checkout."""
    run = partial(
        subprocess.run, capture_output=True, text=True, check=True, timeout=5, cwd=PACKAGE
    )
    try:
        run(["git", "ls-files", "--error-unmatch", "__init__.py"])
        describe = run(["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"])
        return describe.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _cpu() -> str:
    return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


def environment(device: torch.device, attention: str = "sdpa") -> Environment:
    """The environment of this process on `device`, now."""
    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        properties, state = torch.cuda.get_device_properties(device), gpu_state(device)
        gpu = {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": state.get("driver"),
            "power_limit_w": state.get("power_limit_w"),
        }
    return Environment(
        **gpu,
        cpu=_cpu(),
        threads=torch.get_num_threads(),
        host_memory_bytes=psutil.virtual_memory().total,
        os=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=installed("transformers"),
        auto_round=installed("auto-round"),
        attention=attention,
        code=code_version(),
        commit=_commit(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


# ---------------------------------------------------------------- the driver's readings


def gpu_handle(device: torch.device) -> Any:
    """NVML's handle of the GPU; None without a GPU or its driver."""
    if device.type != "cuda":
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except (pynvml.NVMLError, AttributeError, RuntimeError):  # the last if the GPU was removed
        return None


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Driver, power, temperature, clocks and throttle reasons now, as far as the driver tells."""
    handle = gpu_handle(device)
    if handle is None:
        return {}
    clock, temperature = pynvml.nvmlDeviceGetClockInfo, pynvml.nvmlDeviceGetTemperature
    readings = {
        "driver": pynvml.nvmlSystemGetDriverVersion,
        "power_limit_w": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_c": lambda: temperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": lambda: clock(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: clock(handle, pynvml.NVML_CLOCK_MEM),
        "throttle_reasons": lambda: hex(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }
    values = {}
    for name, read in readings.items():
        with suppress(pynvml.NVMLError):
            values[name] = read()
    return values


def _processes(device: torch.device) -> dict[int, int | None]:
    """The processes on the GPU by id, with the bytes each holds."""
    handle, processes = gpu_handle(device), []
    kinds = (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    )
    for read in kinds if handle else ():
        with suppress(pynvml.NVMLError):
            processes += read(handle)
    return {process.pid: process.usedGpuMemory for process in processes}


def others_on(device: torch.device, own: set[int]) -> int:
    """How many processes on the GPU are not in `own`."""
    pids = set(_processes(device))
    # In a container the driver's process ids differ: only their number counts, and of several own
    # processes the parent holds no memory of the GPU.
    return len(pids - own) if pids & own else max(0, len(pids) - max(1, len(own) - 1))


def own_bytes(device: torch.device) -> int | None:
    """Bytes of the GPU that this process holds; None if the driver cannot tell (container)."""
    return _processes(device).get(os.getpid())


# ---------------------------------------------------------------- interference


class InterferenceMonitor:
    """Watches the system until `lines`; `own` are the sweep's processes."""

    def __init__(self, device: torch.device, own: Iterable[int | None]) -> None:
        self.device = device
        self.own = {os.getpid(), *(pid for pid in own if pid)}
        self.start, self.start_others_s = time.perf_counter(), self._others_s()

    def lines(self, states: dict[str, dict[str, Any]] | None) -> list[str]:
        """What interfered, a line each; `states` are the GPU's before and after."""
        return [*self._busy_cpu(), *_throttled(states), *self._busy_gpu()]

    def _others_s(self) -> float | None:
        """Seconds of CPU time of other processes since the system started."""
        times = psutil.cpu_times()._asdict()
        idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is part of the user's
        try:
            own = [psutil.Process(pid).cpu_times() for pid in self.own]
        except psutil.Error:
            return None
        busy_s = sum(seconds for name, seconds in times.items() if name not in idle)
        return busy_s - sum(times.user + times.system for times in own)

    def _busy_cpu(self) -> list[str]:
        now, elapsed_s = self._others_s(), time.perf_counter() - self.start
        if now is None or self.start_others_s is None or elapsed_s <= 0.2:
            return []  # the system counts in hundredths of a second
        share = (now - self.start_others_s) / (elapsed_s * (psutil.cpu_count() or 1))
        return [f"other processes took {share:.0%} of the CPU"] if share > BUSY_SHARE else []

    def _busy_gpu(self) -> list[str]:
        if (handle := gpu_handle(self.device)) is None:
            return []
        lines = []
        if others := others_on(self.device, self.own):
            lines.append(f"{others} other process{'es' * (others > 1)} on the GPU")
        with suppress(pynvml.NVMLError):
            # nvmlDeviceGetDisplayMode says enabled on an H100 without a display.
            if pynvml.nvmlDeviceGetDisplayActive(handle):
                lines.append("a display is attached to the GPU")
        return lines


def _throttled(states: dict[str, dict[str, Any]] | None) -> list[str]:
    reasons = 0
    for state in (states or {}).values():
        reasons |= int(state.get("throttle_reasons", "0"), 16)
    names = [name for bit, name in THROTTLED.items() if reasons & bit]
    return [f"the clock was held down by {', '.join(names)}"] if names else []


def spilled(memory: Memory | None, gpu_memory_bytes: int | None) -> list[str]:
    """A line if torch holds more than the GPU has: Windows serves the rest from host memory."""
    reserved = memory and memory.reserved_bytes
    if not reserved or not gpu_memory_bytes or reserved <= gpu_memory_bytes:
        return []
    sizes = f"{reserved / GIB:.1f} GiB held on a GPU of {gpu_memory_bytes / GIB:.1f} GiB"
    return [f"{sizes}: the host's memory is used"]
