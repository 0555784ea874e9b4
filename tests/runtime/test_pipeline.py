"""Pages from files to stored vectors: every page once, in the order asked, equal to a forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pypdfium2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from colqwen_lab.errors import BadInput
from colqwen_lab.model.inputs import Reader, page_batch, page_files
from colqwen_lab.model.loading import Loaded
from colqwen_lab.model.synthetic import page
from colqwen_lab.runtime.eager import Steps
from colqwen_lab.runtime.pipeline import MOST_WAITING, Pipeline, Prepared, batched

BUDGET = 20
SIZES = [(96, 96), (64, 224), (96, 96), (96, 96), (64, 224), (33, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of three sizes, a broken file among them, and a PDF of two pages."""
    folder = tmp_path_factory.mktemp("pages")
    for number, size in enumerate(SIZES):
        page(number).resize(size).save(folder / f"{number}.png")
    (folder / "2-broken.png").write_bytes(b"\x89PNG no")
    document = pypdfium2.PdfDocument.new()
    document.new_page(72, 72), document.new_page(100, 72)
    document.save(folder / "9.pdf")
    return folder


def pipeline(tiny: Loaded, skipped: list[str], batch_size: int = 2) -> Pipeline:
    steps = Steps(tiny.model, "eager", "lean")
    return Pipeline(tiny, steps, torch.device("cpu"), batch_size, BUDGET, skipped.append)


@pytest.mark.parametrize("loaders", [1, 3])
def test_every_page_is_stored_once_as_a_forward_of_it_alone_embeds_it(
    tiny: Loaded, folder: Path, loaders: int
) -> None:
    skipped: list[str] = []
    stored: dict[int, Tensor] = {}

    def store(numbers: Sequence[int], vectors: Sequence[Tensor]) -> None:
        assert not stored.keys() & set(numbers)
        stored.update(zip(numbers, vectors, strict=True))

    pages, seconds = pipeline(tiny, skipped).run(page_files(folder, list), loaders, store)
    with closing(Reader(1)) as reader:
        images = list(reader.pages(page_files(folder, list), lambda _: None))
    assert pages == len(images) == len(stored) == 8
    assert seconds > 0
    assert [line.split()[0] for line in skipped] == ["2-broken.png"]
    for number, image in enumerate(images):
        batch = page_batch([image], tiny.tokenizer, tiny.model.config, BUDGET)
        with torch.no_grad():
            alone = tiny.model(**batch).embeddings[0]
        assert stored[number].shape == alone.shape
        cosine = cosine_similarity(stored[number].float(), alone.float(), dim=-1)
        assert cosine.min() > 0.9995


def test_each_stage_has_a_time(tiny: Loaded, folder: Path) -> None:
    stored: list[int] = []
    times = pipeline(tiny, []).stages(
        page_files(folder, list), lambda numbers, _: stored.extend(numbers)
    )
    names = ["read_s", "prepare_s", "preprocess_s", "embed_s", "store_s"]
    assert list(times) == names
    assert all(0 < seconds < 10 for seconds in times.values())
    assert sorted(stored) == list(range(8))


def test_a_store_that_fails_ends_the_run(tiny: Loaded, folder: Path) -> None:
    def store(numbers: Sequence[int], vectors: Sequence[Tensor]) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        pipeline(tiny, []).run(page_files(folder, list), 2, store)


def test_a_folder_without_a_readable_page_is_refused(tiny: Loaded, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(BadInput, match="none of 1 files gives a page"):
        pipeline(tiny, []).stages(page_files(tmp_path, list), lambda *_: None)


@given(st.lists(st.integers(1, 9)), st.integers(1, 5))
def test_batches_hold_every_page_once_and_pages_of_one_size(sizes: list[int], most: int) -> None:
    pages = [Prepared(torch.tensor(number), (size, 1)) for number, size in enumerate(sizes)]
    seen, waiting = [], 0
    source = iter(pages)
    for numbers, batch in batched(source, most):
        assert 1 <= len(numbers) <= most
        assert [int(one.pixels) for one in batch] == numbers == sorted(numbers)
        assert len({one.size for one in batch}) == 1
        seen += numbers
        waiting = max(seen) + 1 - len(seen)
        assert waiting <= MOST_WAITING * most + 1
    assert sorted(seen) == list(range(len(sizes)))
