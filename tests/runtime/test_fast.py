"""Execution fast against eager: the same vectors at any padding, length and packing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model.checkpoint import Checkpoint, FolderCheckpoint, default_checkpoint
from colqwen_lab.model.config import resolve_variant
from colqwen_lab.model.loading import load
from colqwen_lab.runtime import tune
from colqwen_lab.runtime.fast import bucket, load_fast, real_first
from colqwen_lab.runtime.gemms import KINDS, Paths
from colqwen_lab.runtime.kernels import dense_linear
from colqwen_lab.runtime.linears import Dense, Unnormed

CPU = torch.device("cpu")
# Batches of queries by their real lengths: mixed, one alone, one token, very long.
LENGTHS = [[18, 17, 19], [18], [1], [1, 40, 7], [700, 3]]


def random_source(variant: str) -> Checkpoint:
    return default_checkpoint(resolve_variant(variant), "tiny", "random", CPU)


def padded(lengths: list[int], side: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    longest = max(lengths)
    ids = torch.randint(10, 1500, (len(lengths), longest), generator=generator)
    place = torch.arange(longest)
    real = torch.tensor(lengths)[:, None]
    mask = place >= longest - real if side == "left" else place < real
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def real_rows(model: Any, inputs: dict[str, Tensor], fast: bool) -> Tensor:
    """The vectors of the real tokens, text by text."""
    with torch.no_grad():
        output = model.fast(model, inputs) if fast else model(**inputs)
    assert not output.embeddings[inputs["attention_mask"] == 0].any()
    return output.embeddings[inputs["attention_mask"].bool()].float()


def same_texts(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Right-padded inputs, padded on the left as eager takes them."""
    shifts = inputs["input_ids"].shape[1] - inputs["attention_mask"].sum(1)
    return {
        name: torch.stack([row.roll(int(shift)) for row, shift in zip(rows, shifts, strict=True)])
        for name, rows in inputs.items()
    }


def least_cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).min())


@pytest.mark.parametrize("variant", ["base", "awq", "W3A16", "W8A16G32"])
def test_same_as_eager_in_bfloat16(variant: str, packed: Callable[[str], Path]) -> None:
    source = FolderCheckpoint(packed("auto_round")) if variant == "awq" else random_source(variant)
    eager, fast = (
        load(source, CPU, "auto" if variant == "base" else "torch").model,
        load_fast(source, CPU).model,
    )
    for lengths in LENGTHS:
        left = padded(lengths, "left")
        expected = real_rows(eager, left, fast=False)
        assert least_cosine(real_rows(fast, left, fast=True), expected) > 0.9995
        right = padded(lengths, "right")
        vectors = real_rows(fast, right, fast=True)
        assert least_cosine(vectors, real_rows(eager, same_texts(right), fast=False)) > 0.9995
        assert torch.equal(vectors, real_rows(fast, right, fast=True)), (
            "a second call gives the same"
        )


@pytest.mark.parametrize(("variant", "within"), [("base", 1e-4), ("awq", 1e-3)])
def test_same_as_eager_in_float32(
    variant: str, within: float, packed: Callable[[str], Path]
) -> None:
    """AutoRound's own module multiplies packed weights in FP16, whatever is asked."""
    source = FolderCheckpoint(packed("auto_round")) if variant == "awq" else random_source(variant)
    kernel = "auto" if variant == "base" else "torch"
    eager = load(source, CPU, kernel, "float32").model
    fast = load_fast(source, CPU, kernel, "float32").model
    for lengths in LENGTHS:
        left = padded(lengths, "left")
        assert (
            real_rows(fast, left, fast=True) - real_rows(eager, left, fast=False)
        ).abs().max() < within


@pytest.mark.parametrize("packing", ["auto_round", "auto_gptq", "auto_awq"])
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_every_packing(packing: str, kernel: str, packed: Callable[[str], Path]) -> None:
    source = FolderCheckpoint(packed(packing))
    inputs = padded([18, 5], "left")
    expected = real_rows(
        load(FolderCheckpoint(packed("auto_round")), CPU, "torch").model, inputs, fast=False
    )
    if (packing, kernel) == ("auto_awq", "torch"):
        with pytest.raises(
            MissingRequirement, match="auto_awq"
        ):  # AutoRound's own module does not take it; fast repacks for its own
            load_fast(source, CPU, kernel)
        return
    loaded = load_fast(source, CPU, kernel)
    assert sum(loaded.engaged.values()) == 28
    assert least_cosine(real_rows(loaded.model, inputs, fast=True), expected) > 0.9995


def test_weights_are_there_once() -> None:
    source = random_source("base")
    assert load_fast(source, CPU).weights_bytes == load(source, CPU).weights_bytes
    packed_bytes = load_fast(random_source("awq"), CPU).weights_bytes
    assert packed_bytes == pytest.approx(
        load(random_source("awq"), CPU, "torch").weights_bytes, rel=0.01
    )


@given(st.integers(1, 5000))
def test_bucket_rounds_up_by_less_than_a_sixteenth(tokens: int) -> None:
    assert tokens <= bucket(tokens) < tokens * (1 + 1 / 16)
    assert bucket(bucket(tokens)) == bucket(tokens)


@given(st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1, max_size=4))
def test_real_tokens_come_first_in_their_order(rows: list[list[int]]) -> None:
    for row, places in zip(rows, real_first(torch.tensor(rows)).tolist(), strict=True):
        order = sorted(range(6), key=lambda at: places[at])
        assert order == sorted(range(6), key=lambda at: (1 - row[at], at))


def test_what_it_does_not_do() -> None:
    loaded = load_fast(random_source("base"), CPU)
    ids = torch.zeros((1, 2), dtype=torch.int64)
    with pytest.raises(
        MissingRequirement, match="embeds queries without a KV cache; valid otherwise: eager"
    ):
        loaded.model.fast(loaded.model, {"input_ids": ids}, use_cache=True)
    with pytest.raises(
        MissingRequirement, match="kernel modules multiplies packed weights; valid here: auto"
    ):
        load_fast(random_source("base"), CPU, "modules")
    with pytest.raises(BadInput, match="unknown"):
        load_fast(random_source("awq"), CPU, "nope")
    best = dense_linear(CPU, torch.bfloat16)
    assert all(type(linear) is best for linear in loaded.model.fast.linears())
    as_torch = load_fast(random_source("base"), CPU, "torch")
    assert all(isinstance(linear, Dense) for linear in as_torch.model.fast.linears())


class Streams:
    """Replaces CUDA streams on a CPU: work runs at once, and `log` records the synchronisation."""

    log: ClassVar[list[str]] = []

    def wait_stream(self, other: Any) -> None:
        self.log.append("free")

    def wait_event(self, event: str) -> None:
        self.log.append(f"waited for {event}")

    def record_event(self) -> str:
        return f"event {self.log.count('free')}"


@pytest.mark.parametrize("kinds", [("o",), ("qkv", "o"), KINDS])
def test_dequantise_then_gemm_equals_the_packed_gemm(
    kinds: tuple[str, ...], packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_fast(FolderCheckpoint(packed("auto_round")), CPU, "int4")
    model: Any = loaded.model.fast
    written: list[int] = []

    def dequantise(self: Any, weight: Tensor) -> None:
        written.append(id(self))
        Streams.log.append("written")
        weight.copy_(self(torch.eye(self.in_features, dtype=weight.dtype)).T)

    monkeypatch.setattr(type(model.layers[0].o), "dequantise", dequantise)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Streams())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(
        "colqwen_lab.runtime.gemms.side_stream", lambda device, priority=-1: Streams()
    )
    inputs = padded([18, 17, 19], "left")
    expected = real_rows(loaded.model, inputs, fast=True)
    m = 3 * bucket(19)
    model.prefetched = {m: kinds}
    Streams.log.clear()
    assert least_cosine(real_rows(loaded.model, inputs, fast=True), expected) > 0.9995
    assert len(written) == len(set(written)) == len(kinds) * len(model.layers)
    # A weight is written after the GEMM that reads its buffer, and read after it is written.
    log = Streams.log
    before = [log[at - 1] for at, what in enumerate(log) if what == "written"]
    assert before == ["free"] * len(written)
    waits = sorted(what for what in log if what.startswith("waited"))
    assert waits == sorted(f"waited for event {n + 1}" for n in range(len(written)))
    assert model.engaged(m)["cuBLAS (dequantise-then-GEMM)"] > 0
    assert model.chosen == {f"dequantise-then-GEMM x {m}": "+".join(kinds)}


@pytest.mark.parametrize(
    ("able", "split"),
    [(KINDS, 2), (("o", "gate_up", "down"), 1), (("qkv", "o", "down"), 1), (("o", "down"), 0)],
)
def test_norms_are_split_only_between_two_gemms_that_can(
    able: tuple[str, ...],
    split: int,
    packed: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load_fast(FolderCheckpoint(packed("auto_round")), CPU, "int4")
    model: Any = loaded.model.fast
    inputs = padded([18, 17, 19], "left")
    expected = real_rows(loaded.model, inputs, fast=True)
    kernel = type(model.layers[0].o)
    multiply, unfinished = kernel.forward, []

    def forward(self: Any, x: Tensor | Unnormed, config: str = "") -> Tensor:
        if not isinstance(x, Unnormed):
            return multiply(self, x)
        assert config == "small M"
        factor = (x.squares.mean(-1, keepdim=True) + x.eps).rsqrt()
        return multiply(self, x.weighted) * factor.bfloat16()

    def add_normed(
        self: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, config: str
    ) -> tuple[Tensor, Unnormed]:
        unfinished.append(self)
        total = residual + self(x)
        return total, Unnormed(total * weight, total.float().pow(2), eps)

    m = 3 * bucket(19)
    monkeypatch.setattr(kernel, "small_m", lambda self, config: config == "small M")
    monkeypatch.setattr(kernel, "forward", forward)
    monkeypatch.setattr(kernel, "add_normed", add_normed)
    model.configs = {(kind, m): "small M" if kind in able else "own" for kind in KINDS}
    assert least_cosine(real_rows(loaded.model, inputs, fast=True), expected) > 0.9995
    # No GEMM follows the last layer.
    assert len(unfinished) == split * len(model.layers) - ("qkv" in able)
    small = model.engaged(m)["small-M GEMM (W4A16)"]
    assert small == sum(linear.linears for kind in able for linear in model.of_kind(kind))
    unfinished.clear()
    model.paths = Paths(split_norms=False)
    assert least_cosine(real_rows(loaded.model, inputs, fast=True), expected) > 0.9995
    assert not unfinished


@pytest.fixture
def on_hopper(cuda: torch.device) -> Any:
    """`fast` of awq, random weights of size mid, on a GPU that runs the lab's own kernels."""
    pytest.importorskip("humming")
    if torch.cuda.get_device_capability(cuda)[0] != 9:
        pytest.skip("the lab's 4-bit kernels need a Hopper GPU")
    checkpoint = default_checkpoint(resolve_variant("awq"), "mid", "random", cuda)
    return load_fast(checkpoint, cuda).model.fast


@pytest.mark.gpu
def test_small_m_gemms_split_norms_in_a_captured_graph(
    on_hopper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(0, 1000, (1, 18), device="cuda")
    model, kernel, split, embeddings = on_hopper, type(on_hopper.layers[0].o), [], []
    for layer in model.layers:
        for weight in layer.norms:
            weight.data.normal_()

    def add_normed(self: Any, *values: Any, unwrapped: Any = kernel.add_normed) -> Any:
        split.append(self)
        return unwrapped(self, *values)

    monkeypatch.setattr(kernel, "add_normed", add_normed)
    for own in (False, True):
        for kind in KINDS:
            linear = model.of_kind(kind)[0]
            configs = linear.kernel_configs(18)
            model.configs[kind, 18] = next(
                one for one in configs if (linear.small_m(one) is not None) is own
            )
        embeddings.append(model._graph(*ids.shape).replay(ids, torch.ones_like(ids)).float())
        assert len(split) == own * 2 * (2 * len(model.layers) - 1)  # one run, one capture
        model.forget()
    assert least_cosine(*embeddings) > 0.9995


@pytest.mark.gpu
def test_dequantise_then_gemm_in_a_captured_graph(
    on_hopper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(0, 1000, (32, 18), device="cuda")
    model, embeddings = on_hopper, []
    for kinds in ((), KINDS):
        model.prefetched = {ids.numel(): kinds}
        embeddings.append(model._graph(*ids.shape).replay(ids, torch.ones_like(ids)).float())
        model.forget()
    assert least_cosine(*embeddings) > 0.9995
    del model.prefetched[ids.numel()]
    new: dict[str, str] = {}
    monkeypatch.setattr(tune, "_read", dict)
    monkeypatch.setattr(tune, "_add", new.update)
    before = torch.cuda.memory_allocated()
    model._graph(*ids.shape)
    assert any(key.startswith("dequantise-then-GEMM ") for key in new)  # timed, and not given up
    model.forget()
    assert torch.cuda.memory_allocated() == before  # timing frees all it takes, cuBLAS's included


def test_kernel_configs_of_every_m_compile_at_once(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own config stays, others if they compile; or the cached choice alone."""
    loaded = load_fast(FolderCheckpoint(packed("auto_round")), CPU, "int4")
    model: Any = loaded.model.fast
    kernel = type(model.layers[0].o)
    monkeypatch.setattr(kernel, "tunable", True)
    monkeypatch.setattr(
        kernel, "kernel_configs", lambda self, m: [f"own {m}", f"bad {m}", f"good {m}", "small M"]
    )
    monkeypatch.setattr(kernel, "compiles", lambda self, config: not config.startswith("bad"))
    monkeypatch.setattr(
        kernel, "small_m", lambda self, config: config if config == "small M" else None
    )
    monkeypatch.setattr(
        tune, "_key", lambda linear, m, paths: f"{linear.in_features} x {m} {paths.search}"
    )
    tiny = model.layers[0]
    known = {
        f"{tiny.o.in_features} x 18 True": "good 18",
        f"{tiny.down.in_features} x 18 True": "no longer a candidate",
    }
    monkeypatch.setattr(tune, "_read", lambda: known)
    model.configs["down", 54] = "chosen"
    model.compile([18, 36, 54])
    assert model.candidates["o", 18] == ["good 18"]
    assert model.candidates["down", 18] == ["own 18", "good 18", "small M"]
    assert model.candidates["o", 36] == ["own 36", "good 36", "small M"]
    assert ("down", 54) not in model.candidates
    for paths, expected in {
        Paths(search=False): ["own 18", "small M"],
        Paths(small_m=False, search=False): ["own 18"],
    }.items():
        assert tune.candidates(tiny, [18], paths)["o", 18] == expected
    assert tune.candidates(tiny, [18], Paths(small_m=False))["down", 18] == ["own 18", "good 18"]
