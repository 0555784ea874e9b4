from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    check_tokens,
    encode_queries,
    left_padded,
    queries,
    read_tokenizer,
)
from colqwen_lab.model.network import ColQwen3Config

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


ISOLATED = {"type": "Split", "behavior": "Isolated", "invert": False}
SPECIAL_ONLY = {"single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": []}
TEMPLATE = {"type": "TemplateProcessing", "special_tokens": {}} | SPECIAL_ONLY


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "pre_tokenizer must be as in Q"),
        (
            {"pre_tokenizer": ISOLATED | {"pattern": {"Regex": "(a|a)*(a|aa)+$"}}},
            "pre_tokenizer must be as in Qwen's tokenizer, got {'type': 'Split'",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "normalizer mus"),
        ({"model": {"continuing_subword_prefix": "##"}}, r"model must .*'BPE', None, '##', None"),
        ({"model": {"dropout": 0.5}}, r"model must be as .* got \['BPE', 0.5"),
        ({"model": {"type": "WordLevel", "unk_token": "x"}}, r"model must be as .*'WordLevel'"),
        ({"model": {"vocab": {"<|endoftext|>": 0}, "merges": []}}, "list of bytes without a token"),
        ({"post_processor": TEMPLATE}, "list of templates without the text"),
        (
            {"post_processor": {"type": "Sequence", "processors": [TEMPLATE]}},
            "list of templates without the text",
        ),
        ({"model": "x"}, "is not Qwen's tokenizer.json"),
        ({"pre_tokenizer": None}, "pre_tokenizer must be as in Qwen's tokenizer, got None"),
    ],
)
def test_a_foreign_tokenizer_is_one_line(
    change: dict[str, Any], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library panics at some of these, or embeds other tokens than the checkpoint's."""
    values = json.loads(TINY_TOKENIZER.read_text())
    if isinstance(change.get("model"), dict):
        change = {"model": values["model"] | change["model"]}
    bad = tmp_path / "tokenizer.json"
    bad.write_text(json.dumps(values | change))
    with pytest.raises(MissingRequirement, match=says):
        read_tokenizer(bad)
    assert capfd.readouterr().err == ""


def test_templates_that_add_special_tokens_are_read(tmp_path: Path) -> None:
    """Such as those of Qwen's embedding models. Queries and pages are encoded without them."""
    values = json.loads(TINY_TOKENIZER.read_text())
    text = {"Sequence": {"id": "A", "type_id": 0}}
    ids = {"x": {"id": "x", "ids": [0], "tokens": ["<|endoftext|>"]}}
    single = {"single": [text, *SPECIAL_ONLY["single"]], "special_tokens": ids}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values | {"post_processor": TEMPLATE | single | {"pair": [text]}}))
    texts = ["where is the tree?"]
    assert encode_queries(read_tokenizer(path), texts) == encode_queries(TOKENIZER, texts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_token_id": 7}, r"id of <\|image_pad\|> must be image_token_id, 7, got 5"),
        ({"vision_start_token_id": 4}, r"id of <\|vision_start\|> must be .*, 4, got 3"),
        ({"text_config": {"vocab_size": 1000}}, "ids must be below 1000, got 1535"),
    ],
)
def test_a_tokenizer_and_the_network_have_the_same_tokens(
    change: dict[str, Any], says: str
) -> None:
    config = ColQwen3Config.of_size("tiny")
    for name, value in change.items():
        if isinstance(value, dict):
            config.text_config.vocab_size = value["vocab_size"]
        else:
            setattr(config, name, value)
    with pytest.raises(MissingRequirement, match=says):
        check_tokens(TOKENIZER, config, TINY_TOKENIZER)


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
    with pytest.raises(MissingRequirement, match=r"not Qwen's tokenizer\.json"):
        read_tokenizer(bad)
    bad.write_text(TINY_TOKENIZER.read_text().replace("<|endoftext|>", "<eos>"))
    with pytest.raises(MissingRequirement, match="endoftext"):
        read_tokenizer(bad)
