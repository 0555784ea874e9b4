"""Page images to tensors: equal to transformers' processor, and to pages one by one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from threading import Event

import numpy as np
import pypdfium2
import pytest
import torch
from PIL import Image

from colqwen_lab.errors import BadInput
from colqwen_lab.model import inputs
from colqwen_lab.model.decode import to_rgb
from colqwen_lab.model.inputs import (
    TINY_TOKENIZER,
    Reader,
    digest,
    page_batch,
    page_files,
    prompt_ids,
    read_tokenizer,
)
from colqwen_lab.model.network import ColQwen3, ColQwen3Config
from colqwen_lab.model.preprocess import patches, visual_tokens_of
from colqwen_lab.model.synthetic import page

CONFIG = ColQwen3Config.of_size("tiny")


@pytest.mark.parametrize(
    ("size", "visual", "tokens"),
    [
        ((1240, 1754), 1260, 1271),
        ((1654, 2339), 1260, 1271),
        ((1275, 1650), 1240, 1251),
        ((1280, 720), 880, 891),
        ((512, 512), 256, 267),
    ],
)
def test_token_counts_are_the_published_ones(
    size: tuple[int, int], visual: int, tokens: int
) -> None:
    assert visual_tokens_of(*size, CONFIG) == visual
    assert len(prompt_ids(None, ColQwen3Config.of_size("4b"), visual)) == tokens


def test_the_prompt_is_the_published_one() -> None:
    """Without a tokenizer its places are taken, and those of the image are known."""
    tokenizer = read_tokenizer(TINY_TOKENIZER)
    ids = prompt_ids(tokenizer, CONFIG, 3)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|>"
        "<|vision_end|>Describe the image.<|im_end|><|endoftext|>"
    )
    assert ids[-2:] == [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    start, image, end = (
        CONFIG.vision_start_token_id,
        CONFIG.image_token_id,
        CONFIG.vision_end_token_id,
    )
    assert [token for token in ids if token in (start, image, end)] == [
        start,
        image,
        image,
        image,
        end,
    ]
    assert prompt_ids(None, CONFIG, 3)[3:8] == [start, image, image, image, end]


def test_the_image_s_tokens_are_marked() -> None:
    images = [page(0).resize(size) for size in ((96, 96), (64, 224))]
    batch = page_batch(images, read_tokenizer(TINY_TOKENIZER), CONFIG, 20)
    types, grids = batch["mm_token_type_ids"], batch["image_grid_thw"]
    assert types.sum(1).tolist() == (grids.prod(1) // 4).tolist()
    assert types.tolist() == (batch["input_ids"] == CONFIG.image_token_id).int().tolist()


def test_a_batch_of_several_sizes_equals_each_page_alone() -> None:
    torch.manual_seed(0)
    model = ColQwen3(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.1)
    tokenizer = read_tokenizer(TINY_TOKENIZER)
    images = [
        page(number).resize(size) for number, size in enumerate([(160, 96), (64, 224), (96, 96)])
    ]
    batch = page_batch(images, tokenizer, CONFIG, 20)
    together = model(**batch).embeddings
    for image, row, mask in zip(images, together, batch["attention_mask"].bool(), strict=True):
        alone = model(**page_batch([image], tokenizer, CONFIG, 20)).embeddings[0]
        torch.testing.assert_close(row[mask], alone, atol=2e-5, rtol=0)
        assert not row[~mask].any()


def test_modes_of_an_image() -> None:
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1))
    plain = np.asarray(to_rgb(Image.fromarray(grey)))
    deep = to_rgb(Image.fromarray(grey.astype(np.uint16) * 257))
    assert np.array_equal(np.asarray(deep), plain)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(grey.astype(np.int32) * 257))), plain)
    clear = to_rgb(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30])
    assert to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    assert to_rgb(Image.new("CMYK", (8, 8), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (8, 4))
    turned.getexif()[0x0112] = 6
    assert to_rgb(turned).size == (4, 8)
    for unknown in (Image.new("F", (8, 8)), Image.fromarray(grey.astype(np.int32))):
        with pytest.raises(ValueError, match="the value of white is unknown"):
            to_rgb(unknown)


@pytest.mark.parametrize("loaders", [1, 3])
def test_a_folder_goes_on_past_what_it_cannot_read(tmp_path: Path, loaders: int) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "a-dot.png")
    (tmp_path / "b-broken.png").write_bytes(b"\x89PNG no")
    document = pypdfium2.PdfDocument.new()
    document.new_page(72, 144), document.new_page(9, 72 * 200), document.new_page(72, 72)
    document.save(tmp_path / "c.pdf")
    Image.new("RGB", (20_000, 300)).save(tmp_path / "e-panorama.png")
    Image.new("RGB", (20_000, 10)).save(tmp_path / "f-line.png")
    Image.new("1", (10_000, 9000)).save(tmp_path / "g-bomb.png")
    frames = [Image.new("L", (40, 30)), Image.new("L", (30, 40))]
    frames[0].save(tmp_path / "h.tiff", save_all=True, append_images=frames[1:])
    (tmp_path / "notes.txt").write_text("no page")
    encrypted(tmp_path / "d-encrypted.pdf")
    (tmp_path / "i-gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "j.png").mkdir()
    os.mkfifo(tmp_path / "k.png")
    (tmp_path / "l.HEIC").touch()
    (tmp_path / "m.jxl").touch()
    left_out = ("j.png/", "l.HEIC", "m.jxl", "notes.txt")
    names = ("b-broken.png", "c.pdf page 2 of 3", "d-encrypted.pdf", "f-line.png", "g-bomb.png")
    skipped: list[str] = []
    files = page_files(tmp_path, skipped.append)
    sizes = [image.size for image in Reader(loaders).pages(files, skipped.append)]
    assert sizes == [(1, 1), (150, 300), (150, 150), (20_000, 300), (40, 30), (30, 40)]
    lines = [line.split(" is skipped: ")[0] for line in skipped]
    assert lines == [*left_out, *names, "i-gone.png", "k.png"]
    assert all("\n" not in line for line in skipped)
    assert "password" in skipped[6].lower()


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    for name in (b"broken\xe9.png", b"caf\xe9.pdf", b"caf\xe9.png"):
        Path(os.fsdecode(bytes(tmp_path / "x")[:-1] + name)).touch()
    broken, pdf, png = page_files(tmp_path, list)
    Image.new("RGB", (3, 3)).save(tmp_path / "x.gif")
    (tmp_path / "x.gif").rename(png)
    document = pypdfium2.PdfDocument.new()
    document.new_page(72, 72)
    document.save(tmp_path / "x.pdf")
    (tmp_path / "x.pdf").rename(pdf)
    skipped: list[str] = []
    pages = list(Reader(1).pages(page_files(tmp_path, skipped.append), skipped.append))
    assert [image.size for image in pages] == [(150, 150), (3, 3)]
    assert [line[:21] for line in skipped] == ["broken.png is skipped"]
    assert digest([broken, png]) != digest([png])


@pytest.mark.parametrize("loaders", [1, 3])
def test_a_file_of_bad_pages_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaders: int
) -> None:
    document = pypdfium2.PdfDocument.new()
    for _ in range(5):
        document.new_page(9, 72 * 200)
    document.save(tmp_path / "a.pdf")
    Image.new("RGB", (1, 1)).save(tmp_path / "b.png")
    monkeypatch.setattr(inputs, "MOST_BAD", 3)
    skipped: list[str] = []
    files = page_files(tmp_path, skipped.append)
    assert len(list(Reader(loaders).pages(files, skipped.append))) == 1
    assert [line[:17] for line in skipped[:3]] == [f"a.pdf page {n} of 5" for n in (1, 2, 3)]
    assert skipped[3:] == ["a.pdf page 4 of 5, with all that follow, is skipped: 3 pages are bad"]


def encrypted(path: Path) -> None:
    """A PDF that needs a password: nobody has the key of its encryption."""
    path.write_bytes(
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n"
        b"trailer<</Root 1 0 R/ID[<00><00>]/Encrypt<</Filter/Standard/V 1/R 2/P -4"
        b"/O<" + b"00" * 32 + b">/U<" + b"00" * 32 + b">>>>>\n%%EOF"
    )


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    def of(folder: str, **files: str) -> str:
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        return digest(sorted((tmp_path / folder).iterdir()))

    same = of("a", x="1", y="2")
    assert of("b", x="1", y="2") == same
    assert (
        len(
            {
                same,
                of("c", x="1", y="3"),
                of("d", x="1", z="2"),
                of("e", x="1"),
                of("f", x="2", y="1"),
            }
        )
        == 5
    )


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"pages must be a folder of images, an image or a PDF, got .*no file and no"
    ):
        page_files(tmp_path / "nowhere", list)
    with pytest.raises(BadInput, match="holds no image and no PDF"):
        page_files(tmp_path, list)
    for budget in (0, 16_385):
        with pytest.raises(BadInput, match=f"visual_tokens must be 1 to 16384, got {budget}"):
            patches(Image.new("RGB", (64, 64)), CONFIG, budget)


def test_a_closed_reader_reads_no_page_that_was_asked_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed, late = Event(), list[int]()

    class Slow:
        def count(self, _: str) -> int:
            return 5

        def page(self, _: str, number: int) -> Image.Image:
            if number:
                late.extend([number] * closed.is_set())
                closed.wait(5)
                raise ValueError("its process ended")
            return Image.new("RGB", (40, 40))

        def close(self) -> None:
            closed.set()
            time.sleep(0.1)

    monkeypatch.setattr(inputs, "Decoder", Slow)
    reader = inputs.Reader(1)
    assert next(reader.pages([Path("a.pdf")], lambda _: None)).size == (40, 40)
    reader.close()
    assert late == []
