"""GPUs as memory budgets and limits of speed, and the rule by which something fits one. Needs no torch.

Dense tensor rates are derived: 2 x multiprocessors x boost clock x fused multiply-adds a clock and multiprocessor, with
32-bit accumulation, the rate that PyTorch's matrix products run at. They reproduce the vendor's tables (A100 312,
RTX 4090 165, H100 989 TFLOP/s in BF16). Memory, bandwidth, multiprocessors and clocks are the vendor's.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from colqwen_lab.errors import BadInput
from colqwen_lab.records import GIB, Memory

Fit = Literal["fits", "tight", "does not fit"]

# What a process holds outside torch's allocator: the context, libraries, kernels. Source: the project's facts on
# measuring, 200 to 700 MB; the largest GPU here, an H200, held 729 MB (outputs/h200).
OUTSIDE_TORCH_BYTES = (200 * 10**6, 700 * 10**6)
# A 6 GB card shows 5.80 GiB: the lowest share of the nominal memory in those facts.
USABLE_SHARE = Fraction(967, 1000)


@dataclass(frozen=True)
class Architecture:
    """Multiply-adds a clock and multiprocessor in 16 bits, the factors of INT8 and FP8 over it, and the source."""

    fma: int
    int8: int
    fp8: int
    compute_capability: tuple[int, int]
    source: str


TURING = Architecture(512, 2, 0, (7, 5), "NVIDIA T4 datasheet; no BF16, the rate is FP16's")
AMPERE = Architecture(256, 4, 0, (8, 6), "NVIDIA Ampere GA102 architecture whitepaper")
AMPERE_A10 = Architecture(512, 2, 0, (8, 6), "NVIDIA A10 datasheet")
AMPERE_A100 = Architecture(1024, 2, 0, (8, 0), "NVIDIA A100 datasheet")
ADA = Architecture(256, 4, 2, (8, 9), "NVIDIA Ada GPU architecture whitepaper")
ADA_L = Architecture(512, 2, 2, (8, 9), "NVIDIA L4 and L40S datasheets")
HOPPER = Architecture(2048, 2, 2, (9, 0), "NVIDIA H100 and H200 datasheets")
BLACKWELL = Architecture(256, 4, 2, (12, 0), "NVIDIA RTX Blackwell GPU architecture whitepaper")


@dataclass(frozen=True)
class Gpu:
    """A GPU: nominal memory in GiB, bandwidth in GB/s, multiprocessors, boost clock in GHz."""

    name: str
    memory_gib: float
    bandwidth_gb_s: float
    multiprocessors: int
    boost_ghz: float
    architecture: Architecture
    ecc: bool = False

    @property
    def visible_bytes(self) -> int:
        """Memory as the driver shows it: ECC inside GDDR6 takes a sixteenth (nvidia-smi: L4 23,034 MiB of 24,576)."""
        return round(self.memory_gib * GIB * (15 / 16 if self.ecc else 1))

    def flops(self, dtype: str = "bfloat16") -> float:
        """Dense operations a second in 16 bits, `int8` or `fp8`; 0 where the GPU has no such products."""
        factor = {"int8": self.architecture.int8, "fp8": self.architecture.fp8}.get(dtype, 1)
        return 2e9 * self.multiprocessors * self.boost_ghz * self.architecture.fma * factor


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 3060 8GB", 8, 240, 28, 1.777, AMPERE),
        Gpu("RTX 3060", 12, 360, 28, 1.777, AMPERE),
        Gpu("RTX 3070", 8, 448, 46, 1.725, AMPERE),
        Gpu("RTX 3080", 10, 760, 68, 1.71, AMPERE),
        Gpu("RTX 4060", 8, 272, 24, 2.46, ADA),
        Gpu("RTX 4060 Ti 16GB", 16, 288, 34, 2.535, ADA),
        Gpu("RTX 4070", 12, 504, 46, 2.475, ADA),
        Gpu("RTX 4080", 16, 716.8, 76, 2.505, ADA),
        Gpu("RTX 4090", 24, 1008, 128, 2.52, ADA),
        Gpu("RTX 5070", 12, 672, 48, 2.512, BLACKWELL),
        Gpu("RTX 5080", 16, 960, 84, 2.617, BLACKWELL),
        Gpu("RTX 5090", 32, 1792, 170, 2.407, BLACKWELL),
        Gpu("T4", 16, 320, 40, 1.59, TURING, ecc=True),
        Gpu("L4", 24, 300, 58, 2.04, ADA_L, ecc=True),
        Gpu("A10", 24, 600, 72, 1.695, AMPERE_A10, ecc=True),
        Gpu("A100 40GB", 40, 1555, 108, 1.41, AMPERE_A100),
        Gpu("A100 80GB", 80, 2039, 108, 1.41, AMPERE_A100),
        Gpu("L40S", 48, 864, 142, 2.49, ADA_L, ecc=True),
        Gpu("H100", 80, 3350, 132, 1.83, HOPPER),
        Gpu("H200", 141, 4800, 132, 1.83, HOPPER),
    )
}


@dataclass(frozen=True)
class Card:
    """A memory budget: of a named GPU, or in GB (a card's "8 GB" is 8 GiB nominal)."""

    name: str
    nominal_bytes: int
    gpu: Gpu | None = None

    @property
    def usable_bytes(self) -> int:
        """The bytes that are there at the worst."""
        return usable(self.nominal_bytes)


def find_card(name: str | float) -> Card:
    """The card of a GPU's name, or of a budget in GB: "RTX 4070", "8", 8, "8GB".

    Raises:
        BadInput: neither; the closest names are given.
    """
    text = str(name).strip()
    for gpu in GPUS.values():
        if _plain(gpu.name) == _plain(text):
            return Card(gpu.name, gpu.visible_bytes, gpu)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:gi?b)?", text, re.IGNORECASE)
    size = float(match[1]) if match else math.nan
    if not 0 < size < 1e6:
        plain, asked = {_plain(known): known for known in GPUS}, _plain(text)
        alike = [one for one in plain if asked and asked in one][:4]
        near = [
            plain[one] for one in alike or difflib.get_close_matches(asked, plain, n=3, cutoff=0.4)
        ]
        closest = f"the closest GPUs are {', '.join(near)}" if near else f"GPUs: {', '.join(GPUS)}"
        raise BadInput(
            f"unknown card {text!r}; valid: memory in GB above 0, or a GPU's name; {closest}"
        )
    return Card(f"{size:g} GB", round(size * GIB))


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())


def gpu_of(device: str, memory_bytes: int | None = None) -> Gpu | None:
    """The GPU of the table that a driver names so ("NVIDIA A100-SXM4-40GB"); None if it is none of them.

    Where two have the name and differ in memory, `memory_bytes` or the size in the name tells.
    """
    words = set(re.split(r"[\s-]+", device)) - {
        "NVIDIA",
        "GeForce",
        "Tesla",
        "SXM4",
        "SXM5",
        "HBM3",
    }
    sizes = {word for word in words if re.fullmatch(r"\d+GB", word)}
    words -= sizes | ({"PCIE", "PCIe"} if "A100" in words else set())
    named = [gpu for gpu in GPUS.values() if set(re.sub(r" \d+GB", "", gpu.name).split()) == words]
    size = memory_bytes / GIB if memory_bytes else float(min(sizes)[:-2]) if sizes else None
    near = [gpu for gpu in named if size is None or abs(gpu.memory_gib - size) < 0.12 * size]
    return near[0] if near else None


def outside_bytes(memory: Memory) -> int | None:
    """What lies outside torch, as a GPU measured it; None where none did."""
    if memory.device_bytes is None or memory.reserved_bytes is None:
        return None
    return max(0, memory.device_bytes - memory.reserved_bytes)


def usable(nominal_bytes: int) -> int:
    """The bytes that a card of `nominal_bytes` has at the worst."""
    return math.floor(nominal_bytes * USABLE_SHARE)


def need_bytes(memory: Memory) -> tuple[int, int]:
    """What a row needs of a card, at least and at most, with what lies outside torch, measured or assumed.

    Inside torch that is the peak; of a prediction the least that torch must be allowed to reserve.
    """
    inside = memory.min_reserved_bytes or memory.peak_bytes
    measured = outside_bytes(memory)
    least, most = OUTSIDE_TORCH_BYTES if measured is None else (measured, measured)
    return inside + least, inside + most


def fit_of(memory: Memory, nominal_bytes: int) -> Fit:
    """Whether a row fits a card of `nominal_bytes` at the worst, only at the best (tight), or not."""
    least, most = need_bytes(memory)
    if most <= usable(nominal_bytes):
        return "fits"
    return "tight" if least <= nominal_bytes else "does not fit"
