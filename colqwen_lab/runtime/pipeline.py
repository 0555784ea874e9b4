"""Pages from files on disk to stored vectors: read ahead, preprocessed, embedded, stored.

Processes read and decode pages while the device embeds and a thread stores. Pages are batched by
the size to which they are resized, so nothing is padded.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from colqwen_lab.errors import BadInput
from colqwen_lab.model.inputs import Reader, batch_of
from colqwen_lab.model.loading import Loaded
from colqwen_lab.model.preprocess import patched, pixels_of, resized, resized_size
from colqwen_lab.runtime.eager import Steps

# Batches that wait for the thread that stores them, and batches of pages that wait for their like.
MOST_UNSTORED, MOST_WAITING = 2, 8
# The fewest pages whose stages are timed one after the other.
STAGE_PAGES = 8

# Stores the vectors [tokens, 320] of pages by their numbers, in the order of the files.
Store = Callable[[Sequence[int], Sequence[Tensor]], Any]


class Prepared(NamedTuple):
    """A page as uint8 pixels [height, width, 3], and the size to which they are resized."""

    pixels: Tensor
    size: tuple[int, int]


class Writer:
    """A thread that stores vectors while the device goes on."""

    def __init__(self, store: Store) -> None:
        self.store, self.thread = store, ThreadPoolExecutor(1)
        self.unstored = deque[Future[Any]]()

    def put(self, numbers: Sequence[int], vectors: Tensor) -> None:
        """Launch the copy of vectors [pages, tokens, 320] to the host; they are stored after it."""
        done = torch.cuda.Event() if vectors.is_cuda else None
        if done:
            host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
            vectors = host.copy_(vectors, non_blocking=True)
            done.record()

        def store() -> None:
            if done:
                done.synchronize()
            self.store(numbers, list(vectors))

        self.wait(MOST_UNSTORED)
        self.unstored.append(self.thread.submit(store))

    def wait(self, most: int = 0) -> None:
        """Wait until at most so many batches are not stored; raises what storing one raised."""
        while len(self.unstored) > most:
            self.unstored.popleft().result()

    def close(self) -> None:
        """End the thread."""
        self.thread.shutdown(cancel_futures=True)


@dataclass
class Pipeline:
    """A loaded model, and what a batch is. `skip` gets a line a page that cannot be read."""

    loaded: Loaded
    steps: Steps
    device: torch.device
    batch_size: int
    visual_tokens: int
    skip: Callable[[str], None] = lambda line: None

    def run(self, files: Sequence[Path], loaders: int, store: Store) -> tuple[int, float]:
        """Embed and store every page: their number, and the seconds from first file to last vector.

        The start of the processes that read does not count.
        """
        pages = 0
        with closing(Reader(loaders, self.prepare)) as reader, closing(Writer(store)) as writer:
            reader.start()
            start = time.perf_counter()
            for numbers, batch in batched(reader.pages(files, self.skip), self.batch_size):
                writer.put(numbers, self._embed(self._on_device(batch)))
                pages += len(numbers)
            writer.wait()
            return pages, time.perf_counter() - start

    def stages(self, files: Sequence[Path], store: Store) -> dict[str, float]:
        """Seconds a page of each stage alone, over the first pages; see `records.EndToEnd`.

        Raises BadInput if no page can be read.
        """
        with closing(Reader(1, self.prepare)) as reader, closing(Writer(store)) as writer:
            reader.start()
            most = max(STAGE_PAGES, self.batch_size)
            pages = list(islice(reader.pages(files, self.skip), most))
            if not pages:
                raise BadInput(f"none of {len(files)} files gives a page")
            times: list[list[float]] = []
            for numbers, batch in batched(pages, self.batch_size):
                self._embed(self._on_device(batch))  # what its first use compiles does not count
                marks = [self._now()]
                inputs = self._on_device(batch)
                marks.append(self._now())
                vectors = self._embed(inputs)
                marks.append(self._now())
                writer.put(numbers, vectors)
                writer.wait()
                marks.append(self._now())
                times.append([end - start for start, end in pairwise(marks)])
            totals = dict(
                zip(("preprocess_s", "embed_s", "store_s"), zip(*times, strict=True), strict=True)
            )
            in_loader = {"read_s": fmean(reader.read_s), "prepare_s": fmean(reader.prepare_s)}
            return in_loader | {name: sum(each) / len(pages) for name, each in totals.items()}

    def prepare(self, image: Image.Image) -> Prepared:
        """A decoded page, resized unless a GPU does it. Runs in a thread of the reader."""
        size = resized_size(*image.size, self.loaded.model.config, self.visual_tokens)
        if self.device.type == "cuda":
            return Prepared(pixels_of(image).pin_memory(), size)
        return Prepared(pixels_of(image, size), size)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _on_device(self, pages: Iterable[Prepared]) -> dict[str, Tensor]:
        """The arguments of a forward, made on the device."""
        config = self.loaded.model.config
        pixels = (resized(one.pixels.to(self.device, non_blocking=True), one.size) for one in pages)
        patches = [patched(image, config) for image in pixels]
        return batch_of(patches, self.loaded.tokenizer, config, self.device)

    def _embed(self, batch: dict[str, Tensor]) -> Tensor:
        """The vectors [pages, tokens, 320]: pages of one size have no padding."""
        self.steps(batch)
        return self.steps.output.embeddings


def batched(
    pages: Iterable[Prepared], batch_size: int
) -> Iterator[tuple[list[int], list[Prepared]]]:
    """The numbers and the pages of each batch, of one size; `pages` are numbered from 0.

    A batch is smaller at the end, or where pages of many sizes wait.
    """
    waiting: defaultdict[tuple[int, int], list[tuple[int, Prepared]]] = defaultdict(list)

    def batch(size: tuple[int, int]) -> tuple[list[int], list[Prepared]]:
        numbers, its_pages = zip(*waiting.pop(size), strict=True)
        return list(numbers), list(its_pages)

    for number, page in enumerate(pages):
        waiting[page.size].append((number, page))
        if len(waiting[page.size]) == batch_size:
            yield batch(page.size)
        elif sum(map(len, waiting.values())) > MOST_WAITING * batch_size:
            yield batch(max(waiting, key=lambda size: len(waiting[size])))
    for size in list(waiting):
        yield batch(size)
