"""The machine and the versions that a record names. Host, user and folder names stay out."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from colqwen_lab.records import Environment
from colqwen_lab.settings import PACKAGE

# Rooms whose code a measured figure depends on.
MEASURING = ("model", "runtime", "measure", "data")


@cache
def code_version() -> str:
    """Twelve hex digits of the sources that a figure depends on; the same in a checkout and installed."""
    state = hashlib.sha256()
    for room in MEASURING:
        for path in sorted((PACKAGE / room).iterdir()):
            state.update(path.name.encode() + path.read_bytes() if path.is_file() else b"")
    state.update((PACKAGE / "records.py").read_bytes())
    return state.hexdigest()[:12]


def _commit() -> str | None:
    """The commit of the checkout, with `+` where files differ from it; None where installed."""
    try:
        run = partial(
            subprocess.run, capture_output=True, text=True, check=True, timeout=5, cwd=PACKAGE
        )
        run(["git", "ls-files", "--error-unmatch", "__init__.py"])
        return run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def installed(package: str) -> str | None:
    """The version of a package; None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _cpu() -> str:
    import cpuinfo  # comes with auto-round

    return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


def environment(device: torch.device, attention: str = "sdpa") -> Environment:
    """The environment of this process on `device`, now."""
    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        properties, told = torch.cuda.get_device_properties(device), nvml_readings(device)
        gpu = {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": told.get("driver"),
            "power_limit_w": told.get("power_limit_w"),
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


def gpu_handle(device: torch.device) -> Any:
    """NVML's handle of the GPU; None without one, or without its driver."""
    import pynvml

    if device.type != "cuda":
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except (pynvml.NVMLError, AttributeError, RuntimeError):  # the last where the GPU was removed
        return None


def nvml_readings(device: torch.device) -> dict[str, Any]:
    """Driver, power, temperature, clocks and throttle reasons of the GPU, as far as its driver tells them."""
    import pynvml

    handle = gpu_handle(device)
    if handle is None:
        return {}
    readings = {
        "driver": lambda: pynvml.nvmlSystemGetDriverVersion(),
        "power_limit_w": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(
            handle, pynvml.NVML_TEMPERATURE_GPU
        ),
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "throttle_reasons": lambda: hex(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }
    found = {}
    for name, read in readings.items():
        with suppress(pynvml.NVMLError):
            found[name] = read()
    return found


def gpu_state(device: torch.device) -> dict[str, Any] | None:
    """Clocks, power and temperature now; None without a GPU."""
    if device.type != "cuda":
        return None
    return {k: v for k, v in nvml_readings(device).items() if k not in ("driver", "power_limit_w")}


def pick_device() -> torch.device:
    """The CUDA GPU, else the CPU. CUDA_VISIBLE_DEVICES chooses among GPUs, and an empty one hides them."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
