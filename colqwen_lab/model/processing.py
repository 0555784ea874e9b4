"""Queries to token ids, as the published processor makes them.

A query is its text followed by ten pad tokens (`<|endoftext|>`), no prefix; a batch is padded on the left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor

from colqwen_lab.errors import Unmet
from colqwen_lab.settings import DATA

QUERY_SUFFIX_TOKENS = 10
PAD = "<|endoftext|>"
# The checkpoint folder of the default `tiny`, as `colqwen-lab train-tiny` makes it.
TINY = DATA / "tiny"
TINY_TOKENIZER = TINY / "tokenizer.json"


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        Unmet: the file cannot be read, its pad token is missing, or it rewrites texts.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise Unmet(f"{path} is not a tokenizer.json: {error}") from None
    pad_id(tokenizer)
    if not isinstance(tokenizer.normalizer, normalizers.NFC | None):
        raise Unmet(f"{path} has a normalizer {tokenizer.normalizer!r:.100}; valid: NFC, or none")
    # Texts are padded and cut here, never as a file says.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def pad_id(tokenizer: Tokenizer) -> int:
    """The id of the pad token. Raises Unmet if there is none."""
    found = tokenizer.token_to_id(PAD)
    if found is None:
        raise Unmet(f"the tokenizer has no {PAD} token; it is not that of a ColQwen3")
    return found


def encode_queries(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each query, the ten suffix tokens included."""
    suffix = [pad_id(tokenizer)] * QUERY_SUFFIX_TOKENS
    return [encoding.ids + suffix for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """`(input_ids, attention_mask)`, both [rows, longest row], padding on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
