"""What this machine has, and what it lacks: a line each, with what to do."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from colqwen_lab.measure.environment import environment, installed, pick_device
from colqwen_lab.model.config import resolve_size
from colqwen_lab.records import GIB
from colqwen_lab.settings import cache_folder

# torch 2.9.0 and 2.9.1 run the bf16 Conv3d of the patch embedding 10-20 times too slow (pytorch#166643, #174051).
KNOWN_BAD = {"torch": ("2.9.0", "2.9.1")}
PACKAGES = (
    "torch",
    "transformers",
    "auto-round",
    "auto-round-lib",
    "humming-kernels",
    "gptqmodel",
    "triton",
)


def examine() -> Iterator[tuple[str, str]]:
    """(what, what was found) for everything a sweep depends on."""
    device = pick_device()
    here = environment(device)
    if device.type == "cuda":
        memory = (here.gpu_memory_bytes or 0) / GIB
        yield "GPU", f"{here.gpu}, {memory:.1f} GiB, driver {here.driver}, CUDA {here.cuda}"
    else:
        yield "GPU", "none that CUDA sees; figures are this CPU's, and the default size is tiny"
    yield (
        "CPU",
        f"{here.cpu}, {here.threads} threads, {(here.host_memory_bytes or 0) / GIB:.1f} GiB of memory",
    )
    yield "default size", resolve_size("auto", device.type == "cuda")
    for package in PACKAGES:
        yield package, _version(package)
    for kernel, state in _kernels(device):
        yield f"kernel {kernel}", state
    folder = cache_folder()
    made = sorted(path.name for path in folder.glob("*-*") if path.is_dir())
    yield "cache", f"{folder}: {', '.join(made) or 'empty'}; COLQWEN_LAB_CACHE moves it"
    yield "hub", _hub()


def _version(package: str) -> str:
    found = installed(package) or "not installed"
    bad = found.split("+")[0] in KNOWN_BAD.get(package, ())
    return f"{found}, known to be slow: install another" if bad else found


def _kernels(device: torch.device) -> Iterator[tuple[str, str]]:
    """Every kernel for W4A16, group 128, in the three packings, on this device: installed, or what it needs."""
    from auto_round.inference.backend import BackendInfos, check_compatible

    from colqwen_lab.model.loading import FAKE

    scheme = {"bits": 4, "group_size": 128, "sym": True, "data_type": "int", "act_bits": 16}
    by_priority = sorted(BackendInfos.items(), key=lambda item: -item[1].priority)
    for name, info in by_priority:
        packings = [packing for packing in info.packing_format if packing != "auto_round:fake"]
        asked = [(name, device.type, scheme, packing, 2560, 2560) for packing in packings]
        if name == FAKE or not any(
            check_compatible(*one, check_requirements=False) for one in asked
        ):
            continue
        needs = ", ".join(str(need) for need in info.requirements or () if isinstance(need, str))
        ready = any(check_compatible(*one) for one in asked)
        state = "ready" if ready else f"needs {needs or 'humming-kernels and a CUDA GPU'}"
        yield name, f"{state}; packing {', '.join(packings)}; priority {info.priority}"


def _hub() -> str:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: only what is in its cache"
    try:
        HfApi().model_info("TomoroAI/tomoro-colqwen3-embed-4b", timeout=5)
    except Exception as error:  # any failure of the network is an answer here
        return f"not reached ({type(error).__name__}); `hf download` elsewhere, or --weights random"
    return "reached"
