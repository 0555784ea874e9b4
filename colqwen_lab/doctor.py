"""What this machine has and lacks: one line each, with what to do."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import HfApi, constants

from colqwen_lab.measure.environment import environment, installed, pick_device
from colqwen_lab.model.config import VARIANTS, resolve_size
from colqwen_lab.model.loading import kernel_states
from colqwen_lab.records import GIB
from colqwen_lab.settings import cache_folder

# torch 2.9.0 and 2.9.1 run the bf16 Conv3d of the patch embedding 10-20 times too slow
# (pytorch#166643, #174051).
KNOWN_SLOW = {"torch": ("2.9.0", "2.9.1")}
PACKAGES = (
    *("torch", "transformers", "auto-round", "auto-round-lib"),
    *("humming-kernels", "gptqmodel", "triton"),
)


def examine() -> Iterator[tuple[str, str]]:
    """(item, state) for everything a sweep depends on."""
    device = pick_device()
    here = environment(device)
    if device.type == "cuda":
        memory = (here.gpu_memory_bytes or 0) / GIB
        yield "GPU", f"{here.gpu}, {memory:.1f} GiB, driver {here.driver}, CUDA {here.cuda}"
    else:
        yield "GPU", "no CUDA GPU; sweeps run on the CPU, and the default size is tiny"
    memory = (here.host_memory_bytes or 0) / GIB
    yield "CPU", f"{here.cpu}, threads: {here.threads}, {memory:.1f} GiB of memory"
    yield "default size", resolve_size("auto", device.type == "cuda")
    for package in PACKAGES:
        yield package, _version(package)
    for kernel, state in kernel_states(device):
        yield f"kernel {kernel}", state
    folder = cache_folder()
    checkpoints = sorted(path.name for path in folder.glob("*-*") if path.is_dir())
    yield "cache", f"{folder}: {', '.join(checkpoints) or 'empty'}; COLQWEN_LAB_CACHE moves it"
    yield "hub", _hub()


def _version(package: str) -> str:
    version = installed(package) or "not installed"
    slow = version.split("+")[0] in KNOWN_SLOW.get(package, ())
    return f"{version}, known to be slow: install another" if slow else version


def _hub() -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: only cached repositories"
    try:
        HfApi().model_info(VARIANTS["base"].hub["4b"].name, timeout=5)
    except Exception as error:  # every network failure is an answer here
        return f"not reached ({type(error).__name__}); `hf download` elsewhere, or --weights random"
    return "reached"
