"""Execution fast against eager: the same vectors at any padding, length and packing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model import synthetic
from colqwen_lab.model.checkpoint import Checkpoint, FolderCheckpoint, default_checkpoint
from colqwen_lab.model.config import resolve_variant
from colqwen_lab.model.inputs import page_batch
from colqwen_lab.model.loading import load
from colqwen_lab.runtime.fast import bucket, load_fast, real_first
from colqwen_lab.runtime.kernels import KERNELS, dense_linear
from colqwen_lab.runtime.linears import Dense, Int4Cpu

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


# Batches of pages by their sides in pixels, and the budget of visual tokens: one page, several
# sizes, pages that fill the budget, and images of one token.
PAGES = [
    ([(300, 400)], 280),
    ([(300, 400), (512, 512), (512, 512), (64, 900)], 280),
    ([(1240, 1754)] * 2, 64),
    ([(32, 32)] * 2, 1),
]


def page_inputs(source: Checkpoint, sides: list[tuple[int, int]], budget: int) -> dict[str, Tensor]:
    images = [synthetic.page(number).resize(side) for number, side in enumerate(sides)]
    return page_batch(images, source.tokenizer, source.config, budget)


@pytest.mark.parametrize("variant", ["base", "awq", "W8A16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pages_are_the_same_as_in_eager(
    variant: str, dtype: str, packed: Callable[[str], Path]
) -> None:
    source = FolderCheckpoint(packed("auto_round")) if variant == "awq" else random_source(variant)
    kernel = "auto" if variant == "base" else "torch"
    eager = load(source, CPU, kernel, dtype).model
    fast = load_fast(source, CPU, kernel, dtype).model
    for sides, budget in PAGES:
        inputs = page_inputs(source, sides, budget)
        expected = real_rows(eager, inputs, fast=False)
        vectors = real_rows(fast, inputs, fast=True)
        if dtype == "bfloat16":
            assert least_cosine(vectors, expected) > 0.9995
        else:  # AutoRound's own module multiplies packed weights in FP16
            within = 1e-4 if variant == "base" else 1e-3
            assert (vectors - expected).abs().max() < within


def test_pages_of_text_among_images() -> None:
    """Each page has the vectors that it has alone."""
    source = random_source("base")
    fast = load_fast(source, CPU, "auto", "float32").model
    images = page_inputs(source, [(300, 400), (512, 512)], 280)
    text, longest = torch.arange(10, 40), images["input_ids"].shape[1]
    texts = {"input_ids": text[None], "attention_mask": torch.ones_like(text)[None]}
    row = functional.pad(text, (longest - len(text), 0))
    ids, mask, image = (
        torch.stack([images[name][0], of_text, images[name][1]])
        for name, of_text in [
            ("input_ids", row),
            ("attention_mask", (row > 0).long()),
            ("mm_token_type_ids", torch.zeros_like(row, dtype=torch.int32)),
        ]
    )
    together = images | {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": image}
    counts = images["attention_mask"].sum(1).tolist()
    first, between, second = real_rows(fast, together, fast=True).split(
        [counts[0], len(text), counts[1]]
    )
    apart = real_rows(fast, images, fast=True)
    assert (torch.cat([first, second]) - apart).abs().max() < 1e-6
    assert (between - real_rows(fast, texts, fast=True)).abs().max() < 1e-6


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


def test_auto_leaves_a_kernel_that_cannot_multiply_a_shape(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(Int4Cpu):
        def __init__(self, linears: Any) -> None:
            super().__init__(linears)
            if len(linears) == 3:
                raise MissingRequirement("kernel int4 cannot multiply 128 x 256")

    monkeypatch.setitem(KERNELS, "int4", KERNELS["int4"]._replace(build=Narrow))
    source = FolderCheckpoint(packed("auto_round"))
    modules = load(source, CPU).engaged
    assert load_fast(source, CPU).engaged == modules
    with pytest.raises(MissingRequirement, match="kernel int4 cannot multiply 128 x 256"):
        load_fast(source, CPU, "int4")


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
    with pytest.raises(MissingRequirement, match="keeps no KV cache; valid otherwise: eager"):
        loaded.model.fast(loaded.model, {"input_ids": ids}, use_cache=True)
    with pytest.raises(
        MissingRequirement, match="kernel modules multiplies packed weights; valid here: auto"
    ):
        load_fast(random_source("base"), CPU, "modules")
    with pytest.raises(BadInput, match="kernel must be auto, "):
        load_fast(random_source("awq"), CPU, "nope")
    best = dense_linear(CPU)
    assert all(type(linear) is best for linear in loaded.model.fast.linears())
    as_torch = load_fast(random_source("base"), CPU, "torch")
    assert all(isinstance(linear, Dense) for linear in as_torch.model.fast.linears())


@pytest.mark.parametrize("pages", [False, True])
def test_to_warm_up_changes_no_result(pages: bool) -> None:
    loaded = load_fast(random_source("base"), CPU)
    images = [synthetic.page(number).resize((96, 64)) for number in range(2)]
    about = loaded.tokenizer, loaded.model.config
    inputs = page_batch(images, *about, 20) if pages else padded([3, 2], "left")
    vectors = real_rows(loaded.model, inputs, fast=True)
    loaded.model.fast.warm_up(inputs)
    assert torch.equal(real_rows(loaded.model, inputs, fast=True), vectors)
    assert loaded.model.fast.tunes
