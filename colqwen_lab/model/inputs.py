"""Queries and page images to tensors, as the published processor makes them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from hashlib import sha256
from os.path import isdir, isfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from tokenizers import Tokenizer, normalizers
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.settings import DATA

QUERY_SUFFIX_TOKENS = 10
PAD = "<|endoftext|>"
# The checkpoint folder of the default `tiny`, as `colqwen-lab train-tiny` makes it.
TINY = DATA / "tiny"
TINY_TOKENIZER = TINY / "tokenizer.json"


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        MissingRequirement: the file cannot be read, its pad token is missing, or it rewrites texts.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise MissingRequirement(f"{path} is not a tokenizer.json: {error}") from None
    pad_id(tokenizer)
    if not isinstance(tokenizer.normalizer, normalizers.NFC | None):
        raise MissingRequirement(
            f"{path} has a normalizer {tokenizer.normalizer!r:.100}; valid: NFC, or none"
        )
    # Texts are padded and cut here, never as a file says.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def pad_id(tokenizer: Tokenizer) -> int:
    """The id of the pad token. Raises MissingRequirement if there is none."""
    found = tokenizer.token_to_id(PAD)
    if found is None:
        raise MissingRequirement(f"the tokenizer has no {PAD} token; it is not that of a ColQwen3")
    return found


def encode_queries(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each query, the ten suffix tokens included."""
    suffix = [pad_id(tokenizer)] * QUERY_SUFFIX_TOKENS
    return [
        encoding.ids + suffix
        for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """`(input_ids, attention_mask)`, both [rows, longest row], padding on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


TEXTS = ("report", "natural")


@cache
def _lines(name: str) -> tuple[str, ...]:
    return tuple((DATA / name).read_text(encoding="utf-8").splitlines())


def natural_queries() -> tuple[str, ...]:
    """Queries of several lengths and languages, all distinct."""
    return _lines("queries.txt")


def calibration_texts() -> tuple[str, ...]:
    """Passages and queries to quantise with; none of them is one of `natural_queries`."""
    return _lines("calibration.txt")


def report_query(number: int) -> str:
    """The report's query of this number. Source: its script, as told in the project's facts."""
    return f"Retrieve information about topic number {number}"


def queries(texts: str, count: int) -> list[str]:
    """`count` distinct queries, `report` or `natural`; beyond the list, natural ones are numbered."""
    if texts == "report":
        return [report_query(number) for number in range(count)]
    pool = natural_queries()
    return [
        pool[i % len(pool)] + (f" ({i // len(pool) + 1})" if i >= len(pool) else "")
        for i in range(count)
    ]


VISUAL_TOKENS = 1280
DPI = 150
# How many times as long as it is wide an image may be; the processor takes no longer one.
MOST_TIMES = 200
BEFORE, AFTER = (
    "<|im_start|>user\n<|vision_start|>",
    "<|vision_end|>Describe the image.<|im_end|><|endoftext|>",
)
# How many tokens these are under Qwen's tokenizer.
QWEN_BEFORE, QWEN_AFTER = 4, 7
QWEN_PAD_ID = 151643
# The published processor's bounds: it enlarges an image below 64 visual tokens, and takes none beyond 16,384.
LEAST_TOKENS, MOST_TOKENS = 64, 16_384


def check_visual_tokens(visual_tokens: int) -> int:
    """`visual_tokens`, if it is a budget. Raises BadInput."""
    if not 1 <= visual_tokens <= MOST_TOKENS:
        raise BadInput(
            f"visual_tokens {visual_tokens}; valid: 1 to {MOST_TOKENS}, such as {VISUAL_TOKENS}"
        )
    return visual_tokens


@lru_cache
def processor(
    patch: int, temporal: int, merge: int, visual_tokens: int
) -> Qwen2VLImageProcessorPil:
    """transformers' processor with Qwen3-VL's settings and this budget; areas are in pixels. Raises BadInput."""
    area = (patch * merge) ** 2
    most = check_visual_tokens(visual_tokens)
    return Qwen2VLImageProcessorPil(
        patch_size=patch,
        temporal_patch_size=temporal,
        merge_size=merge,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": min(LEAST_TOKENS, most) * area, "longest_edge": most * area},
    )


def _processor(config: ColQwen3Config, visual_tokens: int) -> Qwen2VLImageProcessorPil:
    vision = config.vision_config
    return processor(
        vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, visual_tokens
    )


def visual_tokens_of(
    width: int, height: int, config: ColQwen3Config, visual_tokens: int = VISUAL_TOKENS
) -> int:
    """The visual tokens that an image of this size in pixels takes under the budget. Raises BadInput."""
    made = _processor(config, visual_tokens)
    return made.get_number_of_image_patches(height, width) // made.merge_size**2


def patches(
    image: Image.Image, config: ColQwen3Config, visual_tokens: int = VISUAL_TOKENS
) -> tuple[Tensor, tuple[int, int, int]]:
    """`(pixel_values [patches, 3 * 2 * 16 * 16] float32, grid (1, rows, columns) of patches)` of an RGB image.

    Raises:
        BadInput: a budget out of bounds.
        ValueError: an image more than 200 times as long as it is wide.
    """
    made = _processor(config, visual_tokens)(images=[image], return_tensors="pt")
    frames, rows, columns = made["image_grid_thw"][0].tolist()
    return made["pixel_values"], (frames, rows, columns)


def prompt_ids(tokenizer: Tokenizer | None, config: ColQwen3Config, image_tokens: int) -> list[int]:
    """Token ids of a page whose image takes `image_tokens`; without a tokenizer plain ids in the place of words."""
    image = [config.image_token_id] * image_tokens
    if tokenizer is None:
        before = [*range(QWEN_BEFORE - 1), config.vision_start_token_id]
        return [*before, *image, config.vision_end_token_id, *range(QWEN_AFTER - 1)]
    before, after = (
        one.ids for one in tokenizer.encode_batch([BEFORE, AFTER], add_special_tokens=False)
    )
    return [*before, *image, *after]


def batch_of(
    pages: Sequence[tuple[Tensor, tuple[int, int, int]]],
    tokenizer: Tokenizer | None,
    config: ColQwen3Config,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The keyword arguments of a forward for images as `patches` gives them: one page an image, padded on the left."""
    merged = config.vision_config.spatial_merge_size**2
    rows = [prompt_ids(tokenizer, config, math.prod(grid) // merged) for _, grid in pages]
    ids, mask = left_padded(rows, rows[0][-1] if tokenizer else QWEN_PAD_ID)
    made = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat([pixels for pixels, _ in pages]),
        "image_grid_thw": torch.tensor([grid for _, grid in pages]),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def page_batch(
    images: Iterable[Image.Image],
    tokenizer: Tokenizer | None,
    config: ColQwen3Config,
    visual_tokens: int = VISUAL_TOKENS,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The keyword arguments of a forward for RGB images: one page an image, padded on the left.

    `input_ids`, `attention_mask`, `mm_token_type_ids` [pages, tokens], `pixel_values` [all patches, 1536],
    `image_grid_thw` [pages, 3]. Raises as `patches` does.
    """
    return batch_of(
        [patches(image, config, visual_tokens) for image in images], tokenizer, config, device
    )


# ---------------------------------------------------------------- a person's own pages


def page_files(source: str | Path) -> list[Path]:
    """The images and PDFs that lie in a folder, known by their suffix, in the order of their names; or the one file.

    Folders within it and files of other suffixes, or none, are no pages. A link that leads nowhere is refused later.

    Raises:
        BadInput: no such file or folder, or one that holds neither.
    """
    path = Path(source)
    known = {*Image.registered_extensions(), ".pdf"}
    if not (isfile(path) or isdir(path)):
        raise BadInput(f"no pages at {path}; valid: a folder of images, an image, or a PDF")
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [
        file
        for file in found
        if file.suffix.lower() in known and (file.is_file() or not file.exists())
    ]
    if not files:
        raise BadInput(
            f"{path} holds no image and no PDF; valid: a folder of images, an image, or a PDF"
        )
    return files


def digest(files: Iterable[Path]) -> str:
    """Twelve hexadecimal digits that the names and contents of files give: the same pages, the same digits."""
    total = sha256()
    for file in files:
        try:
            total.update(file.name.encode() + sha256(file.read_bytes()).digest())
        except OSError as error:
            total.update(f"{file.name} {type(error).__name__}".encode())
    return total.hexdigest()[:12]


def read_pages(files: Iterable[Path], refuse: Callable[[str], None]) -> Iterator[Image.Image]:
    """Every page of the files as an RGB image; one that cannot be read costs its file's rest, and a line to `refuse`.

    Pages of a PDF are drawn at 150 dpi, a TIFF gives each of its frames. Images are turned as their EXIF says,
    transparent ones laid on white, 16-bit grey ones scaled to 8; 32-bit ones hold 8 or 16, as their values say. Refused
    is what is larger than Pillow's limit of pixels, or more than 200 times as long as it is wide.
    """
    for file in files:
        pages = _pdf_pages(file) if file.suffix.lower() == ".pdf" else _image_pages(file)
        while True:
            try:
                with decoding(file.name):
                    image = next(pages, None)
            except BadInput as error:
                refuse(str(error))
                break
            if image is None:
                break
            yield image


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Whatever goes wrong inside, with the image `name`, as a BadInput of one line; so is Pillow's limit of pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except Exception as error:  # whatever a decoder finds wrong with a file is that file's
        unknown = isinstance(error, UnidentifiedImageError)
        said = (
            "no image that Pillow reads"
            if unknown
            else " ".join(str(error).split()) or type(error).__name__
        )
        raise BadInput(f"{name} is left out: {said[:200]}") from None


def _image_pages(file: Path) -> Iterator[Image.Image]:
    with Image.open(file) as image:
        for frame in ImageSequence.Iterator(image) if image.format == "TIFF" else (image,):
            yield to_rgb(frame)


def _pdf_pages(file: Path) -> Iterator[Image.Image]:
    import pypdfium2

    document = pypdfium2.PdfDocument(file)
    try:
        for page in document:
            width, height = (size * DPI / 72 for size in page.get_size())
            if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(
                    f"a page of {width:.0f} x {height:.0f} pixels at {DPI} dpi is beyond Pillow's limit"
                )
            yield _proportionate(page.render(scale=DPI / 72).to_pil().convert("RGB"))
    finally:
        document.close()


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes as upright RGB, on white where it is transparent.

    Raises:
        ValueError: grey values of more than 16 bits, or more than 200 times as long as it is wide.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values of mode {image.mode} are not 16-bit ones")
        eight_bit = image.mode == "I" and values.max() <= 255
        image = Image.fromarray((values if eight_bit else values // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _proportionate(image.convert("RGB"))


def _proportionate(image: Image.Image) -> Image.Image:
    if max(image.size) > MOST_TIMES * min(image.size):
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {MOST_TIMES} times as long as wide"
        )
    return image
