"""Execution `fast` on a GPU: every kernel against float64, and the captured forward."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from colqwen_lab.model.checkpoint import default_checkpoint
from colqwen_lab.model.config import resolve_variant
from colqwen_lab.model.inputs import page_batch
from colqwen_lab.model.loading import load
from colqwen_lab.model.preprocess import pixels_of, resized
from colqwen_lab.model.synthetic import page
from colqwen_lab.runtime.fast import (
    KINDS,
    attended,
    heads_of,
    load_fast,
    silu_and_mul,
)
from colqwen_lab.runtime.kernels import KERNELS, pick
from colqwen_lab.runtime.linears import DEQUANTISE, is_small_m
from colqwen_lab.runtime.tune import Paths
from tests.runtime.test_fast import least_cosine, padded, real_rows
from tests.runtime.test_linears import SCHEME, dense, draw, error, quantised

pytestmark = pytest.mark.gpu
# Outputs of the linears that are fused, and their input.
SHAPE = [1024, 256, 256], 1024
# BF16 results round to 2^-9, on average 1.7e-3 of the norm; 8-bit activations add their own error.
LARGEST_ERROR = {"humming": 0.006, "w4-fp8": 0.035, "w4-int8": 0.015, "fp8": 0.045}


def packed_linear(name: str, cuda: torch.device, shape: Any) -> tuple[Any, Tensor]:
    """A fused linear of packed weights, and its weight [out, in] in float64."""
    if why := KERNELS[name].unmet(cuda, SCHEME):
        pytest.skip(f"kernel {name} {why}")
    outputs, ins = shape
    pairs = [quantised(outs, ins, symmetric=True, device=cuda) for outs in outputs]
    modules, weights = zip(*pairs, strict=True)
    return pick(name, cuda, SCHEME)(modules), torch.cat(weights)


def require_hopper(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability(cuda)[0] != 9:
        pytest.skip("the small-M GEMM needs a Hopper GPU")


@pytest.mark.parametrize("name", ["humming", "w4-fp8", "w4-int8"])
def test_packed_kernel_against_float64(name: str, cuda: torch.device) -> None:
    linear, weight = packed_linear(name, cuda, SHAPE)
    for m in (1, 152):
        x = draw(m, SHAPE[1], device=cuda).bfloat16()
        assert error(linear(x), x.double() @ weight.T) < LARGEST_ERROR[name]


def test_a_weight_is_dequantised_exactly(cuda: torch.device) -> None:
    linear, weight = packed_linear("humming", cuda, SHAPE)
    m = SHAPE[1]
    assert DEQUANTISE in linear.kernel_configs(m)
    assert DEQUANTISE not in linear.kernel_configs(64)
    linear.configs[m] = DEQUANTISE
    assert torch.equal(linear(torch.eye(m, device=cuda).bfloat16()), weight.T.bfloat16())


@pytest.mark.parametrize(
    ("outputs", "ins", "sizes"),
    [
        ([1024], 1024, (1, 9, 25, 40)),
        ([1024, 1024], 1024, (1, 9, 25, 40)),
        ([2560], 9728, (18,)),
        ([9728, 9728], 2560, (18,)),
    ],
)
def test_small_m_gemm_against_float64(
    outputs: list[int], ins: int, sizes: tuple[int, ...], cuda: torch.device
) -> None:
    """Every small-M GEMM on rows of very different sizes, with SiLU-and-mul of gate/up."""
    require_hopper(cuda)
    linear, weight = packed_linear("humming", cuda, (outputs, ins))
    linear.gated = len(outputs) == 2
    configs = [(m, one) for m in sizes for one in linear.kernel_configs(m) if is_small_m(one)]
    assert {m for m, _ in configs} == {*sizes}
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(lambda pair: linear.compiles(pair[1]), configs))
    for m, config in configs:
        factors = 2.0 ** (torch.arange(m, device=cuda) % 9 - 4)
        x = (draw(m, ins, device=cuda) * factors[:, None]).bfloat16()
        expected = x.double() @ weight.T
        expected = silu_and_mul(expected) if linear.gated else expected
        linear.configs[m] = config
        errors = (linear(x) - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert errors.max() < 0.005


@pytest.mark.parametrize("fused", [True, False])
def test_fp8_against_float64(fused: bool, cuda: torch.device) -> None:
    if why := KERNELS["fp8"].unmet(cuda, None):
        pytest.skip(f"kernel fp8 {why}")
    ins = 2560
    linears = [dense(outs, ins, cuda) for outs in (1024, 512)]
    weight = torch.cat([one.weight for one in linears]).double()
    fp8: Any = pick("fp8", cuda, None)(linears)
    fp8.accepts_gate_up = fused
    for m in (1, 152):
        x, both = (draw(m, columns, device=cuda).bfloat16() for columns in (ins, 2 * ins))
        assert error(fp8(x), x.double() @ weight.T) < LARGEST_ERROR["fp8"]
        if fused:
            mlp = silu_and_mul(both.double())
            assert error(fp8(both), mlp @ weight.T) < LARGEST_ERROR["fp8"]


@pytest.mark.parametrize(("batch", "tokens"), [(2, 9), (2, 40), (64, 18)])
def test_short_attention_equals_attention_of_pytorch(
    batch: int, tokens: int, cuda: torch.device
) -> None:
    from colqwen_lab.runtime.triton_kernels import attend_short

    heads, size = (8, 2, 2), 128
    qkv = draw(batch, tokens, sum(heads) * size, device=cuda).bfloat16()
    norms = [draw(size, device=cuda).bfloat16() for _ in range(2)]
    angles = draw(tokens, 1, size // 2, device=cuda).repeat(1, 1, 2)
    rotary = angles.cos().bfloat16(), angles.sin().bfloat16()
    parts = heads_of(qkv, [count * size for count in heads], *norms, 1e-6, *rotary)
    expected = attended(*parts).double()
    assert error(attend_short(qkv, 2, norms, 1e-6, rotary), expected) < 0.01


@pytest.fixture(scope="module")
def awq(cuda: torch.device) -> Any:
    """`fast` of awq, random weights of size mid."""
    if why := KERNELS["humming"].unmet(cuda, SCHEME):
        pytest.skip(f"kernel humming {why}")
    checkpoint = default_checkpoint(resolve_variant("awq"), "mid", "random", cuda)
    return load_fast(checkpoint, cuda).model.fast


@torch.no_grad()
def test_small_m_gemms_in_a_captured_forward(awq: Any, cuda: torch.device) -> None:
    require_hopper(cuda)
    ids = torch.randint(0, 1000, (1, 18), device=cuda)
    embeddings = []
    for small in (False, True):
        for kind in KINDS:
            linear = awq.of_kind(kind)[0]
            of_m = linear.kernel_configs(18)
            linear.configs[18] = next(one for one in of_m if is_small_m(one) is small)
        assert list(awq.engaged(18)) == ["small-M GEMM (W4A16)" if small else "humming (W4A16)"]
        embeddings.append(awq.replay(ids, torch.ones_like(ids), 18).float())
        awq.forget()
    assert least_cosine(*embeddings) > 0.9995


@torch.no_grad()
def test_timing_chooses_and_frees_its_memory(
    awq: Any, cuda: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("COLQWEN_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(awq, "paths", Paths(small_m=False, search=False))
    ids = torch.randint(0, 1000, (1, 18), device=cuda)
    awq.replay(ids, torch.ones_like(ids), 21)
    for kind in KINDS:
        linear = awq.of_kind(kind)[0]
        assert linear.configs[21] == linear.kernel_configs(21)[0]
    awq.forget()
    before = torch.cuda.memory_allocated()
    monkeypatch.setattr(awq, "paths", Paths())
    awq.replay(ids, torch.ones_like(ids), 20)
    assert {name for name in awq.chosen if name.endswith("x 20")} == {f"{k} x 20" for k in KINDS}
    awq.forget()
    assert torch.cuda.memory_allocated() == before


def test_base_equals_eager(cuda: torch.device) -> None:
    """At two lengths, so that the compiled functions see a second M."""
    source = default_checkpoint(resolve_variant("base"), "tiny", "random", cuda)
    eager, fast = load(source, cuda).model, load_fast(source, cuda).model
    for lengths in ([18, 17, 19], [1, 40, 7]):
        inputs = {name: value.to(cuda) for name, value in padded(lengths, "left").items()}
        vectors = real_rows(fast, inputs, fast=True)
        assert least_cosine(vectors, real_rows(eager, inputs, fast=False)) > 0.9995
        assert torch.equal(vectors, real_rows(fast, inputs, fast=True))


@pytest.mark.parametrize("variant", ["base", "awq"])
@torch.no_grad()
def test_pages_equal_eager(variant: str, cuda: torch.device) -> None:
    """Pages of two sizes, of which one twice."""
    source = default_checkpoint(resolve_variant(variant), "mid", "random", cuda)
    eager, fast = load(source, cuda, "auto").model, load_fast(source, cuda).model
    images = [
        page(number).resize(size) for number, size in enumerate([(640, 400)] * 2 + [(96, 64)])
    ]
    inputs = page_batch(images, None, eager.config, 256, cuda)
    vectors = real_rows(fast, inputs, fast=True)
    assert least_cosine(vectors, real_rows(eager, inputs, fast=False)) > 0.9995
    if variant == "awq":
        assert any(name.startswith("qkv x ") for name in fast.fast.chosen)


@torch.no_grad()
def test_pages_are_resized_on_a_gpu_as_by_pillow(cuda: torch.device) -> None:
    image, size = page(1).resize((1240, 1754)), (1344, 960)
    levels = (
        pixels_of(image, size).int() - resized(pixels_of(image).to(cuda), size).cpu().int()
    ).abs()
    assert levels.max() <= 1
    assert (levels > 0).float().mean() < 0.001
