"""Kernel models, and how the kernels of a record are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from colqwen_lab.errors import BadInput
from colqwen_lab.predict.kernels import (
    KINDS,
    bucket,
    check_kernel,
    recorded_dequantised,
    recorded_kernel,
    recorded_prefetch,
)
from colqwen_lab.records import Cell, Quantization
from colqwen_lab.runtime.linears import DEQUANTISE

CELL = Cell.model_validate_json(
    (Path(__file__).parents[2] / "outputs" / "h100" / "ways.jsonl").read_text().splitlines()[0]
)
W4 = Quantization(bits=4, group_size=128, sym=True)


def row(engaged: dict[str, int], configs: dict[str, str] | None = None) -> Cell:
    changes = {"engaged": engaged, "kernel_configs": configs or {}}
    return CELL.model_copy(update={"backend": CELL.backend.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("engaged", "model"),
    [
        (["torch.nn.Linear"], ""),
        (["mkldnn._linear_pointwise"], ""),
        (["auto_round:tritonv2_zp"], "tritonv2"),
        (["auto_round:torch_zp"], "torch"),
        (["auto_round:humming_zp"], "humming"),
        (["gptqmodel:marlin_zp"], "fused"),
        (["humming (W4A16)", "few_rows (W4A16)"], "humming"),
        (["humming (W4A16)", "small-M GEMM (W4A16)"], "humming"),
        (["cuBLAS, dequantised ahead", "humming (W4A16)"], "humming"),
        (["dequantise, then torch.nn.Linear", "humming (W4A16)"], "humming"),
        (["humming (W4A8 float8e4m3)"], "humming"),
        (["torch._scaled_mm (FP8 x FP8)"], "fp8"),
        (["torch._weight_int4pack_mm_for_cpu"], "int4"),
        (["auto_round_kernel_zp"], None),
        (["auto_round:tritonv2_zp", "torch.nn.Linear"], None),
        ([], None),
    ],
)
def test_kernels_of_old_and_new_records(engaged: list[str], model: str | None) -> None:
    assert recorded_kernel(row(dict.fromkeys(engaged, 28))) == model


def test_the_report_ran_the_triton_fallback() -> None:
    assert recorded_kernel(row({}).model_copy(update={"origin": "published"})) == "tritonv2"


@pytest.mark.parametrize("kinds", [(), ("o",), ("qkv", "o"), ("gate_up", "down"), KINDS])
def test_prefetched_gemms_of_a_record(kinds: tuple[str, ...]) -> None:
    m, name = CELL.batch_size * bucket(CELL.workload.tokens or 1), "dequantised ahead"
    configs = {f"{name} x {m}": "+".join(kinds) or "none", f"{name} x {m + 1}": "qkv"}
    assert recorded_prefetch(row({}, configs)) == kinds


@pytest.mark.parametrize("kinds", [(), ("qkv", "gate_up"), KINDS])
def test_dequantised_gemms_of_a_record(kinds: tuple[str, ...]) -> None:
    m = CELL.batch_size * (CELL.workload.tokens or 1)
    configs = {f"{kind} x {m}": DEQUANTISE if kind in kinds else "{}" for kind in KINDS}
    configs |= {f"{kind} x {m + 1}": DEQUANTISE for kind in KINDS}
    assert recorded_dequantised(row({}, configs)) == kinds


@pytest.mark.parametrize(
    ("kernel", "bits", "execution", "valid"),
    [
        ("fast", 4, "eager", "tritonv2, torch, fused, humming"),
        ("fp8", 16, "eager", "tritonv2, torch, fused, humming"),
        ("fp8", 4, "fast", "tritonv2, torch, fused, humming, int4"),
        ("int4", 8, "fast", "tritonv2, torch, fused, humming"),
        ("tritonv2", 3, "eager", "torch, fused, humming"),
    ],
)
def test_a_kernel_that_is_not_modelled(kernel: str, bits: int, execution: str, valid: str) -> None:
    weights = Quantization(bits=bits, group_size=128, sym=True) if bits < 16 else None
    unknown = f"unknown kernel of {bits}-bit weights in execution {execution} '{kernel}'.*; valid: "
    with pytest.raises(BadInput, match=f"{unknown}{valid}$"):
        check_kernel(kernel, weights, execution)
