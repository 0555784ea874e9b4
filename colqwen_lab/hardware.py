"""GPUs with their memory and speed limits, and the rule by which a run fits a card. No torch.

`data/gpus.csv` holds the vendor's figures with their source; `ecc`: ECC is on as shipped. Dense
rates are 2 x multiprocessors x boost clock x multiply-adds; laptop rates are upper limits.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from pydantic import BaseModel

from colqwen_lab.errors import BadInput
from colqwen_lab.records import GIB, Memory
from colqwen_lab.settings import DATA

Fit = Literal["fits", "tight", "does not fit"]

# Memory that a process holds outside torch's allocator: CUDA context, libraries, kernels.
# Measured: 200 to 700 MB; the largest GPU here, an H200, held 729 MB (outputs/h200).
OUTSIDE_TORCH_BYTES = (200 * 10**6, 700 * 10**6)
USABLE_SHARE = Fraction(967, 1000)  # a 6 GB card shows 5.80 GiB, the lowest share measured
MOST_GB = 1024
SIZE = re.compile(r"(\d+)[\s_-]*gi?b(?![a-z])", re.IGNORECASE)
IGNORED = re.compile(
    r"nvidia|geforce|tesla|rtx|gpu|generation|workstation|edition|sxm\d?|hbm\d?e?|[^a-z\d]"
)

# 16-bit multiply-adds per clock and multiprocessor, INT8 and FP8 rates relative to 16-bit, compute
# capability. The rates are with 32-bit accumulation, as in PyTorch: half on GeForce, A10G and L40.
# Turing has no BF16: its rate is that of FP16.
ARCHITECTURES: dict[str, Any] = json.loads((DATA / "architectures.json").read_bytes())


class Gpu(BaseModel, frozen=True):
    """A GPU: nominal memory in GiB, bandwidth in GB/s, multiprocessors, boost clock in GHz."""

    name: str
    memory_gib: float
    bandwidth_gb_s: float
    multiprocessors: int
    boost_ghz: float
    architecture: str
    ecc: bool
    alias: str
    source: str

    @property
    def visible_bytes(self) -> int:
        """Memory as the driver shows it; ECC in GDDR6 takes 1/16 (L4: 23,034 of 24,576 MiB)."""
        return round(self.memory_gib * GIB * (15 / 16 if self.ecc else 1))

    @property
    def compute_capability(self) -> tuple[int, int]:
        """CUDA compute capability, such as (8, 9)."""
        major, minor = ARCHITECTURES[self.architecture][3]
        return major, minor

    def flops(self, dtype: str = "bfloat16") -> float:
        """Dense operations per second in 16 bits, `int8` or `fp8`; 0 where not supported."""
        multiply_adds, int8, fp8, _ = ARCHITECTURES[self.architecture]
        factor = {"int8": int8, "fp8": fp8}.get(dtype, 1)
        return 2e9 * self.multiprocessors * self.boost_ghz * multiply_adds * factor


def _key(name: str) -> tuple[str, float | None]:
    """Model and memory in GB of a GPU's name in any spelling: ("4060ti", 16.0)."""
    size = SIZE.search(name)
    model = SIZE.sub("", name).lower().replace("mobile", "laptop")
    return IGNORED.sub("", model), float(size[1]) if size else None


ROWS = csv.DictReader((DATA / "gpus.csv").read_text(encoding="utf-8").splitlines())
GPUS = {row["name"]: Gpu.model_validate(row) for row in ROWS}
SPELLINGS = [(*_key(name), gpu) for gpu in GPUS.values() for name in (gpu.name, gpu.alias) if name]


@dataclass(frozen=True)
class Card:
    """A memory budget: of a named GPU, or in GB (a card's "8 GB" is 8 GiB nominal)."""

    name: str
    nominal_bytes: int
    gpu: Gpu | None = None

    @property
    def usable_bytes(self) -> int:
        """Bytes that are usable in the worst case."""
        return usable(self.nominal_bytes)


def _named(name: str, memory_gib: float | None = None) -> list[Gpu]:
    """GPUs of this name; `memory_gib`, or the size in the name, selects among them."""
    model, stated = _key(name)
    size = memory_gib or stated  # a driver shows up to 10 % less: ECC, reserved memory
    gpus = {
        gpu.name: gpu
        for key, memory, gpu in SPELLINGS
        if key == model and (not size or abs((memory or gpu.memory_gib) - size) < 0.12 * size)
    }.values()
    # The more common of two sizes has the plain name: RTX 3060 (12 GB), RTX 3080 (10 GB).
    return [gpu for gpu in gpus if not SIZE.search(gpu.name)] or list(gpus)


def _similar(model: str) -> list[str]:
    """Names of up to four GPUs with this text or number in their model."""
    part = rf"(?<!\d){re.escape(model)}(?!\d)"
    names = [gpu.name for key, _, gpu in SPELLINGS if re.search(part, key)]
    return list(dict.fromkeys(names))[:4]


def find_card(name: str | float) -> Card:
    """The card of a GPU's name in any usual spelling, or of a budget in GB: "rtx4070", "8GB", 8.

    Raises BadInput for an unknown or ambiguous card, and for a number that may be a GPU's name.
    """
    text = str(name).strip()
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(gi?b)?", text, re.IGNORECASE)
    if number and (size := float(number[1])) > 0:
        figure = f"{size:g}"
        # 40 is a budget, not an A40; 100 without a unit may be an A100.
        models = [gpu.name for gpu in _named(figure)] or _similar(figure) if size >= 100 else []
        hint = f"did you mean {' or '.join(models)}?" if models else f"at most {MOST_GB} GB"
        if size > MOST_GB:
            raise BadInput(f"{figure} GB is not a card; {hint}")
        if models and not number[2]:
            raise BadInput(f"{figure} GB is not a card; {hint} Write {figure}GB for memory.")
        return Card(f"{figure} GB", round(size * GIB))
    gpus = _named(text)
    if len(gpus) == 1:
        return Card(gpus[0].name, gpus[0].visible_bytes, gpus[0])
    model, names = _key(text)[0], {key: gpu.name for key, _, gpu in SPELLINGS}
    close = _similar(model) or [names[key] for key in difflib.get_close_matches(model, names)]
    near = ", ".join(close if model else GPUS)  # "NVIDIA" alone lists every GPU
    if gpus:
        raise BadInput(f"{text!r} names more than one card; write one of {near}")
    closest = f"; the closest GPUs are {near}" if near else ""
    valid = "memory in GB above 0, such as 12, or a GPU's name, such as RTX 4070"
    raise BadInput(f"card must be {valid}, got {text!r}{closest}")


def gpu_of(device: str, memory_bytes: int | None = None) -> Gpu | None:
    """The GPU that a driver names so ("NVIDIA A100-SXM4-40GB"); None if unknown or ambiguous."""
    gpus = _named(device, memory_bytes / GIB if memory_bytes else None)
    return gpus[0] if len(gpus) == 1 else None


def outside_bytes(memory: Memory) -> int | None:
    """Memory outside torch's allocator as measured on a GPU; None if not measured."""
    if memory.device_bytes is None or memory.reserved_bytes is None:
        return None
    return max(0, memory.device_bytes - memory.reserved_bytes)


def usable(nominal_bytes: int) -> int:
    """Bytes of a card of `nominal_bytes` that are usable in the worst case."""
    return math.floor(nominal_bytes * USABLE_SHARE)


def need_bytes(memory: Memory) -> tuple[int, int]:
    """The least and most bytes of a card that a run needs, inside and outside torch."""
    inside = memory.min_reserved_bytes or memory.peak_bytes  # predictions know the former
    measured = outside_bytes(memory)
    least, most = OUTSIDE_TORCH_BYTES if measured is None else (measured, measured)
    return inside + least, inside + most


def fit_of(memory: Memory, nominal_bytes: int) -> Fit:
    """`fits`, `tight` (in the best case only) or `does not fit`, on a card of `nominal_bytes`."""
    least, most = need_bytes(memory)
    if most <= usable(nominal_bytes):
        return "fits"
    return "tight" if least <= nominal_bytes else "does not fit"
