"""Queries and page images to tensors, as the published processor makes them."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import file_digest, sha256
from os import fsencode
from os.path import isdir, isfile
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from colqwen_lab.errors import BadInput, MissingRequirement, one_of
from colqwen_lab.model.decode import Decoder, check_regular
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.model.preprocess import Patches, patches
from colqwen_lab.options import TEXTS, VISUAL_TOKENS
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
Item = TypeVar("Item")
# A file is given up after this many bad pages, or seconds of them.
MOST_BAD, MOST_LOST_S = 100, 60


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


def prompt_ids(tokenizer: Tokenizer | None, config: ColQwen3Config, image_tokens: int) -> list[int]:
    """The token ids of a page of `image_tokens`; without a tokenizer any ids stand for words."""
    if tokenizer is not None:
        start, end = _token_ids(tokenizer, (PROMPT_START, PROMPT_END))
    else:  # as many tokens as under Qwen's tokenizer
        start = [0, 1, 2, config.vision_start_token_id]
        end = [config.vision_end_token_id, *range(6)]
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


def page_files(source: str | Path, skip: Callable[[str], object]) -> list[Path]:
    """The images and PDFs of a folder, in the order of their names; or one file. Raises BadInput.

    Every name with a suffix of Pillow's or a PDF's counts, so that `Reader` reports those that
    are unreadable, such as links that lead nowhere. Each other entry is one line to `skip`.
    """
    path, expected = Path(source), "pages must be a folder of images, an image or a PDF"
    if isfile(path):
        return [path]
    if not isdir(path):
        raise BadInput(f"{expected}, got {path}, which is no file and no folder")
    suffixes = {*Image.registered_extensions(), ".pdf"}
    files = []
    for entry in sorted(path.iterdir()):
        if entry.is_dir():
            skip(str(skipped(f"{entry.name}/", "folders within a folder are not read")))
        elif entry.suffix.lower() in suffixes:
            files.append(entry)
        else:
            skip(
                str(
                    skipped(
                        entry.name, "it has no suffix of a PDF or of an image that Pillow reads"
                    )
                )
            )
    if files:
        return files
    raise BadInput(f"{expected}, got {path}, which holds no image and no PDF")


def digest(files: Iterable[Path]) -> str:
    """Twelve hexadecimal digits of the names and contents of files."""
    total = sha256()
    for file in files:
        try:
            check_regular(file)
            with file.open("rb") as content:
                state = file_digest(content, "sha256").digest()
        except (OSError, ValueError) as error:  # `Reader` skips the file
            state = f" {type(error).__name__}".encode()
        total.update(fsencode(file.name) + state)
    return total.hexdigest()[:12]


class Reader:
    """`loaders` processes that decode pages ahead, and `prepare` each in a thread.

    A file is given up after 100 pages that cannot be read, or after 60 seconds of them.
    """

    def __init__(
        self, loaders: int, prepare: Callable[[Image.Image], Any] = lambda image: image
    ) -> None:
        self.prepare, self.decoders = prepare, [Decoder() for _ in range(loaders)]
        self.idle = SimpleQueue[Decoder]()
        for decoder in self.decoders:
            self.idle.put(decoder)
        self.pool = ThreadPoolExecutor(loaders)  # each thread waits for a process
        # Seconds of each page, in a process and in its thread; of each bad page.
        self.read_s, self.prepare_s = list[float](), list[float]()
        self.lost_s: defaultdict[Path, list[float]] = defaultdict(list)

    def start(self) -> None:
        """Start the processes, which takes a second."""
        list(self.pool.map(self._ask, ["count"] * len(self.decoders), [os.curdir]))

    def pages(self, files: Iterable[Path], skip: Callable[[str], None]) -> Iterator[Any]:
        """Every page of the files in their order: PDF pages at 150 dpi, all pages of a TIFF.

        A page that cannot be read is one line to `skip`, as is a file; the others follow.
        """
        told = set[Path]()
        for file, name, answer in ahead(self._coming(files), 2 * len(self.decoders)):
            page, seconds = answer.result()
            if self._given_up(file):
                if file not in told:
                    reason = f"{len(self.lost_s[file])} pages are bad"
                    skip(str(skipped(f"{name}, with all that follow,", reason)))
                told.add(file)
            elif isinstance(page, ValueError):
                self.lost_s[file].append(seconds)
                skip(str(skipped(name, page)))
            else:
                yield page

    def close(self) -> None:
        """End the processes; what was asked ahead is not read."""
        for wait in (False, True):  # until its thread ends, a process may start
            self.pool.shutdown(wait, cancel_futures=True)
            for decoder in self.decoders:
                decoder.close()

    def _coming(
        self, files: Iterable[Path]
    ) -> Iterator[tuple[Path, str, Future[tuple[Any, float]]]]:
        """The file, the name and the answer to come of every page."""
        counts = ((file, self.pool.submit(self._ask, "count", str(file))) for file in files)
        for file, counted in ahead(counts, 2 * len(self.decoders)):
            count, _ = counted.result()
            if isinstance(count, ValueError):
                yield file, file.name, counted
                continue
            for number in range(count):
                if self._given_up(file):
                    break
                name = file.name if count == 1 else f"{file.name} page {number + 1} of {count}"
                yield file, name, self.pool.submit(self._ask, "page", str(file), number)

    def _given_up(self, file: Path) -> bool:
        return len(self.lost_s[file]) >= MOST_BAD or sum(self.lost_s[file]) > MOST_LOST_S

    def _ask(self, method: str, *question: Any) -> tuple[Any, float]:
        """An answer of a process, prepared if it is a page, or a ValueError; and the seconds."""
        decoder, start = self.idle.get(), time.perf_counter()
        try:
            answer = getattr(decoder, method)(*question)
        except ValueError as error:
            answer = error
        finally:
            self.idle.put(decoder)
        seconds = time.perf_counter() - start
        if isinstance(answer, Image.Image):
            self.read_s.append(seconds)
            start = time.perf_counter()
            answer = self.prepare(answer)
            self.prepare_s.append(time.perf_counter() - start)
        return answer, seconds


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, each taken from `items` while `count` before it are still to come."""
    asked = deque[Item]()
    for item in items:
        asked.append(item)
        if len(asked) > count:
            yield asked.popleft()
    yield from asked


def skipped(name: str, reason: object) -> BadInput:
    """The one-line error of a page that cannot be read."""
    return BadInput(f"{name} is skipped: {reason}")
