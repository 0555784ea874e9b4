from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model.decode import Decoder
from colqwen_lab.model.inputs import TINY_TOKENIZER, read_tokenizer
from colqwen_lab.model.loading import Loaded
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.runtime import batches as module
from colqwen_lab.runtime.batches import Batches, Pages, query_batches

CPU = torch.device("cpu")


def make(tiny: Loaded, batch: int, texts: str = "report", samples: int = 64) -> Batches:
    return query_batches(tiny.model.config, tiny.tokenizer, batch, texts, samples, CPU)


@pytest.mark.parametrize(
    ("batch", "count", "tokens"), [(1, 64, 18), (8, 8, 18), (64, 2, 19), (100, 2, 19)]
)
def test_report_queries(tiny: Loaded, batch: int, count: int, tokens: int) -> None:
    made = make(tiny, batch)
    assert len(made.inputs) == count
    assert made.workload.tokens == tokens
    assert all(
        inputs["input_ids"].shape == inputs["attention_mask"].shape for inputs in made.inputs
    )
    assert all(inputs["input_ids"].shape[0] == batch for inputs in made.inputs)
    masks = torch.cat([inputs["attention_mask"].flatten() for inputs in made.inputs])
    assert made.workload.padded_share == pytest.approx(1 - masks.float().mean().item(), abs=1e-6)
    # 0 to 9 in the first batch of eight: all of one length; padding starts where lengths differ.
    assert made.inputs[0]["attention_mask"].all() == (batch <= 8)


def test_queries_are_distinct(tiny: Loaded) -> None:
    rows = {tuple(row.tolist()) for inputs in make(tiny, 512).inputs for row in inputs["input_ids"]}
    assert len(rows) == 1024


def test_natural_queries_are_padded_more(tiny: Loaded) -> None:
    assert make(tiny, 8, "natural").workload.padded_share > 0.2


def test_samples_reach_the_batches(tiny: Loaded) -> None:
    assert len(make(tiny, 8, samples=16).inputs) == 2
    assert len(make(tiny, 8, samples=800).inputs) == 100


def test_without_a_tokenizer_lengths_equal_the_report(tiny: Loaded) -> None:
    config = ColQwen3Config.of_size("4b")
    drawn = query_batches(config, None, 100, "report", 64, CPU)
    known = make(tiny, 100)
    assert drawn.workload.tokens == known.workload.tokens
    assert drawn.workload.padded_share == known.workload.padded_share
    assert drawn.workload.texts == "random ids at the report's lengths"
    assert drawn.inputs[0]["input_ids"].max() < config.text_config.vocab_size
    with pytest.raises(MissingRequirement, match="valid without: report"):
        query_batches(config, None, 8, "natural", 64, CPU)
    with pytest.raises(BadInput, match="unknown texts 'x'"):
        query_batches(config, None, 8, "x", 64, CPU)


# ---------------------------------------------------------------- pages


def scans(folder: Path, count: int) -> Path:
    for number in range(count):
        Image.new("L", (64, 64 + 32 * (number % 2)), 40 * number).save(folder / f"{number}.png")
    return folder


def pages_of(source: Pages, batch: int, samples: int = 0) -> Batches:
    return source.batches(
        ColQwen3Config.of_size("tiny"), read_tokenizer(TINY_TOKENIZER), batch, samples, CPU
    )


def test_every_batch_size_embeds_all_files(tmp_path: Path) -> None:
    (scans(tmp_path, 5) / "z.png").write_bytes(b"no image")
    pages = Pages(str(tmp_path), visual_tokens=64)
    for batch, count in ((1, 5), (2, 5), (4, 5), (15, 2)):
        made = pages_of(pages, batch)
        assert len(made.inputs) == count
        assert {len(one["input_ids"]) for one in made.inputs} == {batch}
        assert (made.workload.distinct, made.workload.skipped) == (5, 1)
        shades: Counter[float] = Counter()
        for one in made.inputs:
            pages_of_one = one["pixel_values"].split(one["image_grid_thw"].prod(1).tolist())
            shades.update(float(values[0, 0]) for values in pages_of_one)
        assert len(shades) == 5
        assert len(set(shades.values())) == 1, "each page counts the same"
        assert made.workload.index_bytes == pages_of(pages, 5).workload.index_bytes
        assert [line[:6] for line in made.messages] == ["z.png "]


def test_what_is_left_out_of_a_folder_is_counted_and_named(tmp_path: Path) -> None:
    scans(tmp_path, 1)
    (tmp_path / "more").mkdir()
    for number in range(60):
        (tmp_path / f"{number}.txt").touch()
    made = pages_of(Pages(str(tmp_path), visual_tokens=64), 1)
    assert made.workload.skipped == 61
    assert made.messages[0] == (
        "0.txt is skipped: it has no suffix of a PDF or of an image that Pillow reads"
    )
    assert made.messages[50:] == ("11 more files, folders or pages are skipped",)
    (tmp_path / "0.txt").write_bytes((tmp_path / "0.png").read_bytes())
    alone = pages_of(Pages(str(tmp_path / "0.txt"), visual_tokens=64), 1)
    assert (alone.workload.distinct, alone.workload.skipped) == (1, 0)


def test_at_most_64_pages_are_distinct(tmp_path: Path) -> None:
    Image.new("L", (64, 64)).save(
        tmp_path / "scan.tiff",
        save_all=True,
        append_images=[Image.new("L", (64, 64), n) for n in range(1, 70)],
    )
    pages = Pages(str(tmp_path), visual_tokens=64)
    assert [pages_of(pages, batch).workload.distinct for batch in (1, 2)] == [64, 64]


def test_synthetic_pages_fill_two_batches_or_samples() -> None:
    pages = Pages("64x64", visual_tokens=64)
    assert [pages_of(pages, batch).workload.distinct for batch in (2, 1)] == [4, 2]
    assert len(pages_of(pages, 2, samples=6).inputs) == 3


def test_reading_and_processing_is_timed_and_drawing_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading takes 100 s, drawing 1000 s, processing 1 s, and the first page 50 s more."""
    now, cold = [0.0], [50.0]

    def slow(function: Any, seconds: float) -> Any:
        def slowed(*given: Any, **options: Any) -> Any:
            now[0] += seconds
            return function(*given, **options)

        return slowed

    def first_is_cold(*given: Any) -> Any:
        now[0] += 1 + (cold.pop() if cold else 0)
        return patches(*given)

    patches = module.patches
    monkeypatch.setattr(module, "patches", first_is_cold)
    monkeypatch.setattr(module.synthetic, "page", slow(module.synthetic.page, 1000))
    monkeypatch.setattr(Decoder, "page", slow(Decoder.page, 100))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    mine, drawn = Pages(str(scans(tmp_path, 2)), 64), Pages("64x64", 64)
    assert pages_of(mine, 1).workload.preprocess_s == 101
    assert pages_of(drawn, 1).workload.preprocess_s == 1
    cold.append(50)
    (tmp_path / "1.png").unlink()
    assert pages_of(Pages(str(tmp_path), 64), 1).workload.preprocess_s == 151


@pytest.mark.parametrize(
    "size", ["1x1", "31x64", "64x31", "9999x32", "32x6401", "0x0", "10000x10000"]
)
def test_sizes_that_cannot_be_drawn(size: str) -> None:
    valid = "WIDTHxHEIGHT, each 32 to 9999 pixels and one at most 200 times the other"
    with pytest.raises(BadInput, match=f"pages must be {valid}, got {size}$"):
        Pages(size)


def test_the_smallest_and_the_narrowest_that_are_drawn() -> None:
    for size in ("32x32", "32x6400"):
        assert pages_of(Pages(size, visual_tokens=64), 1).workload.distinct == 2


def test_batches_of_one_shape_have_one_number(tiny: Loaded, tmp_path: Path) -> None:
    """Queries of 17 and 18 tokens, with and without padding; pages by their images."""
    assert make(tiny, 8, samples=32).workload.shapes == [0, 1, 2, 2]
    for number, size in enumerate([(64, 64), (64, 64), (128, 32), (32, 128), (64, 96)]):
        Image.new("L", size).save(tmp_path / f"{number}.png")
    assert pages_of(Pages(str(tmp_path), 64), 1).workload.shapes == [0, 0, 1, 2, 3]
