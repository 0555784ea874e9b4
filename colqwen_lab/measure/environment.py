"""The machine and the versions that a record names, and what interferes with a measurement.

Host, user and folder names stay out of records.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import cpuinfo  # comes with auto-round
import psutil
import pynvml
import torch

from colqwen_lab.records import GIB, Environment, Memory
from colqwen_lab.settings import PACKAGE

# What a measured figure depends on.
MEASURING = (
    *("records.py", "sampling.py", "options.py", "model/*", "runtime/*", "measure/*"),
    *("data/sizes.json", "data/synthetic.json", "data/*.txt", "data/tiny/*"),
)
# Other processes' share of all cores above which a cell says so.
BUSY_SHARE = 0.1
# Why a clock is below its highest: the bits of nvmlClocksThrottleReasons (nvml.h) from 0x2 on.
# The lowest bit is an idle GPU.
THROTTLED = (
    *("an application's setting", "the power limit", "a hardware slowdown", "sync boost"),
    *("temperature, by software", "temperature, by hardware", "an external power brake"),
    "the display's clock",
)


# ---------------------------------------------------------------- machine and versions


def pick_device() -> torch.device:
    """The CUDA GPU with its number, else the CPU; CUDA_VISIBLE_DEVICES chooses and hides GPUs."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@cache
def code_version(sources: tuple[str, ...] = MEASURING) -> str:
    """Twelve hex digits of the sources that a figure depends on, in a checkout or installed."""
    state = hashlib.sha256()
    for path in (path for pattern in sources for path in sorted(PACKAGE.glob(pattern))):
        state.update(path.name.encode() + path.read_bytes() if path.is_file() else b"")
    return state.hexdigest()[:12]


def _commit() -> str | None:
    """The commit of the checkout, with `+` if files differ from it; None if not in a checkout."""
    options = {"capture_output": True, "text": True, "check": True, "timeout": 5, "cwd": PACKAGE}
    git = partial(subprocess.run, **options)
    try:
        git(["git", "ls-files", "--error-unmatch", "__init__.py"])
        describe = git(["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"])
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


def environment(device: torch.device) -> Environment:
    """The environment of this process on `device`, now."""
    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        properties, state = torch.cuda.get_device_properties(device), gpu_state(device)
        gpu = {name: state.get(name) for name in ("driver", "power_limit_w")} | {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
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
        attention="sdpa",
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


STATE: dict[str, Callable[[Any], Any]] = {
    "driver": lambda _: pynvml.nvmlSystemGetDriverVersion(),
    "power_limit_w": lambda gpu: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
    "power_w": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "temperature_c": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    "sm_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
    "throttle_reasons": lambda gpu: hex(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)),
}


def gpu_state(device: torch.device) -> dict[str, Any]:
    """A dict of the driver, W, °C, clocks in MHz and throttle bits now; empty on a CPU."""
    values, handle = dict[str, Any](), gpu_handle(device)
    for name, read in STATE.items() if handle else ():
        with suppress(pynvml.NVMLError):
            values[name] = read(handle)
    return values


def energy_j(device: torch.device) -> float | None:
    """Joules that the GPU has taken since its driver was loaded; None without such a counter."""
    with suppress(pynvml.NVMLError):
        if handle := gpu_handle(device):
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    return None


@cache
def idle_watts(device: torch.device) -> float:
    """The power in watts of the GPU over a second before its first work; 0 without a counter."""
    if (start_j := energy_j(device)) is None:
        return 0.0
    start = time.perf_counter()
    time.sleep(1)
    return ((energy_j(device) or 0.0) - start_j) / (time.perf_counter() - start)


def _processes(device: torch.device) -> dict[int, int | None]:
    """The processes on the GPU by id, with the bytes each holds."""
    handle, processes = gpu_handle(device), []
    for kind in ("Compute", "Graphics") if handle else ():
        with suppress(pynvml.NVMLError):
            processes += getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses")(handle)
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


class Watch(NamedTuple):
    """The GPU's state and the time when a measurement started, and the sweep's processes."""

    device: torch.device
    own: list[psutil.Process]
    state: dict[str, Any]
    start: float


def watch(device: torch.device, workers: Iterable[int | None]) -> Watch:
    """Start to watch for interference; `workers` are the ids of the sweep's other processes."""
    pids = {os.getpid(), *filter(None, workers)}
    own = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    others_share(own)
    return Watch(device, own, gpu_state(device), time.perf_counter())


def interference(watch: Watch) -> tuple[list[str], dict[str, dict[str, Any]] | None]:
    """What interfered since `watch`, a line each; the GPU's states before and after."""
    lines, states = [], {"before": watch.state, "after": gpu_state(watch.device)}
    share = others_share(watch.own)
    # The system counts CPU time in hundredths of a second.
    if share > BUSY_SHARE and time.perf_counter() - watch.start > 0.2:
        lines.append(f"other processes took {share:.0%} of the CPU")
    for bit, reason in enumerate(THROTTLED, 1):
        if any(int(one.get("throttle_reasons", "0"), 16) >> bit & 1 for one in states.values()):
            lines.append(f"the clock was held down by {reason}")
    if others := others_on(watch.device, {process.pid for process in watch.own}):
        lines.append(f"{others} other process{'es' * (others > 1)} on the GPU")
    with suppress(pynvml.NVMLError):
        # nvmlDeviceGetDisplayMode says enabled on an H100 without a display.
        if (gpu := gpu_handle(watch.device)) and pynvml.nvmlDeviceGetDisplayActive(gpu):
            lines.append("a display is attached to the GPU")
    return lines, states if watch.state else None


def others_share(own: Iterable[psutil.Process]) -> float:
    """The share of all cores, since the last call, of processes that are not in `own`."""
    try:
        own_percent = sum(process.cpu_percent() for process in own) / (psutil.cpu_count() or 1)
    except psutil.Error:  # a worker has ended
        return 0.0
    return (psutil.cpu_percent() - own_percent) / 100


def spilled(memory: Memory | None, machine: Environment) -> list[str]:
    """A list of one line if torch holds more bytes than the GPU has, else an empty list."""
    reserved, total = (memory and memory.reserved_bytes) or 0, machine.gpu_memory_bytes
    if not total or reserved <= total:
        return []
    sizes = f"{reserved / GIB:.1f} GiB held on a GPU of {total / GIB:.1f} GiB"
    return [f"{sizes}: the host's memory is used"]
