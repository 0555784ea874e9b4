from __future__ import annotations

import json
from hashlib import sha256
from itertools import combinations

import pytest
from PIL import features

from colqwen_lab.errors import BadInput
from colqwen_lab.model import synthetic

EVERY = {
    split: [synthetic.facts(number, split) for number in range(synthetic.different(split))]
    for split in synthetic.SPLITS
}


@pytest.mark.parametrize(
    ("split", "pages", "queries", "relevance"),
    [
        ("train", "dd06fabf9eb7", "b54d245f87c2", "94dde85ddfef"),
        ("held-out", "24f57ce4471d", "f3f314f71b02", "ab9a816fdf86"),
    ],
)
def test_the_corpus_is_the_trained_one(
    split: str, pages: str, queries: str, relevance: str
) -> None:
    """The tiny weights, the goldens and the committed records depend on every byte."""

    def digest(parts: list[bytes]) -> str:
        return sha256(b"".join(parts)).hexdigest()[:12]

    assert digest([synthetic.query(n, split).encode() for n in range(200)]) == queries
    assert digest([json.dumps(synthetic.relevance(40, 60, split)).encode()]) == relevance
    if features.version("freetype2") == "2.14.3":  # another FreeType draws other glyphs
        widths = (synthetic.SMALL_WIDTH, synthetic.WIDTH)
        images = [synthetic.page(n, split, width) for width in widths for n in range(8)]
        assert digest([image.tobytes() for image in images]) == pages


def test_a_page_depends_on_its_split_and_number_alone() -> None:
    pages = [
        synthetic.page(number, split, 128) for split in synthetic.SPLITS for number in range(20)
    ]
    assert len({page.tobytes() for page in pages}) == len(pages)
    assert synthetic.page(7, "held-out", 128).tobytes() == pages[27].tobytes()
    again = synthetic.page(synthetic.different("train"), "train", 128)
    assert synthetic.facts(synthetic.different("train")) == synthetic.facts(0)
    assert again.tobytes() != pages[0].tobytes()


@pytest.mark.parametrize(
    ("width", "height"), [(1240, 1754), (synthetic.SMALL_WIDTH, 317), (64, 91)]
)
def test_pages_have_the_proportions_of_a4(width: int, height: int) -> None:
    page = synthetic.page(3, width=width)
    assert page.mode == "RGB"
    assert page.size == (width, height)


def test_held_out_combinations_are_never_in_training() -> None:
    train, held_out = ({has[:3] for has in EVERY[split]} for split in synthetic.SPLITS)
    assert not train & held_out
    assert len(train) + len(held_out) == len(synthetic.TOPICS) * len(synthetic.KINDS) * len(
        synthetic.COLOURS
    )
    assert len(held_out) == pytest.approx(0.2 * (len(train) + len(held_out)), rel=0.01)
    queries = [
        {synthetic.query(number, split) for number in range(1000)} for split in synthetic.SPLITS
    ]
    assert not queries[0] & queries[1]


@pytest.mark.parametrize("pair", list(combinations(range(3), 2)))
def test_every_pair_of_facts_is_in_training(pair: tuple[int, int]) -> None:
    train, held_out = (
        {tuple(has[i] for i in pair) for has in EVERY[split]} for split in synthetic.SPLITS
    )
    assert held_out <= train


def test_an_answer_has_all_that_its_query_names() -> None:
    judged = synthetic.relevance(40, synthetic.different("held-out"), "held-out")
    words = {**synthetic.KINDS, **synthetic.PLACES} | {
        name: (name,) for name in (*synthetic.TOPICS, *synthetic.COLOURS)
    }
    for number, answers in enumerate(judged.values()):
        query = synthetic.query(number, "held-out")
        assert f"p{number}" in answers
        for page in answers:
            has = EVERY["held-out"][int(page[1:])]
            named = has if number % 2 else has[:3]
            assert all(any(word in query for word in words[fact]) for fact in named), (query, has)
    named_facts = [synthetic.query_facts(number, "held-out") for number in range(40)]
    all_pages = {f"p{number}": has for number, has in enumerate(EVERY["held-out"])}
    missed = [
        page
        for wanted, answers in zip(named_facts, judged.values(), strict=True)
        for page, has in all_pages.items()
        if page not in answers and set(wanted) <= set(has)
    ]
    assert missed == []


def test_an_unknown_split() -> None:
    with pytest.raises(BadInput, match=r"split.*train, held-out"):
        synthetic.page(0, "test")
