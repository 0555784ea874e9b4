"""Queries and page images to tensors, as the published processor makes them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from hashlib import file_digest, sha256
from os import fsencode
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from colqwen_lab.errors import BadInput, MissingRequirement, one_of
from colqwen_lab.model.decode import OTHER_PICTURES, Decoder, check_regular
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.options import MOST_VISUAL_TOKENS, TEXTS, VISUAL_TOKENS
from colqwen_lab.settings import DATA

QUERY_SUFFIX_TOKENS = 10
PAD = "<|endoftext|>"
# The entry of a configuration that holds the id of a token.
SPECIAL_TOKENS = {
    "<|image_pad|>": "image_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
# The default checkpoint of `tiny`, trained by `colqwen-lab train-tiny`.
TINY = DATA / "tiny"
TINY_TOKENIZER = TINY / "tokenizer.json"
# Distinct queries of several lengths and languages; none of them is a calibration text.
NATURAL_QUERIES = (DATA / "queries.txt").read_text(encoding="utf-8").splitlines()
CALIBRATION_TEXTS = (DATA / "calibration.txt").read_text(encoding="utf-8").splitlines()
PROMPT_START = "<|im_start|>user\n<|vision_start|>"
PROMPT_END = "<|vision_end|>Describe the image.<|im_end|><|endoftext|>"
QWEN_PAD_ID = 151643
# The published processor enlarges an image below 64 visual tokens.
MIN_VISUAL_TOKENS = 64
# A file is given up after this many bad pages, or seconds of them.
MOST_BAD, MOST_LOST_S = 100, 60
# Pixel values [patches, 3 * 2 * 16 * 16] in float32, and the grid (1, rows, columns).
Patches = tuple[Tensor, tuple[int, int, int]]


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; raises as `parse_tokenizer`."""
    return parse_tokenizer(path.read_bytes(), path)


def parse_tokenizer(document: bytes, path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, without its own padding or truncation.

    Raises MissingRequirement without a pad token, or unless it splits texts as Qwen's does.
    """
    try:
        values, qwen = map(_parts, (document, TINY_TOKENIZER.read_bytes()))
        for name, part in values.items():
            if part != qwen[name]:
                raise ValueError(f"{name} must be as in Qwen's tokenizer, got {part!r:.100}")
        tokenizer = Tokenizer.from_buffer(document)
    except Exception as error:  # the library raises bare Exception
        raise MissingRequirement(f"{path} is not Qwen's tokenizer.json: {error!s:.300}") from None
    pad_id(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _parts(document: bytes) -> dict[str, Any]:
    """The parts that determine how texts are split, but for vocabulary, merges and added tokens.

    The library panics or hangs at some others, so it must not see them.
    """

    templates: list[list[dict[str, Any]]] = []

    def without_offsets(part: dict[str, Any]) -> dict[str, Any]:
        templates.extend([part["single"]] if isinstance(part.get("single"), list) else [])
        return {key: value for key, value in part.items() if key != "trim_offsets"}

    values = json.loads(document, object_hook=without_offsets)
    model, options = values["model"], ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    texts = [[part["Sequence"]["id"] for part in one if "Sequence" in part] for one in templates]
    return {
        "normalizer": (values.get("normalizer") or {}).get("type", "NFC"),
        "pre_tokenizer": values["pre_tokenizer"],
        "model": [model["type"], *(model.get(name) or None for name in options)],
        "list of bytes without a token": sorted({*ByteLevel.alphabet()} - model["vocab"].keys()),
        "list of templates without the text": [one for one in texts if one != ["A"]],
    }


def check_tokens(tokenizer: Tokenizer, config: ColQwen3Config, path: Path) -> None:
    """Raise MissingRequirement unless the network of `config` knows the tokens."""
    ids, most = tokenizer.get_vocab(), config.text_config.vocab_size
    for token, name in SPECIAL_TOKENS.items():
        if (own := ids.get(token)) != (wanted := getattr(config, name)):
            raise MissingRequirement(f"{path}: id of {token} must be {name}, {wanted}, got {own}")
    if max(ids.values()) >= most:
        raise MissingRequirement(f"{path}: ids must be below {most}, got {max(ids.values())}")


def pad_id(tokenizer: Tokenizer) -> int:
    """The id of the pad token. Raises MissingRequirement without one."""
    if (token := tokenizer.token_to_id(PAD)) is None:
        raise MissingRequirement(f"the tokenizer has no {PAD} token; use the one of a ColQwen3")
    return token


def _token_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    texts = list(texts)
    for text in texts:
        if text.encode(errors="ignore").decode() != text:
            raise BadInput(f"a text must be Unicode without lone surrogates, got {text!r:.100}")
    return [text.ids for text in tokenizer.encode_batch(texts, add_special_tokens=False)]


def encode_queries(
    tokenizer: Tokenizer, texts: Iterable[str], limit: int | None = None
) -> list[list[int]]:
    """The token ids of each query, with the ten suffix tokens.

    A text of more than `limit` tokens, suffix included, loses its end. Raises BadInput for a text
    with a lone surrogate.
    """
    suffix = [pad_id(tokenizer)] * QUERY_SUFFIX_TOKENS
    room = limit and limit - QUERY_SUFFIX_TOKENS
    return [ids[:room] + suffix for ids in _token_ids(tokenizer, texts)]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """`(input_ids, attention_mask)`, both [rows, longest row], padded on the left."""
    longest = max(map(len, rows), default=0)
    ids = [[pad] * (longest - len(row)) + [*row] for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def queries(texts: str, count: int) -> list[str]:
    """`count` distinct queries, `report` (the report's formula) or `natural`. Raises BadInput."""
    if one_of("texts", texts, TEXTS) == "report":
        return [f"Retrieve information about topic number {number}" for number in range(count)]
    rounds = range(2, 2 + count // len(NATURAL_QUERIES))
    suffixes = ["", *(f" ({number})" for number in rounds)]
    return [text + suffix for suffix in suffixes for text in NATURAL_QUERIES][:count]


def check_visual_tokens(visual_tokens: int) -> int:
    """`visual_tokens` as it is, if it is a valid budget per image. Raises BadInput."""
    if not 1 <= visual_tokens <= MOST_VISUAL_TOKENS:
        raise BadInput(f"visual_tokens must be 1 to {MOST_VISUAL_TOKENS}, got {visual_tokens}")
    return visual_tokens


def _processor(config: ColQwen3Config, visual_tokens: int) -> Qwen2VLImageProcessorPil:
    """transformers' processor with Qwen3-VL's settings and this budget."""
    vision, most = config.vision_config, check_visual_tokens(visual_tokens)
    area, half = (vision.patch_size * vision.spatial_merge_size) ** 2, [0.5] * 3
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        image_mean=half,
        image_std=half,
        size={"shortest_edge": min(MIN_VISUAL_TOKENS, most) * area, "longest_edge": most * area},
    )


def visual_tokens_of(
    width: int, height: int, config: ColQwen3Config, visual_tokens: int = VISUAL_TOKENS
) -> int:
    """The visual tokens of an image of this size in pixels, within a budget. Raises BadInput."""
    processor = _processor(config, visual_tokens)
    return processor.get_number_of_image_patches(height, width) // processor.merge_size**2


def patches(
    image: Image.Image, config: ColQwen3Config, visual_tokens: int = VISUAL_TOKENS
) -> Patches:
    """`(pixel values [patches, 1536] in float32, grid)` of an RGB image. Raises BadInput."""
    features = _processor(config, visual_tokens)(images=[image], return_tensors="pt")
    frames, rows, columns = features["image_grid_thw"][0].tolist()
    return features["pixel_values"], (frames, rows, columns)


def prompt_ids(tokenizer: Tokenizer | None, config: ColQwen3Config, image_tokens: int) -> list[int]:
    """The token ids of a page of `image_tokens`; without a tokenizer any ids stand for words."""
    if tokenizer is not None:
        start, end = _token_ids(tokenizer, (PROMPT_START, PROMPT_END))
    else:  # as many tokens as under Qwen's tokenizer
        start, end = (
            [0, 1, 2, config.vision_start_token_id],
            [config.vision_end_token_id, *range(6)],
        )
    return [*start, *[config.image_token_id] * image_tokens, *end]


def batch_of(
    pages: Sequence[Patches],
    tokenizer: Tokenizer | None,
    config: ColQwen3Config,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The arguments of a forward for the results of `patches`, one image a page, left-padded.

    Tokens are [pages, tokens], `image_grid_thw` [pages, 3], `pixel_values` [patches, 1536].
    """
    merged = config.vision_config.spatial_merge_size**2
    rows = [prompt_ids(tokenizer, config, math.prod(grid) // merged) for _, grid in pages]
    ids, mask = left_padded(rows, pad_id(tokenizer) if tokenizer else QWEN_PAD_ID)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat([pixels for pixels, _ in pages]),
        "image_grid_thw": torch.tensor([grid for _, grid in pages]),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def page_batch(
    images: Iterable[Image.Image],
    tokenizer: Tokenizer | None,
    config: ColQwen3Config,
    visual_tokens: int = VISUAL_TOKENS,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The arguments of a forward for RGB images, as `batch_of` gives them. Raises as `patches`."""
    pages = [patches(image, config, visual_tokens) for image in images]
    return batch_of(pages, tokenizer, config, device)


def page_files(source: str | Path) -> list[Path]:
    """The images and PDFs of a folder, in the order of their names; or one file. Raises BadInput.

    Every name with a picture's or a PDF's suffix counts, so that `read_pages` reports those that
    are unreadable: links that lead nowhere, devices, formats that Pillow lacks.
    """
    path, expected = Path(source), "pages must be a folder of images, an image or a PDF"
    if not (isfile(path) or isdir(path)):
        raise BadInput(f"{expected}, got {path}, which is no file and no folder")
    suffixes = {*Image.registered_extensions(), *OTHER_PICTURES, ".pdf"}
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    if files := [file for file in entries if file.suffix.lower() in suffixes and not isdir(file)]:
        return files
    raise BadInput(f"{expected}, got {path}, which holds no image and no PDF")


def digest(files: Iterable[Path]) -> str:
    """Twelve hexadecimal digits of the names and contents of files."""
    total = sha256()
    for file in files:
        try:
            check_regular(file)
            with file.open("rb") as content:
                total.update(fsencode(file.name) + file_digest(content, "sha256").digest())
        except (OSError, ValueError) as error:  # `read_pages` skips the file
            total.update(fsencode(f"{file.name} {type(error).__name__}"))
    return total.hexdigest()[:12]


def read_pages(files: Iterable[Path], skip: Callable[[str], None]) -> Iterator[Image.Image]:
    """Every page of the files as an RGB image: PDF pages at 150 dpi, all pages of a TIFF.

    A page that cannot be read is one line to `skip`, as is a file; the others follow. A file is
    given up after 100 such pages, or after 60 seconds of them.
    """
    with closing(Decoder()) as decoder:
        for file in files:
            try:
                count = decoder.count(str(file))
            except ValueError as error:
                skip(str(skipped(file.name, error)))
                continue
            bad, lost_s = 0, 0.0
            for number in range(count):
                page = file.name if count == 1 else f"{file.name} page {number + 1} of {count}"
                if bad >= MOST_BAD or lost_s > MOST_LOST_S:
                    skip(str(skipped(f"{page}, with all that follow,", f"{bad} pages are bad")))
                    break
                started_s = time.monotonic()
                try:
                    image = decoder.page(str(file), number)
                except ValueError as error:
                    bad, lost_s = bad + 1, lost_s + time.monotonic() - started_s
                    skip(str(skipped(page, error)))
                    continue
                yield image


def skipped(name: str, reason: object) -> BadInput:
    """The one-line error of a page that cannot be read."""
    return BadInput(f"{name} is skipped: {reason}")
