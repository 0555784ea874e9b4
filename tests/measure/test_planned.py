"""What a sweep is to measure."""

from __future__ import annotations

import platform

import pytest
import torch

from colqwen_lab.measure.planned import checkpoints_of, configurations_of, usual_dtype
from colqwen_lab.options import SweepOptions

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("machine", "bf16", "amx", "dtype"),
    [
        ("x86_64", False, False, "float32"),
        ("AMD64", False, False, "float32"),
        ("x86_64", True, False, "bfloat16"),
        ("x86_64", False, True, "bfloat16"),
        ("aarch64", False, False, "bfloat16"),
    ],
)
def test_a_cpu_without_products_of_bfloat16_takes_float32(
    machine: str, bf16: bool, amx: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert usual_dtype(CPU) == dtype
    assert usual_dtype(torch.device("cuda")) == "bfloat16"
    for asked, expected in (("auto", dtype), ("float16", "float16")):
        options = SweepOptions.of({"model": "base", "size": "tiny", "dtype": asked})
        (configuration,) = configurations_of(options, checkpoints_of(options, CPU), CPU)
        assert configuration.dtype == expected
