"""The batches that a step embeds, queries or pages: tensors on the device, built before timing."""

from __future__ import annotations

import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from colqwen_lab.errors import BadInput, MissingRequirement, ambiguous, one_of
from colqwen_lab.model import synthetic
from colqwen_lab.model.decode import MOST_TIMES
from colqwen_lab.model.inputs import (
    QUERY_SUFFIX_TOKENS,
    QWEN_PAD_ID,
    Reader,
    batch_of,
    digest,
    encode_queries,
    left_padded,
    pad_id,
    page_files,
    queries,
)
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.model.preprocess import Patches, check_visual_tokens, patches
from colqwen_lab.options import TEXTS, VISUAL_TOKENS
from colqwen_lab.records import RANDOM_TEXTS, Workload

QUERIES = 64
# Pages kept as patches, 31 MB each at 1,280 visual tokens.
MAX_DISTINCT = 64
# Skipped pages that are named.
MOST_SAID = 50
# Sides of a synthetic page in pixels; letters need the smallest.
MIN_SIDE, MAX_SIDE = 32, 9999
# A stored embedding has 16-bit values.
INDEX_VALUE_BYTES = 2
# "Retrieve information about topic number " with Qwen's tokenizer; the number adds a token a digit.
REPORT_QUERY_TOKENS = 6


@dataclass(frozen=True)
class Batches:
    """The batches of a cell, each the keyword arguments of a forward; messages for the user."""

    inputs: list[dict[str, Tensor]]
    workload: Workload
    messages: tuple[str, ...] = ()


def query_batches(
    config: ColQwen3Config,
    tokenizer: Tokenizer | None,
    batch_size: int,
    texts: str,
    samples: int,
    device: torch.device,
) -> Batches:
    """Left-padded batches that together hold max(`samples` or 64, 2 x batch) distinct queries.

    Without a tokenizer (random weights at 4b and 8b) ids are random, at the lengths of the report's
    queries.

    Raises:
        MissingRequirement: natural queries without a tokenizer.
    """
    one_of("texts", texts, TEXTS)
    count = max(samples or QUERIES, 2 * batch_size)
    if tokenizer is not None:
        rows, pad = encode_queries(tokenizer, queries(texts, count)), pad_id(tokenizer)
    elif texts == "report":
        rows, pad = _random_queries(config.text_config.vocab_size, count), QWEN_PAD_ID
    else:
        raise MissingRequirement(
            f"texts {texts!r} need a tokenizer, which these weights lack; valid without: report"
        )
    inputs = []
    for start in range(0, count - batch_size + 1, batch_size):
        ids, mask = left_padded(rows[start : start + batch_size], pad)
        inputs.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    used = texts if tokenizer is not None else RANDOM_TEXTS
    return Batches(
        inputs, Workload(kind="queries", batch_size=batch_size, texts=used, **_lengths(inputs))
    )


def _lengths(inputs: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The longest batch's tokens, the share of all tokens that is padding, and the shapes."""
    masks = [batch["attention_mask"] for batch in inputs]
    padded = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    numbers: dict[Any, int] = {}
    return {
        "tokens": max(mask.shape[1] for mask in masks),
        "padded_share": round(padded, 6),
        "shapes": [numbers.setdefault(_shape(batch), len(numbers)) for batch in inputs],
    }


def _shape(batch: dict[str, Tensor]) -> tuple[Any, ...]:
    """What the cost of a batch depends on: rows, tokens, whether any is padding, the images."""
    images = batch["image_grid_thw"].tolist() if "image_grid_thw" in batch else []
    padded = not batch["attention_mask"].all()
    return (batch["input_ids"].shape, padded, *map(tuple, images))


def _random_queries(vocabulary: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [REPORT_QUERY_TOKENS + len(str(number)) for number in range(count)]
    words = torch.randint(min(vocabulary, QWEN_PAD_ID), (sum(lengths),), generator=generator)
    rows = [row.tolist() for row in words.split(lengths)]
    return [row + [QWEN_PAD_ID] * QUERY_SUFFIX_TOKENS for row in rows]


class Pages:
    """Pages to embed: synthetic ones, A4 at 150 dpi or WIDTHxHEIGHT pixels, or a folder or file.

    `label` names them in a record; files are named by the digest of names and contents.

    Raises:
        BadInput: no such folder or file, or a size or visual-token budget out of bounds.
    """

    def __init__(self, source: str = "", visual_tokens: int = VISUAL_TOKENS) -> None:
        self.visual_tokens = check_visual_tokens(visual_tokens)
        match = re.fullmatch(r"(\d{1,9}) ?x ?(\d{1,9})", source)
        if match and os.path.exists(source):
            raise ambiguous(source, "a size in pixels")
        sides = match.groups() if match else (synthetic.WIDTH, synthetic.HEIGHT)
        self.size = width, height = int(sides[0]), int(sides[1])
        short, long = sorted(self.size)
        if short < MIN_SIDE or long > min(MAX_SIDE, MOST_TIMES * short):
            raise BadInput(
                f"pages must be WIDTHxHEIGHT, each {MIN_SIDE} to {MAX_SIDE} pixels and one at most "
                f"{MOST_TIMES} times the other, got {source}"
            )
        self.skipped: list[str] = []
        pages = source and not match
        self.files = page_files(source, self.skipped.append) if pages else []
        files = f"{len(self.files)} files {digest(self.files)}"
        self.label = files if self.files else f"synthetic, {width} x {height} pixels"
        self._pages: list[tuple[Patches, float]] = []
        self._coming: Iterator[tuple[Patches, float]] | None = None

    def on_disk(self, folder: Path, count: int) -> list[Path]:
        """The files, or `count` synthetic pages as JPEG files in `folder`."""
        if self.files:
            return self.files
        for number in range(count):
            page = synthetic.page(number, width=self.size[0]).resize(self.size)
            page.save(folder / f"page-{number:03}.jpg", quality=90)
        return sorted(folder.iterdir())

    def _preprocessed(self, config: ColQwen3Config) -> Iterator[tuple[Patches, float]]:
        """The patches of each page, and the seconds to read a file and to process the page."""

        def timed(image: Image.Image) -> tuple[Patches, float]:
            start = time.perf_counter()
            return patches(image, config, self.visual_tokens), time.perf_counter() - start

        if not self.files:
            for number in itertools.count():
                yield timed(synthetic.page(number, width=self.size[0]).resize(self.size))
        with closing(Reader(1, timed)) as reader:
            pages = reader.pages(self.files, self.skipped.append)
            for (page, seconds), read_s in zip(pages, reader.read_s, strict=False):
                yield page, read_s + seconds

    def _prepare(self, count: int, config: ColQwen3Config) -> None:
        """Have the patches of `count` pages."""
        self._coming = self._coming or self._preprocessed(config)
        self._pages += itertools.islice(self._coming, max(0, count - len(self._pages)))
        if not self._pages:
            reasons = ", ".join(reversed(self.skipped))  # those left out come first
            raise BadInput(f"none of {len(self.files)} files gives a page; {reasons[:200]}")

    def batches(
        self,
        config: ColQwen3Config,
        tokenizer: Tokenizer | None,
        batch_size: int,
        samples: int,
        device: torch.device,
    ) -> Batches:
        """Full, left-padded batches of all files, or of max(`samples`, 2 x batch) synthetic pages.

        At most 64 pages are distinct. They repeat to fill the last batch, and at least two batches;
        of few files each is embedded equally often.

        Raises:
            BadInput: no file could be read.
        """
        count = max(samples, 2 * batch_size)
        wanted = MAX_DISTINCT if self.files else min(count, MAX_DISTINCT)
        self._prepare(wanted, config)
        distinct = [page for page, _ in self._pages[:wanted]]
        pages, whole = itertools.cycle(distinct), math.lcm(len(distinct), batch_size)
        if not self.files or whole > MAX_DISTINCT:
            whole = batch_size
        count = math.ceil(max(count, len(distinct)) / whole) * whole
        inputs = [
            batch_of(list(itertools.islice(pages, batch_size)), tokenizer, config, device)
            for _ in range(0, count, batch_size)
        ]
        tokens = [int(mask.sum()) for batch in inputs for mask in batch["attention_mask"]]
        seconds = [each for _, each in self._pages]
        page_tokens = statistics.fmean(tokens[: len(distinct)])
        workload = Workload(
            kind="pages",
            batch_size=batch_size,
            visual_tokens=self.visual_tokens,
            pages=self.label,
            distinct=len(distinct),
            skipped=len(self.skipped),
            index_bytes=round(page_tokens * config.embed_dim * INDEX_VALUE_BYTES),
            preprocess_s=statistics.fmean(seconds[1:] or seconds),
            **_lengths(inputs),
        )
        messages = self.skipped[:MOST_SAID]
        if more := len(self.skipped) - len(messages):
            messages.append(f"{more} more files, folders or pages are skipped")
        return Batches(inputs, workload, tuple(messages))
