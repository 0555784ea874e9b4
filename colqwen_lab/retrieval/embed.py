"""Queries and pages through a loaded model: ragged embeddings on the host, and the time of each forward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.measure.timing import synchronise
from colqwen_lab.model.inputs import encode_queries, left_padded, pad_id, page_batch
from colqwen_lab.model.loading import Loaded
from colqwen_lab.retrieval.data import Page
from colqwen_lab.retrieval.maxsim import unpadded

#: Tokens of a text page, at most.
TEXT_TOKENS = 2048


def query_inputs(loaded: Loaded, texts: Sequence[str]) -> dict[str, Tensor]:
    """The keyword arguments of a forward for queries. Raises MissingRequirement without a tokenizer."""
    if loaded.tokenizer is None:
        raise MissingRequirement(f"{loaded.weights} has no tokenizer, and texts need one")
    rows = [row[-TEXT_TOKENS:] for row in encode_queries(loaded.tokenizer, texts)]
    ids, mask = left_padded(rows, pad_id(loaded.tokenizer))
    return {"input_ids": ids.to(loaded.device), "attention_mask": mask.to(loaded.device)}


@torch.no_grad()
def embed(loaded: Loaded, inputs: dict[str, Tensor]) -> tuple[list[Tensor], float]:
    """`(embeddings, seconds)`: [tokens, 320] each, on the host and without padding, and the time of the forward."""
    synchronise(loaded.device)
    started = time.perf_counter()
    padded = loaded.model(**inputs).embeddings
    synchronise(loaded.device)
    elapsed = time.perf_counter() - started
    return [row.cpu() for row in unpadded(padded, inputs["attention_mask"])], elapsed


def embed_pages(
    loaded: Loaded, pages: Sequence[Page], visual_tokens: int
) -> tuple[list[Tensor], float]:
    """The same for pages, in their order: the images in one forward, the texts, as queries are, in another."""
    images = [page for page in pages if isinstance(page, Image.Image)]
    texts = [page for page in pages if isinstance(page, str)]
    shown: list[Tensor] = []
    read: list[Tensor] = []
    of_images = of_texts = 0.0
    if images:
        batch = page_batch(
            images, loaded.tokenizer, loaded.model.config, visual_tokens, loaded.device
        )
        shown, of_images = embed(loaded, batch)
    if texts:
        read, of_texts = embed(loaded, query_inputs(loaded, texts))
    made = {True: iter(read), False: iter(shown)}
    return [next(made[isinstance(page, str)]) for page in pages], of_images + of_texts


def blocks(count: int, batch: int) -> Iterator[range]:
    """The numbers 0 to `count` - 1 in batches."""
    return (range(start, min(start + batch, count)) for start in range(0, count, batch))
