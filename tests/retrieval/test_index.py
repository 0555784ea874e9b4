"""Index formats against float64 scoring, their bytes, and the files of an index."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from colqwen_lab.errors import BadInput
from colqwen_lab.retrieval import index as module
from colqwen_lab.retrieval.index import Format, Index, append, kernels_of, pooled, read, scores

NAMES = [
    *("bfloat16", "float16", "int8", "binary", "hamming", "pool3", "dims128"),
    *("int8-pool2", "binary-pool3-dims100"),
]


def vectors(count: int, seed: int, width: int = 320) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, width, generator=generator), dim=-1)


PAGES = [vectors(count, seed) for seed, count in enumerate([40, 1, 2, 17])]
# Query vectors are of 16 bits; both of its types hold these.
QUERIES = [vectors(count, 100 + seed).bfloat16().float() for seed, count in enumerate([5, 1])]
IDS = ["a", "b", "ü c", "d"]


def expected(name: str, queries: list[Tensor], pages: list[Tensor]) -> Tensor:
    """Scores by a double loop in float64 over what the format keeps."""
    form = Format.parse(name)
    rows = []
    for query in queries:
        q = query.double()
        if form.dims:
            q = normalize(q[:, : form.dims], dim=-1).bfloat16().double()
        if form.values == "hamming":
            q = torch.where(q >= 0, 1.0, -1.0).double() / q.shape[1] ** 0.5
        row = []
        for page in pages:
            p = pooled(page, form.pool).double()
            if form.dims:
                p = normalize(p[:, : form.dims], dim=-1)
            if form.values == "int8":
                scale = (p.abs().amax(1, keepdim=True) / 127).half().double()
                p = (p / scale).round().clamp(-127, 127) * scale
            elif form.values in ("binary", "hamming"):
                p = torch.where(p >= 0, 1.0, -1.0).double() / p.shape[1] ** 0.5
            else:
                p = p.to(getattr(torch, form.values)).double()
            row.append(sum(max(float(a @ b) for b in p) for a in q))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_vectors", [1, 30, 10**6])
def test_scores_are_exact_for_the_format(
    name: str, chunk_vectors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk_vectors * 4 * 320)
    result = Index.build(Format.parse(name), PAGES, IDS).scores(QUERIES)
    assert result.shape == (2, 4)
    # A code or a sign may fall on the other side where float32 rounds: values are near 1.
    assert (result - expected(name, QUERIES, PAGES)).abs().max() < 2e-5


def check_kernel(name: str, device: str) -> None:
    """The kernel on pages of many lengths and on many query tokens, against torch on the CPU."""
    pages = [vectors(count, seed) for seed, count in enumerate([130, 1, 0, 64, 65])]
    queries = [vectors(count, 100 + seed).bfloat16() for seed, count in enumerate([20, 120, 1])]
    built = Index.build(Format.parse(name), pages, ["a", "b", "c", "d", "e"])
    for some in (queries, queries[:1], queries[2:]):
        result = built.to(device).scores(some, "triton").cpu()
        assert torch.equal(result[:, 2], torch.full([len(some)], -torch.inf))
        torch.testing.assert_close(result, built.scores(some, "torch"), atol=5e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_exact(name: str, cuda: torch.device) -> None:
    assert kernels_of(cuda) == ("triton", "torch")
    check_kernel(name, "cuda")


@pytest.mark.skipif(
    not (os.environ.get("TRITON_INTERPRET") and find_spec("triton")),
    reason="needs triton and TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_exact_where_triton_interprets_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    builder, tl = interpreter.InterpreterBuilder, interpreter.tl
    cast, dot = builder.cast_impl, builder.create_dot

    # The interpreter takes the bits of bfloat16 for a whole number.
    def from_float32(self: Any, source: Any, kind: Any) -> Any:
        wide = source if source.dtype.scalar.is_floating() else cast(self, source, tl.float32)
        return cast(self, wide, kind) if kind.scalar == tl.bfloat16 else cast(self, source, kind)

    def in_float32(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, cast(self, a, tl.float32), cast(self, b, tl.float32), *rest)

    monkeypatch.setattr(builder, "cast_impl", from_float32)
    monkeypatch.setattr(builder, "create_dot", in_float32)
    check_kernel(name, "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read_and_written(name: str) -> None:
    assert Format.parse(name).name == name
    assert Format.parse(name.upper()) == Format.parse(name)


@pytest.mark.parametrize(
    "name", ["", "int4", "pool", "pool0", "dims0", "int8-int8", "int8,binary", "pool99999"]
)
def test_another_name_is_one_line(name: str) -> None:
    with pytest.raises(BadInput, match="format must be bfloat16, float16, int8, binary, hamming"):
        Format.parse(name)


def test_what_cannot_be_an_index() -> None:
    with pytest.raises(BadInput, match="at least one page"):
        Index.build(Format(), [], [])
    with pytest.raises(BadInput, match="dims must be 1 to 320, got 321"):
        Index.build(Format(dims=321), PAGES, IDS)


def test_bytes_of_a_page() -> None:
    """A page of 1,260 vectors of 320 values, as the docs count it; the rest is header and id."""
    page = vectors(1260, 0)
    plain = {"bfloat16": 640, "int8": 322, "binary": 40, "dims128": 256}
    for name, vector_bytes in plain.items():
        found = Index.build(Format.parse(name), [page], ["page"]).page_bytes
        assert 0 < found - 1260 * vector_bytes < 600
    assert Index.build(Format(pool=3), [page], ["page"]).page_bytes - 420 * 640 < 600


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_its_pages_and_a_header(name: str, tmp_path: Path) -> None:
    built = Index.build(Format.parse(name), PAGES, IDS)
    header = append(tmp_path, built).stat().st_size - built.page_bytes * len(PAGES)
    assert 0 < header < 600


# ---------------------------------------------------------------- pooling and bits


def test_factor_one_is_the_identity() -> None:
    assert torch.equal(pooled(PAGES[0], 1), PAGES[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(2, 40), st.integers(0, 5))
def test_pooled_vectors_are_unit_vectors(count: int, factor: int, seed: int) -> None:
    result = pooled(vectors(count, seed, 8), factor)
    assert 1 <= len(result) <= -(-count // factor)
    assert (result.norm(dim=-1) - 1).abs().max() < 1e-5


def test_duplicates_fall_together() -> None:
    page = vectors(2, 0).repeat_interleave(4, 0)
    result = pooled(page, 2)
    assert len(result) == 2
    assert {tuple(row) for row in (result @ vectors(2, 0).T > 0.9999).tolist()} == {
        (True, False),
        (False, True),
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4))
def test_int8_is_within_half_a_step(values: list[float]) -> None:
    page = torch.tensor([values])
    stored = Format("int8").store(page)
    back = Format("int8").codes(stored["vectors"], 4).float() * stored["scales"]
    largest = float(page.abs().max())
    # Half a step, and the scale's own rounding to 16 bits; below its range values become zero.
    assert (back - page).abs().max() <= largest * (0.5 / 127 + 2**-10) + 127 * 2**-24


def test_a_zero_counts_as_positive() -> None:
    zero = torch.zeros(1, 320)
    built = Index.build(Format("binary"), [zero], ["zero"])
    ones = torch.full((1, 320), 320**-0.5)
    assert float(built.scores([ones])) == pytest.approx(1, abs=2e-4)  # a query of 16 bits


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["bfloat16", "int8", "binary-pool3-dims100"])
def test_a_folder_gives_back_what_was_appended(name: str, tmp_path: Path) -> None:
    folder, form = tmp_path / "deep" / "index", Format.parse(name)
    whole = Index.build(form, PAGES, IDS, model="awq", weights="w")
    for part in (slice(0, 3), slice(3, 4)):
        append(folder, Index.build(form, PAGES[part], IDS[part], model="awq", weights="w"))
    shards = read(folder)
    assert [shard.page_ids for shard in shards] == [("a", "b", "ü c"), ("d",)]
    assert torch.equal(scores(shards, QUERIES), whole.scores(QUERIES))
    assert shards[0].about == {"model": "awq", "weights": "w"}


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    append(tmp_path, Index.build(Format(), PAGES[:1], IDS[:1], model="awq"))
    for wrong, message in [
        (Index.build(Format("int8"), PAGES[1:], IDS[1:], model="awq"), "format bfloat16, got int8"),
        (Index.build(Format(), PAGES[1:], IDS[1:], model="base"), "model awq, got base"),
        (Index.build(Format(), PAGES[:2], IDS[:2], model="awq"), "already holds page a"),
        (Index.build(Format(), [vectors(3, 0, 8)], ["z"], model="awq"), "320, got 8"),
    ]:
        with pytest.raises(BadInput, match=message):
            append(tmp_path, wrong)
    assert [shard.page_ids for shard in read(tmp_path)] == [("a",)]


def test_a_torn_or_foreign_file_is_one_line(tmp_path: Path) -> None:
    path = append(tmp_path, Index.build(Format(), PAGES, IDS))
    whole = path.read_bytes()
    for torn in (whole[:-100], whole[:50], b"", b"not an index at all"):
        path.write_bytes(torn)
        with pytest.raises(BadInput, match="is torn, or not an index"):
            read(tmp_path)
    path.write_bytes(module.save({"vectors": torch.zeros(2)}))
    with pytest.raises(BadInput, match="is not an index of colqwen-lab"):
        read(tmp_path)
    path.write_bytes(whole)
    path.rename(tmp_path / module.SHARD.format(1))
    with pytest.raises(BadInput, match="lacks shard-00000"):
        read(tmp_path)


def test_killed_while_it_writes_nothing_is_lost(tmp_path: Path) -> None:
    append(tmp_path, Index.build(Format(), PAGES[:2], IDS[:2]))
    if (child := os.fork()) == 0:
        os.fsync = lambda _: os.kill(os.getpid(), 9)  # type: ignore[assignment]
        append(tmp_path, Index.build(Format(), PAGES[2:], IDS[2:]))
    assert os.waitpid(child, 0)[1] == 9
    assert [shard.page_ids for shard in read(tmp_path)] == [("a", "b")]
    append(tmp_path, Index.build(Format(), PAGES[2:], IDS[2:]))
    assert [shard.page_ids for shard in read(tmp_path)] == [("a", "b"), ("ü c", "d")]
