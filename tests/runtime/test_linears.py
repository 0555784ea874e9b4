"""Every kernel that runs here against float64, on the shapes of the 4B and of `tiny`, on random data."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.measure.environment import pick_device
from colqwen_lab.model.packing import packed, unpacked
from colqwen_lab.runtime.fast import gated
from colqwen_lab.runtime.linears import (
    EIGHT_BIT,
    PACKED_KERNELS,
    Dense,
    Prepacked,
    Unnormed,
    dense_product,
    pick,
)

DEVICE = pick_device()
# Large enough to be seen.
EPS = 0.1
SCHEME = (4, 128)
# Outputs of the linears that are fused, and their input: QKV, O, gate and up, down.
SHAPES = {
    "tiny": [([128, 64, 64], 128), ([128], 128), ([256, 256], 128), ([128], 256)],
    "4b": [([4096, 1024, 1024], 2560), ([2560], 4096), ([9728, 9728], 2560), ([2560], 9728)],
}
# A BF16 result rounds to 2^-9 at the most, on average to 1.7e-3 of the norm; 8-bit activations add their own.
LARGEST_ERROR = {"w4-fp8": 0.035, "w4-int8": 0.015, "fp8": 0.045}
CASES = [(size, index) for size, shapes in SHAPES.items() for index in range(len(shapes))]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def quantised(outputs: int, inputs: int, symmetric: bool) -> Any:
    """A module of AutoRound's with random codes, and its weight [out, in] in float64."""
    if symmetric:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    module = QuantLinear(4, 128, inputs, outputs, False).to(DEVICE)
    module.sym = symmetric
    codes = torch.randint(16, (inputs, outputs), device=DEVICE)
    zeros = torch.full((inputs // 128, outputs), 8, device=DEVICE)
    if not symmetric:
        zeros = torch.randint(1, 16, zeros.shape, device=DEVICE)
    scales = (torch.rand(zeros.shape, device=DEVICE) * 0.01 + 0.002).bfloat16()
    module.qweight, module.scales = packed(codes, 4, 0), scales
    module.qzeros = packed(zeros - int(symmetric), 4, 1)
    weight = (codes - zeros.repeat_interleave(128, 0)).double() * scales.double().repeat_interleave(
        128, 0
    )
    return module, weight.T


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def can(name: str, scheme: tuple[int, int] | None) -> bool:
    return not (PACKED_KERNELS | EIGHT_BIT)[name].unmet(DEVICE, scheme)


@pytest.mark.parametrize(("size", "index"), CASES)
@pytest.mark.parametrize(
    "name", [n for n in [*PACKED_KERNELS, "w4-fp8", "w4-int8"] if can(n, SCHEME)]
)
def test_packed_kernel_against_float64(name: str, size: str, index: int) -> None:
    outputs, inputs = SHAPES[size][index]
    if (size == "tiny" and name in ("humming", "w4-fp8", "w4-int8")) or (
        size == "4b" and name == "modules"
    ):
        pytest.skip("the 4B's shapes for a GPU's kernels, tiny's for AutoRound's own modules")
    made = [quantised(one, inputs, symmetric=True) for one in outputs]
    weight = torch.cat([one for _, one in made])
    product = pick(name, DEVICE, SCHEME).build([module for module, _ in made])
    for rows in (1, 18, 152) if DEVICE.type == "cuda" or size == "tiny" else (1, 18):
        x = draw(rows, inputs).bfloat16()
        assert error(product(x), x.double() @ weight.T) < LARGEST_ERROR.get(name, 0.006)


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row."""
    return float(((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def unlike(rows: int, columns: int) -> Tensor:
    """Random rows, one far larger than the next."""
    return (
        draw(rows, columns) * 2.0 ** (torch.arange(rows, device=DEVICE) % 9 - 4)[:, None]
    ).bfloat16()


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return weight.double() * wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def unnormed(x: Tensor) -> Unnormed:
    """Of x, with weights of two, as a product before leaves it."""
    return Unnormed(2 * x, x.float().pow(2).unflatten(-1, (-1, 64)).sum(-1), EPS)


@pytest.mark.parametrize("index", range(4))
def test_the_lab_s_own_kernels_on_hopper_against_float64(index: int) -> None:
    """Every cut of `few_rows`, one row to the most, gated where two outputs are, norms too; and weights dequantised."""
    if not can("humming", SCHEME) or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("kernels for Hopper, and humming's layout of weights")
    outputs, inputs = SHAPES["4b"][index]
    made = [quantised(one, inputs, symmetric=True) for one in outputs]
    product = pick("humming", DEVICE, SCHEME).build([module for module, _ in made])
    product.gates = len(outputs) == 2
    expected = torch.cat([one for _, one in made])
    dequantised = torch.full(expected.shape, torch.nan, dtype=torch.bfloat16, device=DEVICE)
    product.dequantise(dequantised)
    assert error(dequantised, expected) < 0.003

    def opened(both: Tensor) -> Tensor:
        return gated(both) if product.gates else both

    for rows in (1, 9, 18, 25, 40):
        own = [one for one in product.schedules(rows) if "few_rows" in one]
        assert own
        with ThreadPoolExecutor() as pool:
            assert all(pool.map(product.compiles, own))
        for schedule in own:
            product.chosen[rows] = schedule
            x = unlike(rows, inputs)
            want = opened(x.double() @ expected.T)
            assert worst(product(x), want) < 0.005
            assert product.kernel_for(rows) == "few_rows (W4A16)"
            assert product.norms(rows)
            assert (
                worst(product(unnormed(x)), opened(normed(x, torch.tensor(2.0), EPS) @ expected.T))
                < 0.005
            )
            if not product.gates:
                total, weight = unlike(rows, sum(outputs)), draw(sum(outputs)).bfloat16()
                added, found = product.add_normed(x, total, weight, EPS)
                assert worst(added, total.double() + want) < 0.005
                root = (found.squares.double().sum(-1, keepdim=True) / added.shape[1] + EPS).rsqrt()
                assert worst(found.weighted * root, normed(added, weight, EPS)) < 0.005
        assert product.kernel_for(rows + 1) == product.kernel


def test_int4_on_a_cpu_takes_zero_points() -> None:
    if DEVICE.type != "cpu":
        pytest.skip("a CPU's kernel")
    module, weight = quantised(64, 256, symmetric=False)
    x = draw(5, 256).bfloat16()
    assert error(pick("int4", DEVICE, SCHEME).build([module])(x), x.double() @ weight.T) < 0.006


def dense(outputs: int, inputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False, device=DEVICE, dtype=torch.bfloat16)
    return linear.requires_grad_(False)


def test_dense_keeps_one_copy_of_the_weights() -> None:
    linears = [dense(32, 16), dense(48, 16)]
    weight = torch.cat([one.weight for one in linears])
    product = Dense(linears)
    x = draw(3, 16).bfloat16()
    assert torch.equal(product(x), nn.functional.linear(x, weight))
    storages = {one.weight.untyped_storage().data_ptr() for one in [*linears, product]}
    assert len(storages) == 1
    assert torch.equal(linears[1](x), nn.functional.linear(x, weight[32:]))


@pytest.mark.skipif(dense_product(DEVICE, torch.bfloat16) is not Prepacked, reason="a CPU's kernel")
@pytest.mark.parametrize(("size", "index"), CASES)
def test_prepacked_against_float64(size: str, index: int) -> None:
    outputs, inputs = SHAPES[size][index]
    linears = [dense(one, inputs) for one in outputs]
    weight = torch.cat([one.weight for one in linears]).double()
    product = Prepacked(linears)
    for rows in (1, 18, 152):
        x = draw(rows, inputs).bfloat16()
        assert error(product(x), x.double() @ weight.T) < 0.006


@pytest.mark.skipif(not can("fp8", None), reason="FP8 products need an sm89 GPU")
@pytest.mark.parametrize("index", range(4))
def test_fp8_against_float64(index: int) -> None:
    outputs, inputs = SHAPES["4b"][index]
    linears = [dense(one, inputs) for one in outputs]
    weight = torch.cat([one.weight for one in linears]).double()
    product = EIGHT_BIT["fp8"].build(linears)
    for rows in (1, 18, 152):
        x, both = draw(rows, inputs).bfloat16(), draw(rows, 2 * inputs).bfloat16()
        assert error(product(x), x.double() @ weight.T) < LARGEST_ERROR["fp8"]
        opened = gated(both.double())
        assert error(product(both), opened @ weight.T) < LARGEST_ERROR["fp8"]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_and_back(bits: int, dim: int) -> None:
    codes = torch.randint(2**bits, (64, 32))
    assert torch.equal(unpacked(packed(codes, bits, dim), bits, dim).long(), codes)


def test_auto_is_the_best_that_serves_here() -> None:
    cpu = torch.device("cpu")
    assert pick("auto", cpu, (4, 128)) is PACKED_KERNELS["int4"]
    assert pick("auto", cpu, (8, 128)) is PACKED_KERNELS["modules"]


@pytest.mark.parametrize(
    ("name", "scheme", "says"),
    [
        (
            "fp8",
            None,
            "kernel fp8 needs a CUDA GPU of compute capability 8.9 or newer; valid here: auto$",
        ),
        (
            "humming",
            (4, 128),
            "needs a CUDA GPU of compute capability 7.5 or newer; valid here: auto, int4, modules",
        ),
        (
            "w4-int8",
            (4, 128),
            "needs a CUDA GPU of compute capability 8.0 or newer; valid here: auto, int4, modules",
        ),
        ("w4-fp8", None, "multiplies packed weights"),
        ("fp8", (4, 128), "multiplies 16-bit weights"),
        (
            "int4",
            (8, 128),
            "takes 4 bits in groups of 32, 64, 128 or 256; valid here: auto, modules",
        ),
    ],
)
def test_a_kernel_that_cannot_serve_says_why(name: str, scheme: Any, says: str) -> None:
    with pytest.raises(MissingRequirement, match=says):
        pick(name, torch.device("cpu"), scheme)


def test_unknown_kernel() -> None:
    with pytest.raises(
        BadInput, match="unknown kernel 'x'; valid for fast: auto, humming, int4, modules, fp8"
    ):
        pick("x", torch.device("cpu"), (4, 128))
