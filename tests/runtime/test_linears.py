"""Every kernel against float64, on random data of the shapes of 4b and `tiny`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colqwen_lab.model.packing import packed, unpacked
from colqwen_lab.runtime.gemms import silu_and_mul
from colqwen_lab.runtime.kernels import KERNELS, dense_linear, pick
from colqwen_lab.runtime.linears import Dense, Prepacked, Unnormed

CPU = torch.device("cpu")
# Large enough to matter.
EPS = 0.1
SCHEME = (4, 128)
# Outputs of the linears that are fused, and their input: QKV, O, gate and up, down.
SHAPES = {
    "tiny": [([128, 64, 64], 128), ([128], 128), ([256, 256], 128), ([128], 256)],
    "4b": [([4096, 1024, 1024], 2560), ([2560], 4096), ([9728, 9728], 2560), ([2560], 9728)],
}
# BF16 results round to 2^-9, on average 1.7e-3 of the norm; 8-bit activations add their own error.
LARGEST_ERROR = {"w4-fp8": 0.035, "w4-int8": 0.015, "fp8": 0.045}
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


def worst_row(result: Tensor, expected: Tensor) -> float:
    """The largest error of a row."""
    return float(((result.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def check_packed(name: str, device: torch.device, shape: Any, sizes: tuple[int, ...]) -> None:
    """The kernel on packed linears of this shape against float64, at each M."""
    outputs, ins = shape
    if why := KERNELS[name].unmet(device, SCHEME):
        pytest.skip(f"kernel {name} {why}")
    modules, weights = zip(
        *(quantised(outs, ins, symmetric=True, device=device) for outs in outputs), strict=True
    )
    weight = torch.cat(weights)
    linear = pick(name, device, SCHEME).build(modules)
    for m in sizes:
        x = draw(m, ins, device=device).bfloat16()
        assert error(linear(x), x.double() @ weight.T) < LARGEST_ERROR.get(name, 0.006)


@pytest.mark.parametrize(("name", "size"), [("int4", "tiny"), ("int4", "4b"), ("modules", "tiny")])
@pytest.mark.parametrize("index", range(4))
def test_packed_kernel_on_a_cpu_against_float64(name: str, size: str, index: int) -> None:
    check_packed(name, CPU, SHAPES[size][index], (1, 18, 152) if size == "tiny" else (1, 18))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["humming", "w4-fp8", "w4-int8"])
@pytest.mark.parametrize("index", range(4))
def test_packed_kernel_on_a_gpu_against_float64(name: str, index: int, cuda: torch.device) -> None:
    check_packed(name, cuda, SHAPES["4b"][index], (1, 18, 152))


def unlike_rows(m: int, columns: int, device: torch.device) -> Tensor:
    """Random rows of very different sizes."""
    factors = 2.0 ** (torch.arange(m, device=device) % 9 - 4)
    return (draw(m, columns, device=device) * factors[:, None]).bfloat16()


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return weight.double() * wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def unnormed(x: Tensor) -> Unnormed:
    """x as the GEMM before leaves it, with a norm weight of two."""
    return Unnormed(2 * x, x.float().pow(2).unflatten(-1, (-1, 64)).sum(-1), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(4))
def test_small_m_gemm_and_dequantise_against_float64(index: int, cuda: torch.device) -> None:
    """Every small-M GEMM at several M, with SiLU-and-mul and split RMSNorm; weights dequantised."""
    if (why := KERNELS["humming"].unmet(cuda, SCHEME)) or torch.cuda.get_device_capability()[
        0
    ] != 9:
        pytest.skip(f"kernel humming {why}" if why else "needs a Hopper GPU")
    outputs, ins = SHAPES["4b"][index]
    modules, weights = zip(
        *(quantised(outs, ins, symmetric=True, device=cuda) for outs in outputs), strict=True
    )
    linear: Any = pick("humming", cuda, SCHEME).build(modules)
    linear.returns_gate_up = gated = len(outputs) == 2
    expected = torch.cat(weights)
    dequantised = torch.full(expected.shape, torch.nan, dtype=torch.bfloat16, device=cuda)
    linear.dequantise(dequantised)
    assert error(dequantised, expected) < 0.003

    def output(both: Tensor) -> Tensor:
        return silu_and_mul(both) if gated else both

    two = torch.tensor(2.0)
    for m in (1, 9, 18, 25, 40):
        configs = [config for config in linear.kernel_configs(m) if linear.small_m(config)]
        assert configs
        with ThreadPoolExecutor() as pool:
            assert all(pool.map(linear.compiles, configs))
        for config in configs:
            x = unlike_rows(m, ins, cuda)
            gemm = output(x.double() @ expected.T)
            assert worst_row(linear(x, config), gemm) < 0.005
            after_norm = output(normed(x, two, EPS) @ expected.T)
            assert worst_row(linear(unnormed(x), config), after_norm) < 0.005
            if not gated:
                residual = unlike_rows(m, sum(outputs), cuda)
                weight = draw(sum(outputs), device=cuda).bfloat16()
                total, unfinished = linear.add_normed(x, residual, weight, EPS, config)
                assert worst_row(total, residual.double() + gemm) < 0.005
                squares = unfinished.squares.double().sum(-1, keepdim=True)
                factor = (squares / total.shape[1] + EPS).rsqrt()
                assert worst_row(unfinished.weighted * factor, normed(total, weight, EPS)) < 0.005


def test_int4_on_a_cpu_takes_zero_points() -> None:
    module, weight = quantised(64, 256, symmetric=False, device=CPU)
    x = draw(5, 256).bfloat16()
    assert error(pick("int4", CPU, SCHEME).build([module])(x), x.double() @ weight.T) < 0.006


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


@pytest.mark.skipif(
    dense_linear(CPU, torch.bfloat16) is not Prepacked, reason="this CPU has no oneDNN bfloat16"
)
@pytest.mark.parametrize(("size", "index"), CASES)
def test_prepacked_against_float64(size: str, index: int) -> None:
    outputs, ins = SHAPES[size][index]
    linears = [dense(outs, ins) for outs in outputs]
    weight = torch.cat([one.weight for one in linears]).double()
    fused = Prepacked(linears)
    for m in (1, 18, 152):
        x = draw(m, ins).bfloat16()
        assert error(fused(x), x.double() @ weight.T) < 0.006


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("index", range(4))
def test_fp8_against_float64(index: int, fused: bool, cuda: torch.device) -> None:
    if why := KERNELS["fp8"].unmet(cuda, None):
        pytest.skip(f"kernel fp8 {why}")
    outputs, ins = SHAPES["4b"][index]
    linears = [dense(outs, ins, cuda) for outs in outputs]
    weight = torch.cat([one.weight for one in linears]).double()
    fp8 = KERNELS["fp8"].build(linears)
    fp8.accepts_gate_up = fused
    for m in (1, 18, 152):
        x, both = (draw(m, columns, device=cuda).bfloat16() for columns in (ins, 2 * ins))
        assert error(fp8(x), x.double() @ weight.T) < LARGEST_ERROR["fp8"]
        if fused:
            mlp = silu_and_mul(both.double())
            assert error(fp8(both), mlp @ weight.T) < LARGEST_ERROR["fp8"]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_and_back(bits: int, dim: int) -> None:
    codes = torch.randint(2**bits, (64, 32))
    assert torch.equal(unpacked(packed(codes, bits, dim), bits, dim).long(), codes)
