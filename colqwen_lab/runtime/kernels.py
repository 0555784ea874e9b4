"""The kernels of execution `fast`: how each is built, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from colqwen_lab.errors import MissingRequirement, one_of
from colqwen_lab.runtime.linears import AsLoaded, Dense, Fp8, FusedLinear, Int4Cpu, Prepacked

Build = Callable[[Sequence[Any]], FusedLinear]
Scheme = tuple[int, int] | None  # (bits, group size); None is 16 bits


class Kernel(NamedTuple):
    """Builds a fused linear of `packed` or 16-bit weights, and says what that needs."""

    build: Build
    packed: bool = True
    compute_capability: tuple[int, int] | None = None
    humming: bool = False

    def unmet(self, device: torch.device, scheme: Scheme, dtype: str = "bfloat16") -> str:
        """Why this kernel cannot run here; empty if it can."""
        needed = self.compute_capability
        if self.packed is (scheme is None):
            return f"multiplies {'packed' if self.packed else '16-bit'} weights"
        if needed and (device.type != "cuda" or torch.cuda.get_device_capability(device) < needed):
            return f"needs a CUDA GPU of compute capability {needed[0]}.{needed[1]} or newer"
        if self.humming and find_spec("humming") is None:
            return "needs the package humming-kernels: pip install 'colqwen-lab[gpu]'"
        if self.humming and dtype != "bfloat16":
            return f"multiplies in bfloat16, not {dtype}"
        if self.build is Int4Cpu and device.type != "cpu":
            return "runs on a CPU"
        if self.build is Int4Cpu and scheme not in ((4, 32), (4, 64), (4, 128), (4, 256)):
            return "takes 4 bits in groups of 32, 64, 128 or 256"
        return ""


def _humming(linears: Sequence[Any], activations: str | None = None) -> FusedLinear:
    from colqwen_lab.runtime.w4 import Humming  # needs humming-kernels and cuda-bindings

    return Humming(linears, activations)


# Best first for packed weights; `modules` runs everywhere. 8-bit activations come after it, so
# `auto` never picks them.
KERNELS = {
    "humming": Kernel(_humming, True, (7, 5), humming=True),
    "int4": Kernel(Int4Cpu),
    "modules": Kernel(AsLoaded),
    "fp8": Kernel(Fp8, False, (8, 9)),
    "w4-fp8": Kernel(partial(_humming, activations="float8e4m3"), True, (8, 9), humming=True),
    "w4-int8": Kernel(partial(_humming, activations="int8"), True, (8, 0), humming=True),
}


def pick(name: str, device: torch.device, scheme: Scheme, dtype: str = "bfloat16") -> Build:
    """The builder of this kernel, or for `auto` of the best that runs here on weights of `scheme`.

    Raises:
        BadInput: no such kernel.
        MissingRequirement: the kernel cannot run here; says why, and which can.
    """
    one_of("kernel", name, ("auto", *KERNELS))
    unmet = {each: kernel.unmet(device, scheme, dtype) for each, kernel in KERNELS.items()}
    valid = [each for each, why in unmet.items() if not why]
    if why := unmet.get(name):
        raise MissingRequirement(f"kernel {name} {why}; valid here: {', '.join(['auto', *valid])}")
    return KERNELS[valid[0] if name == "auto" else name].build


def dense_linear(device: torch.device, dtype: str = "bfloat16") -> Build:
    """The best class for 16-bit weights on this device."""
    blocked = device.type == "cpu" and dtype == "bfloat16" and torch.backends.mkldnn.is_available()
    return Prepacked if blocked and torch.ops.mkldnn._is_mkldnn_bf16_supported() else Dense
