"""Which kernel runs where, and what an error says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.runtime.kernels import KERNELS, pick

CPU = torch.device("cpu")
GPU_NEEDED = "needs a CUDA GPU of compute capability"


def test_auto_is_the_best_that_runs_here() -> None:
    assert pick("auto", CPU, (4, 128)) is KERNELS["int4"].build
    assert pick("auto", CPU, (8, 128)) is KERNELS["modules"].build


@pytest.mark.parametrize(
    ("name", "scheme", "why"),
    [
        ("fp8", None, f"kernel fp8 {GPU_NEEDED} 8.9 or newer; valid here: auto$"),
        ("humming", (4, 128), f"{GPU_NEEDED} 7.5 or newer; valid here: auto, int4, modules"),
        ("w4-int8", (4, 128), f"{GPU_NEEDED} 8.0 or newer; valid here: auto, int4, modules"),
        ("w4-fp8", None, "multiplies packed weights"),
        ("fp8", (4, 128), "multiplies 16-bit weights"),
        (
            "int4",
            (8, 128),
            "takes 4 bits in groups of 32, 64, 128 or 256; valid here: auto, modules",
        ),
    ],
)
def test_a_kernel_that_cannot_run_here_says_why(name: str, scheme: Any, why: str) -> None:
    with pytest.raises(MissingRequirement, match=why):
        pick(name, CPU, scheme)


@pytest.mark.parametrize("name", ["humming", "w4-fp8", "w4-int8"])
def test_humming_multiplies_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("colqwen_lab.runtime.kernels.find_spec", lambda package: package)
    assert pick("auto", gpu, (4, 128)) is KERNELS["humming"].build
    assert pick("auto", gpu, (4, 128), "float16") is KERNELS["modules"].build
    with pytest.raises(MissingRequirement, match=r"in bfloat16, not float32; .* auto, modules$"):
        pick(name, gpu, (4, 128), "float32")


def test_unknown_kernel() -> None:
    valid = "auto, humming, int4, modules, fp8, w4-fp8, w4-int8"
    with pytest.raises(BadInput, match=f"unknown kernel 'x'; valid: {valid}"):
        pick("x", CPU, (4, 128))
