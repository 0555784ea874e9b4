from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model.config import SIZES
from colqwen_lab.model.inputs import (
    CALIBRATION_TEXTS,
    NATURAL_QUERIES,
    PAD,
    QUERY_SUFFIX_TOKENS,
    TINY_TOKENIZER,
    encode_queries,
    left_padded,
    queries,
    read_tokenizer,
)

MARKS = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL_TOKENS = (PAD, *(f"<|{mark}|>" for mark in MARKS))
# Qwen's own splitting rule: words with their leading space, digits one by one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with Qwen's splitting rule and special tokens, as the packaged tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_the_tokenizer_in_the_package_is_the_trained_one() -> None:
    read = [*CALIBRATION_TEXTS, *NATURAL_QUERIES, *queries("report", 64)]
    tokenizer = trained(read, SIZES["tiny"]["text_config"]["vocab_size"])
    assert json.loads(tokenizer.to_str()) == json.loads(TINY_TOKENIZER.read_text())


def test_special_ids_are_those_of_the_tiny_configuration() -> None:
    tokenizer = read_tokenizer(TINY_TOKENIZER)
    tiny = SIZES["tiny"]
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(7))
    assert tokenizer.token_to_id("<|image_pad|>") == tiny["image_token_id"]
    assert tokenizer.token_to_id("<|video_pad|>") == tiny["video_token_id"]
    assert tokenizer.token_to_id("<|vision_start|>") == tiny["vision_start_token_id"]
    assert tokenizer.token_to_id("<|vision_end|>") == tiny["vision_end_token_id"]


@pytest.mark.parametrize(("number", "tokens"), [(0, 17), (9, 17), (42, 18), (511, 19), (1023, 20)])
def test_the_report_s_queries_have_its_lengths(number: int, tokens: int) -> None:
    (ids,) = encode_queries(
        read_tokenizer(TINY_TOKENIZER), [f"Retrieve information about topic number {number}"]
    )
    assert len(ids) == tokens
    assert ids[-QUERY_SUFFIX_TOKENS:] == [0] * QUERY_SUFFIX_TOKENS
    assert 0 not in ids[:-QUERY_SUFFIX_TOKENS]


TOKENIZER = read_tokenizer(TINY_TOKENIZER)


@given(st.text(max_size=80))
def test_any_text_comes_back(text: str) -> None:
    tokenizer = TOKENIZER
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in SPECIAL_TOKENS):
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=9))
def test_left_padding(rows: list[list[int]]) -> None:
    ids, mask = left_padded(rows, pad=0)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] == rows
    assert (mask.diff(dim=1) >= 0).all()
    assert (ids[mask == 0] == 0).all()


def test_texts_are_many_and_distinct() -> None:
    natural = NATURAL_QUERIES
    assert len(set(natural)) == len(natural) >= 200
    assert len({len(query.split()) for query in natural}) >= 15
    assert not set(natural) & set(CALIBRATION_TEXTS)
    assert len(set(queries("natural", 1000))) == 1000
    assert queries("report", 2) == [
        f"Retrieve information about topic number {n}" for n in range(2)
    ]
    with pytest.raises(BadInput, match=r"texts.*report, natural"):
        queries("own", 1)


def test_a_long_text_loses_its_end_and_keeps_the_suffix() -> None:
    (whole,) = encode_queries(TOKENIZER, ["wheat prices rose in June and July"])
    (cut,) = encode_queries(TOKENIZER, ["wheat prices rose in June and July"], 15)
    assert cut == whole[:5] + whole[-QUERY_SUFFIX_TOKENS:]
    assert encode_queries(TOKENIZER, ["wheat"], 2048) == encode_queries(TOKENIZER, ["wheat"])


def test_a_lone_surrogate_is_one_line() -> None:
    with pytest.raises(BadInput, match=r"without lone surrogates, got 'a\\ud800'"):
        encode_queries(TOKENIZER, ["fine", "a\ud800"])


def test_a_foreign_tokenizer_is_an_error(tmp_path: Path) -> None:
    bad = tmp_path / "tokenizer.json"
    bad.write_text("{}")
    with pytest.raises(MissingRequirement, match=r"not a tokenizer\.json"):
        read_tokenizer(bad)
    bad.write_text(TINY_TOKENIZER.read_text().replace("<|endoftext|>", "<eos>"))
    with pytest.raises(MissingRequirement, match="endoftext"):
        read_tokenizer(bad)
