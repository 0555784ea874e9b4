"""Execution fast against eager: the same vectors, whatever the padding, the length, the packing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
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
from colqwen_lab.runtime.fast import KINDS, bucket, load_fast, real_first
from colqwen_lab.runtime.linears import Dense, Unnormed, dense_product

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
        found = model.fast(model, inputs) if fast else model(**inputs)
    assert not found.embeddings[inputs["attention_mask"] == 0].any()
    return found.embeddings[inputs["attention_mask"].bool()].float()


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
        found = real_rows(fast, right, fast=True)
        assert least_cosine(found, real_rows(eager, same_texts(right), fast=False)) > 0.9995
        assert torch.equal(found, real_rows(fast, right, fast=True)), "a second call gives the same"


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
    best = dense_product(CPU, torch.bfloat16)
    assert all(type(product) is best for product in loaded.model.fast.products())
    as_torch = load_fast(random_source("base"), CPU, "torch")
    assert all(isinstance(product, Dense) for product in as_torch.model.fast.products())


class Streams:
    """In the place of CUDA's streams: what is asked of them happens at once, on a CPU, and is told."""

    told: ClassVar[list[str]] = []

    def wait_stream(self, other: Any) -> None:
        self.told.append("free")

    def wait_event(self, event: str) -> None:
        self.told.append(f"waited for {event}")

    def record_event(self) -> str:
        return f"event {self.told.count('free')}"


@pytest.mark.parametrize("kinds", [("o",), ("qkv", "o"), KINDS])
def test_weights_dequantised_ahead_multiply_as_packed_ones_do(
    kinds: tuple[str, ...], packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_fast(FolderCheckpoint(packed("auto_round")), CPU, "int4")
    model: Any = loaded.model.fast
    made: list[int] = []

    def dequantise(self: Any, weight: Tensor) -> None:
        made.append(id(self))
        Streams.told.append("written")
        weight.copy_(self(torch.eye(self.in_features, dtype=weight.dtype)).T)

    monkeypatch.setattr(type(model.layers[0].o), "dequantise", dequantise)
    for name, stub in {
        "current_stream": Streams,
        "current_device": int,
        "stream": nullcontext,
    }.items():
        monkeypatch.setattr(
            torch.cuda, name, stub if name == "stream" else lambda stub=stub: stub()
        )
    monkeypatch.setattr(
        "colqwen_lab.runtime.fast._side_stream", lambda device, priority=-1: Streams()
    )
    inputs = padded([18, 17, 19], "left")
    expected = real_rows(loaded.model, inputs, fast=True)
    model.ahead = {3 * bucket(19): kinds}
    Streams.told.clear()
    assert least_cosine(real_rows(loaded.model, inputs, fast=True), expected) > 0.9995
    assert len(made) == len(set(made)) == len(kinds) * len(model.layers)
    # Nothing is written before what reads it is done, and nothing read before it is written: the event of that writing.
    told = Streams.told
    assert [told[at - 1] for at, what in enumerate(told) if what == "written"] == ["free"] * len(
        made
    )
    assert sorted(what for what in told if what.startswith("waited")) == sorted(
        f"waited for event {n + 1}" for n in range(len(made))
    )


@pytest.mark.parametrize(
    ("norming", "shared"),
    [(KINDS, 2), (("o", "gate_up", "down"), 1), (("qkv", "o", "down"), 1), (("o", "down"), 0)],
)
def test_norms_are_shared_out_only_between_two_products_that_can(
    norming: tuple[str, ...],
    shared: int,
    packed: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load_fast(FolderCheckpoint(packed("auto_round")), CPU, "int4")
    model: Any = loaded.model.fast
    inputs = padded([18, 17, 19], "left")
    expected = real_rows(loaded.model, inputs, fast=True)
    able = {id(product) for kind in norming for product in model.of_kind(kind)}
    kernel = type(model.layers[0].o)
    multiplied, left = kernel.forward, []

    def forward(self: Any, x: Tensor | Unnormed) -> Tensor:
        if not isinstance(x, Unnormed):
            return multiplied(self, x)
        assert id(self) in able
        return (
            multiplied(self, x.weighted)
            * (x.squares.mean(-1, keepdim=True) + x.eps).rsqrt().bfloat16()
        )

    def add_normed(
        self: Any, x: Tensor, total: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Unnormed]:
        left.append(self)
        total = total + self(x)
        return total, Unnormed(total * weight, total.float().pow(2), eps)

    monkeypatch.setattr(
        kernel, "norms", lambda self, rows: rows == 3 * bucket(19) and id(self) in able
    )
    monkeypatch.setattr(kernel, "forward", forward)
    monkeypatch.setattr(kernel, "add_normed", add_normed)
    assert least_cosine(real_rows(loaded.model, inputs, fast=True), expected) > 0.9995
    # After the last layer there is no product.
    assert len(left) == shared * len(model.layers) - ("qkv" in norming)


@pytest.fixture
def on_hopper() -> Any:
    """`fast` of awq, random and of middle size, on a GPU that runs the lab's own kernels."""
    if (
        not torch.cuda.is_available()
        or torch.cuda.get_device_capability()[0] != 9
        or find_spec("humming") is None
    ):
        pytest.skip("kernels for Hopper, and humming's layout of weights")
    device = torch.device("cuda")
    return load_fast(
        default_checkpoint(resolve_variant("awq"), "mid", "random", device), device
    ).model.fast


def test_few_rows_share_out_the_norms_in_a_captured_graph(
    on_hopper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(0, 1000, (1, 18), device="cuda")
    model, kernel, shared, found = on_hopper, type(on_hopper.layers[0].o), [], []
    for layer in model.layers:
        for weight in layer.norms:
            weight.data.normal_()

    def add_normed(self: Any, *given: Any, unwrapped: Any = kernel.add_normed) -> Any:
        shared.append(self)
        return unwrapped(self, *given)

    monkeypatch.setattr(kernel, "add_normed", add_normed)
    for own in (False, True):
        for kind in KINDS:
            for product in model.of_kind(kind):
                product.chosen[18] = next(
                    one for one in product.schedules(18) if ("few_rows" in one) is own
                )
        found.append(model._graph(*ids.shape).replay(ids, torch.ones_like(ids)).float())
        assert len(shared) == own * 2 * (2 * len(model.layers) - 1)  # run once, then captured
        model.forget()
    assert least_cosine(*found) > 0.9995


def test_weights_dequantised_ahead_in_a_captured_graph(
    on_hopper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(0, 1000, (32, 18), device="cuda")
    model, found = on_hopper, []
    for kinds in ((), KINDS):
        model.ahead = {ids.numel(): kinds}
        found.append(model._graph(*ids.shape).replay(ids, torch.ones_like(ids)).float())
        model.forget()
    assert least_cosine(*found) > 0.9995
    del model.ahead[ids.numel()]
    new: dict[str, str] = {}
    monkeypatch.setattr("colqwen_lab.runtime.fast._remembered", dict)
    monkeypatch.setattr("colqwen_lab.runtime.fast._remember", new.update)
    before = torch.cuda.memory_allocated()
    model._graph(*ids.shape)
    assert any(key.startswith("ahead ") for key in new)  # timed here, and it did not give up
    model.forget()
    assert (
        torch.cuda.memory_allocated() == before
    )  # choosing leaves nothing behind, a workspace of cuBLAS say


def test_schedules_of_every_number_of_rows_compile_at_once(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own is kept whatever the compiler says, others only where they compile; what is known is not tried anew."""
    loaded = load_fast(FolderCheckpoint(packed("auto_round")), CPU, "int4")
    model: Any = loaded.model.fast
    product = type(model.layers[0].o)
    monkeypatch.setattr(product, "tunable", True)
    monkeypatch.setattr(
        product, "schedules", lambda self, rows: [f"own {rows}", f"bad {rows}", f"good {rows}"]
    )
    monkeypatch.setattr(product, "compiles", lambda self, schedule: schedule.startswith("good"))
    monkeypatch.setattr(
        "colqwen_lab.runtime.fast._key", lambda product, rows: f"{product.in_features} x {rows}"
    )
    tiny = model.layers[0]
    known = {f"{tiny.o.in_features} x 18": "good known", f"{tiny.down.in_features} x 18": "no more"}
    monkeypatch.setattr("colqwen_lab.runtime.fast._remembered", lambda: known)
    model.layers[0].down.chosen[36] = "chosen"
    model.compile([18, 36])
    assert model.candidates["o", 18] == ["good known"]
    assert model.candidates["down", 18] == ["own 18", "good 18"]
    assert model.candidates["o", 36] == ["own 36", "good 36"]
    assert ("down", 36) not in model.candidates
