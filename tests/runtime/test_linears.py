"""Every kernel against float64, on random data of the shapes of 4b and `tiny`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colqwen_lab.model.packing import packed, unpacked
from colqwen_lab.runtime.kernels import KERNELS, dense_linear, pick
from colqwen_lab.runtime.linears import Dense, Prepacked

CPU = torch.device("cpu")
SCHEME = (4, 128)
# Outputs of the linears that are fused, and their input: QKV, O, gate and up, down.
SHAPES = {
    "tiny": [([128, 64, 64], 128), ([128], 128), ([256, 256], 128), ([128], 256)],
    "4b": [([4096, 1024, 1024], 2560), ([2560], 4096), ([9728, 9728], 2560), ([2560], 9728)],
}
CASES = [(size, index) for size, shapes in SHAPES.items() for index in range(len(shapes))]


def draw(*shape: int, device: torch.device = CPU) -> Tensor:
    return torch.randn(*shape, device=device)


def quantised(outs: int, ins: int, symmetric: bool, device: torch.device) -> tuple[Any, Tensor]:
    """A module of AutoRound's with random codes, and its weight [out, in] in float64."""
    if symmetric:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    module = QuantLinear(4, 128, ins, outs, False).to(device)
    module.sym = symmetric
    codes = torch.randint(16, (ins, outs), device=device)
    zeros = torch.full((ins // 128, outs), 8, device=device)
    if not symmetric:
        zeros = torch.randint(1, 16, zeros.shape, device=device)
    scales = (torch.rand(zeros.shape, device=device) * 0.01 + 0.002).bfloat16()
    module.qweight, module.scales = packed(codes, 4, 0), scales
    module.qzeros = packed(zeros - int(symmetric), 4, 1)
    weight = (codes - zeros.repeat_interleave(128, 0)).double()
    return module, (weight * scales.double().repeat_interleave(128, 0)).T


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def check_packed(name: str, device: torch.device, shape: Any, sizes: tuple[int, ...]) -> None:
    """The kernel on packed linears of this shape against float64, at each M."""
    outputs, ins = shape
    if why := KERNELS[name].unmet(device, SCHEME):
        pytest.skip(f"kernel {name} {why}")
    modules, weights = zip(
        *(quantised(outs, ins, symmetric=True, device=device) for outs in outputs), strict=True
    )
    weight = torch.cat(weights)
    linear = pick(name, device, SCHEME)(modules)
    for m in sizes:
        x = draw(m, ins, device=device).bfloat16()
        assert error(linear(x), x.double() @ weight.T) < 0.006


@pytest.mark.parametrize(("name", "size"), [("int4", "tiny"), ("int4", "4b"), ("modules", "tiny")])
@pytest.mark.parametrize("index", range(4))
def test_packed_kernel_on_a_cpu_against_float64(name: str, size: str, index: int) -> None:
    check_packed(name, CPU, SHAPES[size][index], (1, 18, 152) if size == "tiny" else (1, 18))


def test_int4_on_a_cpu_takes_zero_points() -> None:
    module, weight = quantised(64, 256, symmetric=False, device=CPU)
    x = draw(5, 256).bfloat16()
    assert error(pick("int4", CPU, SCHEME)([module])(x), x.double() @ weight.T) < 0.006


def dense(outs: int, ins: int, device: torch.device = CPU) -> nn.Linear:
    linear = nn.Linear(ins, outs, bias=False, device=device, dtype=torch.bfloat16)
    return linear.requires_grad_(False)


def test_dense_keeps_one_copy_of_the_weights() -> None:
    linears = [dense(32, 16), dense(48, 16)]
    weight = torch.cat([one.weight for one in linears])
    fused = Dense(linears)
    x = draw(3, 16).bfloat16()
    assert torch.equal(fused(x), nn.functional.linear(x, weight))
    storages = {one.weight.untyped_storage().data_ptr() for one in [*linears, fused]}
    assert len(storages) == 1
    assert torch.equal(linears[1](x), nn.functional.linear(x, weight[32:]))


@pytest.mark.skipif(dense_linear(CPU) is not Prepacked, reason="this CPU has no oneDNN bfloat16")
@pytest.mark.parametrize(("size", "index"), CASES)
def test_prepacked_against_float64(size: str, index: int) -> None:
    outputs, ins = SHAPES[size][index]
    linears = [dense(outs, ins) for outs in outputs]
    weight = torch.cat([one.weight for one in linears]).double()
    fused = Prepacked(linears)
    for m in (1, 18, 152):
        x = draw(m, ins).bfloat16()
        assert error(fused(x), x.double() @ weight.T) < 0.006


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_and_back(bits: int, dim: int) -> None:
    codes = torch.randint(2**bits, (64, 32))
    assert torch.equal(unpacked(packed(codes, bits, dim), bits, dim).long(), codes)
