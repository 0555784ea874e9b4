"""The batches that a step embeds: token ids on the device, made outside the clock."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from colqwen_lab.errors import Unmet, one_of
from colqwen_lab.model import texts as package_texts
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.model.processing import QUERY_SUFFIX_TOKENS, encode_queries, left_padded, pad_id
from colqwen_lab.records import Workload

WORKLOADS = ("queries",)
# "Retrieve information about topic number " under Qwen's tokenizer; a number adds a token a digit.
REPORT_QUERY_TOKENS = 6
QWEN_PAD_ID = 151643


@dataclass(frozen=True)
class Batches:
    """The batches that a cell cycles through, each the keyword arguments of a forward, and what a record says."""

    inputs: list[dict[str, Tensor]]
    workload: Workload


def query_batches(
    config: ColQwen3Config,
    tokenizer: Tokenizer | None,
    batch_size: int,
    texts: str,
    samples: int,
    device: torch.device,
) -> Batches:
    """max(`samples`, 2 x batch) distinct queries, cut into batches, padded on the left, as the report's script does.

    Without a tokenizer (random weights at 4b and 8b) ids are drawn at random with the lengths of the report's
    queries.

    Raises:
        Unmet: natural queries without a tokenizer.
    """
    one_of("texts", texts, package_texts.TEXTS)
    count = max(samples, 2 * batch_size)
    if tokenizer is not None:
        rows, pad = encode_queries(tokenizer, package_texts.queries(texts, count)), pad_id(tokenizer)
    elif texts == "report":
        rows, pad = _drawn(config.text_config.vocab_size, count), QWEN_PAD_ID
    else:
        raise Unmet(f"texts {texts!r} need a tokenizer, and these weights have none; valid without one: report")
    inputs, tokens, real = [], 0, 0
    for start in range(0, count - batch_size + 1, batch_size):
        ids, mask = left_padded(rows[start : start + batch_size], pad)
        inputs.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
        tokens, real = tokens + mask.numel(), real + int(mask.sum())
    workload = Workload(
        kind="queries",
        batch_size=batch_size,
        tokens=max(batch["input_ids"].shape[1] for batch in inputs),
        texts=texts if tokenizer is not None else "drawn at the report's lengths",
        padded_share=round(1 - real / tokens, 6),
    )
    return Batches(inputs, workload)


def _drawn(vocabulary: int, count: int) -> list[list[int]]:
    """Random ids, different for each query, with the lengths of the report's queries."""
    generator = torch.Generator().manual_seed(0)
    suffix = [QWEN_PAD_ID] * QUERY_SUFFIX_TOKENS
    lengths = [REPORT_QUERY_TOKENS + len(str(number)) for number in range(count)]
    words = min(vocabulary, QWEN_PAD_ID)
    return [torch.randint(words, (length,), generator=generator).tolist() + suffix for length in lengths]
