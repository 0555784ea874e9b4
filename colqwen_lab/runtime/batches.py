"""The batches that a step embeds, queries or pages: tensors on the device, made outside the clock."""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from colqwen_lab.errors import BadInput, MissingRequirement, one_of
from colqwen_lab.model import inputs as package_texts
from colqwen_lab.model import synthetic
from colqwen_lab.model.inputs import (
    MOST_TIMES,
    QUERY_SUFFIX_TOKENS,
    QWEN_PAD_ID,
    VISUAL_TOKENS,
    batch_of,
    check_visual_tokens,
    digest,
    encode_queries,
    left_padded,
    pad_id,
    page_files,
    patches,
    read_pages,
)
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.records import Workload


class WorkloadDefaults(NamedTuple):
    """What a sweep measures of a workload unless it is told: batch sizes, and timed steps at least.

    A page costs as much as seventy queries. Six steps are the fewest that give an interval.
    """

    batch_sizes: str
    min_steps: int


WORKLOADS = {
    "queries": WorkloadDefaults("8,16,32,64,128,256", 10),
    "pages": WorkloadDefaults("1,2,4", 6),
}
QUERIES = 64
# Pages that are kept as patches, 31 MB each at 1,280 visual tokens.
MOST_DISTINCT = 64
# Of a drawn page, in pixels: below it no letters can be drawn.
LEAST_SIDE, MOST_SIDE = 32, 9999
# Of a stored embedding's value, in 16 bits.
INDEX_VALUE_BYTES = 2
# "Retrieve information about topic number " under Qwen's tokenizer; a number adds a token a digit.
REPORT_QUERY_TOKENS = 6


@dataclass(frozen=True)
class Batches:
    """The batches that a cell cycles through, each the keyword arguments of a forward, and what a record says."""

    inputs: list[dict[str, Tensor]]
    workload: Workload
    said: tuple[str, ...] = ()


def query_batches(
    config: ColQwen3Config,
    tokenizer: Tokenizer | None,
    batch_size: int,
    texts: str,
    samples: int,
    device: torch.device,
) -> Batches:
    """max(`samples` or 64, 2 x batch) distinct queries, cut into batches, padded on the left, as in the report.

    Without a tokenizer (random weights at 4b and 8b) ids are drawn at random with the lengths of the report's
    queries.

    Raises:
        MissingRequirement: natural queries without a tokenizer.
    """
    one_of("texts", texts, package_texts.TEXTS)
    count = max(samples or QUERIES, 2 * batch_size)
    if tokenizer is not None:
        rows, pad = (
            encode_queries(tokenizer, package_texts.queries(texts, count)),
            pad_id(tokenizer),
        )
    elif texts == "report":
        rows, pad = _drawn(config.text_config.vocab_size, count), QWEN_PAD_ID
    else:
        raise MissingRequirement(
            f"texts {texts!r} need a tokenizer, and these weights have none; valid without one: report"
        )
    inputs = []
    for start in range(0, count - batch_size + 1, batch_size):
        ids, mask = left_padded(rows[start : start + batch_size], pad)
        inputs.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    workload = Workload(
        kind="queries",
        batch_size=batch_size,
        texts=texts if tokenizer is not None else "drawn at the report's lengths",
    )
    return _counted(inputs, workload)


def _counted(inputs: list[dict[str, Tensor]], workload: Workload) -> Batches:
    """The batches, their longest one's tokens and the share that is padding added to what the record says."""
    masks = [batch["attention_mask"] for batch in inputs]
    padded = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    found = {"tokens": max(mask.shape[1] for mask in masks), "padded_share": round(padded, 6)}
    return Batches(inputs, workload.model_copy(update=found))


def _drawn(vocabulary: int, count: int) -> list[list[int]]:
    """Random ids, different for each query, with the lengths of the report's queries."""
    generator = torch.Generator().manual_seed(0)
    suffix = [QWEN_PAD_ID] * QUERY_SUFFIX_TOKENS
    lengths = [REPORT_QUERY_TOKENS + len(str(number)) for number in range(count)]
    words = min(vocabulary, QWEN_PAD_ID)
    return [
        torch.randint(words, (length,), generator=generator).tolist() + suffix for length in lengths
    ]


class Pages:
    """Where pages come from: drawn by the lab, A4 at 150 dpi or WIDTHxHEIGHT pixels, or a person's folder or file.

    `label` names them in a record: for files the digest of their names and contents, and no path.

    Raises:
        BadInput: neither, or a size or a budget out of bounds.
    """

    def __init__(self, source: str = "", visual_tokens: int = VISUAL_TOKENS) -> None:
        self.visual_tokens = check_visual_tokens(visual_tokens)
        size = re.fullmatch(r"(\d{1,9})x(\d{1,9})", source)
        self.size = (int(size[1]), int(size[2])) if size else (synthetic.WIDTH, synthetic.HEIGHT)
        least, most = min(self.size), max(self.size)
        if least < LEAST_SIDE or most > min(MOST_SIDE, MOST_TIMES * least):
            valid = f"WIDTHxHEIGHT, each {LEAST_SIDE} to {MOST_SIDE}, one at most {MOST_TIMES} times the other"
            raise BadInput(f"pages of {source} pixels; valid: {valid}")
        self.files = page_files(source) if source and not size else []
        self.refused: list[str] = []
        self._made: list[tuple[Tensor, tuple[int, int, int]]] = []
        self._seconds: list[float] = []

    @cached_property
    def label(self) -> str:
        if self.files:
            return f"{len(self.files)} files {digest(self.files)}"
        return f"drawn, {self.size[0]} x {self.size[1]} pixels"

    @cached_property
    def _images(self) -> Iterator[Image.Image]:
        """The distinct pages in their order; a file that cannot be read is a line in `refused`."""
        if self.files:
            return read_pages(self.files, self.refused.append)
        return (
            synthetic.page(number, width=self.size[0]).resize(self.size)
            for number in itertools.count()
        )

    def _make(self, count: int, config: ColQwen3Config) -> None:
        """Have the patches of `count` pages; what one takes, from a file or a drawn image to patches, is timed."""
        for _ in range(count - len(self._made)):
            before = time.perf_counter()
            image = next(self._images, None)
            if image is None:
                break
            if not self.files:
                before = time.perf_counter()
            self._made.append(patches(image, config, self.visual_tokens))
            self._seconds.append(time.perf_counter() - before)
        if not self._made:
            raise BadInput(
                f"none of {len(self.files)} files gives a page; {', '.join(self.refused)[:200]}"
            )

    def batches(
        self,
        config: ColQwen3Config,
        tokenizer: Tokenizer | None,
        batch_size: int,
        samples: int,
        device: torch.device,
    ) -> Batches:
        """Whole batches, padded on the left, of all of a person's pages, or of max(`samples`, 2 x batch) drawn ones.

        At most 64 are distinct; what is left of the last batch, and of two batches at least, repeats them.

        Raises:
            BadInput: none of the files could be read.
        """
        count = max(samples, 2 * batch_size)
        most = MOST_DISTINCT if self.files else min(count, MOST_DISTINCT)
        self._make(most, config)
        distinct = self._made[:most]
        rows = itertools.cycle(distinct)
        inputs = [
            batch_of(list(itertools.islice(rows, batch_size)), tokenizer, config, device)
            for _ in range(0, max(count, len(distinct)), batch_size)
        ]
        sizes = [int(mask.sum()) for batch in inputs for mask in batch["attention_mask"]][
            : len(distinct)
        ]
        workload = Workload(
            kind="pages",
            batch_size=batch_size,
            visual_tokens=self.visual_tokens,
            pages=self.label,
            distinct=len(distinct),
            skipped=len(self.refused),
            index_bytes=round(statistics.fmean(sizes) * config.embed_dim * INDEX_VALUE_BYTES),
            preprocess_s=statistics.median(self._seconds[1:] or self._seconds),
        )
        return replace(_counted(inputs, workload), said=tuple(self.refused))
