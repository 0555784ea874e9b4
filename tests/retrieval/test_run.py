"""Variants against BASE on one set of inputs: what must come out of a control, of texts, and of a worse scheme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import colqwen_lab as lab
from colqwen_lab.analysis.fidelity import loss
from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model import synthetic
from colqwen_lab.model.config import VARIANTS
from colqwen_lab.retrieval import run
from colqwen_lab.retrieval.data import Corpus
from colqwen_lab.retrieval.record import read


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Text to text: each query is the beginning of its page."""
    words = [
        "wheat prices rose",
        "glaciers melt in June",
        "museums close early",
        "traffic on the coast",
    ] * 3
    pages = [f"{text} in the year {1990 + number}" for number, text in enumerate(words)]
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": f"d{number}", "text": page}) for number, page in enumerate(pages)]
    queries = [
        json.dumps({"_id": f"q{number}", "text": page[:20]}) for number, page in enumerate(pages)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(corpus))
    (folder / "queries.jsonl").write_text("\n".join(queries))
    (folder / "qrels" / "test.tsv").write_text(
        "".join(f"q{number}\td{number}\t1\n" for number in range(len(pages)))
    )
    return folder


def test_base_against_itself_is_the_same(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = [run.Subject(VARIANTS["base"])] * 2
    monkeypatch.setattr(run, "subjects", lambda *_: twins)
    found = lab.fidelity("base", str(texts), size="tiny", output=str(tmp_path / "rows.jsonl"))
    _, twin = found.records
    assert all(abs(loss.difference) < 1e-12 for loss in found.all_losses(twin))
    assert {loss.told for loss in found.all_losses(twin)} == {"cannot tell: 12 queries, 30 needed"}
    assert twin.page_cosine.least == pytest.approx(1, abs=1e-12)
    assert twin.values["overlap@5"] == [1.0] * 12
    assert twin.values["Kendall's tau"] == pytest.approx([1.0] * 12)
    assert read(tmp_path / "rows.jsonl") == list(found.records)


def test_a_checkpoint_folder_on_texts(texts: Path, tmp_path: Path, packed: Any) -> None:
    folder = packed("auto_round")
    found = lab.fidelity(
        str(folder), str(texts), size="tiny", queries=8, output=str(tmp_path / "rows.jsonl")
    )
    record = found.pick()
    assert record.variant == folder.name
    assert len(record.query_ids) == 8
    assert record.pages == 12
    assert record.weights_bytes < found.base.weights_bytes
    assert 0.5 < record.page_cosine.least <= record.page_cosine.q01 <= record.page_cosine.median < 1
    assert sum(record.backend.engaged.values()) == 28
    assert all(value > 0 for value in record.values["score error"])
    assert [loss.metric for loss in found.all_losses(record)] == list(found.base.values)


def test_values_are_of_the_variant_s_scores_against_base_s() -> None:
    pages = [f"p{number}" for number in range(6)]
    corpus = Corpus("made", pages, str, ["q0", "q1"], ["", ""], {"q0": {"p0": 1}, "q1": {"p5": 1}})
    base = np.array([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
    scores = np.array([[1.0, 5, 4, 3, 2, 6], [1, 2, 3, 4, 5, 9]])
    made = run._values(scores, base, [torch.ones(2), torch.tensor([0.5, 1.0])], corpus)
    values = made["values"]
    assert values["recall@5"] == [0, 1]
    assert values["overlap@5"] == [0.8, 1]
    assert values["Kendall's tau"] == [-0.2, 1]
    assert values["score error"] == pytest.approx([(5 / 6 + 5) / 6, 0.5 / 6], abs=1e-6)
    assert values["query cosine"] == [1, 0.75]
    assert made["top"] == [["p5", "p1", "p2", "p3", "p4", "p0"], pages[::-1]]


def test_images_among_texts_and_one_that_is_broken(
    texts: Path, tmp_path: Path, packed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts keep their scores beside the image in their batch, which takes one page's place."""
    rows, model = (texts / "corpus.jsonl").read_text().splitlines(), str(packed("auto_round"))
    before = lab.fidelity(model, str(texts), size="tiny", output=str(tmp_path / "rows.jsonl"))
    rows[3], rows[5] = ('{"_id": "d3", "image": "a.png"}', '{"_id": "d5", "image": "b.png"}')
    (texts / "corpus.jsonl").write_text("\n".join(rows))
    synthetic.page(0, width=128).save(texts / "a.png")
    (texts / "b.png").write_text("no image")
    found = lab.fidelity(model, str(texts), size="tiny", output=str(tmp_path / "mixed.jsonl"))
    assert (found.base.pages, found.base.refused, len(found.base.query_ids)) == (11, 1, 11)
    assert "page d5, b.png, is left out" in capsys.readouterr().err
    assert "11 pages · 1 left out" in found.conditions()
    first = dict(zip(before.base.query_ids, (row[0] for row in before.base.top), strict=True))
    assert all(
        row[0] == first[query]
        for query, row in zip(found.base.query_ids, found.base.top, strict=True)
        if first[query] not in ("d3", "d5")
    )


def test_cosines_and_scores_are_of_the_same_inputs(
    texts: Path, tmp_path: Path, edited: Any, packed: Any
) -> None:
    """With a head of half the size every unit vector stays, so nothing is lost."""

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("embedding_proj_layer.weight", "embedding_proj_layer.bias"):
            tensors[name] = tensors[name] / 2

    one, other = packed("auto_round"), edited(packed("auto_round"), halve)
    found = [
        lab.fidelity(
            str(folder), str(texts), size="tiny", output=str(tmp_path / "rows.jsonl")
        ).pick()
        for folder in (one, other)
    ]
    assert found[0].values == found[1].values
    assert found[0].top == found[1].top


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"weights": "random"}, BadInput, "random weights say nothing of retrieval"),
        ({"weights": "DIR"}, BadInput, "quantised from the default weights, not from"),
        ({"margin": 0}, BadInput, "margin 0.0; valid: above 0"),
        ({"data": "nothing"}, BadInput, "unknown data 'nothing'"),
        ({"model": "W5A16"}, BadInput, "unknown model 'W5A16'"),
        ({"size": "4b", "queries": 1}, MissingRequirement, "cannot get TomoroAI"),
        ({"visual_tokens": 0}, BadInput, "visual_tokens 0"),
        (
            {"data": "TEXTS", "visual_tokens": 64},
            BadInput,
            "visual_tokens 64, and no page of folder beir #.* is an",
        ),
        ({"iters": -1}, BadInput, "iters -1; valid: 0 for plain rounding, to 1000"),
        ({"iters": 1001}, BadInput, "iters 1001"),
        ({"model": "base"}, BadInput, "base is what models are held against"),
        ({"model": "awq,AWQ"}, BadInput, "two models are called awq"),
    ],
)
def test_wrong_values(
    given: dict[str, Any],
    error: type,
    says: str,
    base_folder: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = {"DIR": str(base_folder), "TEXTS": str(texts)}
    given = {name: folders.get(value, value) for name, value in given.items()}
    monkeypatch.setattr(
        run, "_one", lambda *_: pytest.fail("must be refused before anything is embedded")
    )
    with pytest.raises(error, match=says):
        lab.fidelity(**{"size": "tiny", "pages": 2, "output": str(tmp_path / "rows.jsonl")} | given)


def test_schemes_that_are_quantised_here_come_plain_too() -> None:
    asked = run.subjects(["base", "W2A16", "some/checkpoint"], "tiny", 5, plain=True)
    assert list(map(str, asked)) == ["base", "W2A16", "W2A16 plain", "some/checkpoint"]
    assert [subject.iters for subject in asked] == [None, 5, 0, None]
    assert list(map(str, run.subjects(["awq"], "4b", 5, plain=True))) == ["base", "awq"]


def test_two_bits_are_worse_than_four_and_eight_are_not_told_from_base(tmp_path: Path) -> None:
    """Plain rounding of the trained tiny model, on all pages and queries held out."""
    found = lab.fidelity(
        "W8A16,W4A16,W2A16", size="tiny", iters=0, output=str(tmp_path / "rows.jsonl")
    )
    eight, four, two = found.others
    assert np.mean(found.base.values["nDCG@5"]) > 0.8
    row = found.loss(eight, "nDCG@5")
    assert row.low is not None
    assert row.high is not None
    assert row.low <= 0 <= row.high
    assert row.verdict not in ("worse", "better")
    for against in (found.base, four):
        row = loss(against, two, "nDCG@5")
        assert row.verdict == "worse"
        assert row.high is not None
        assert row.high < 0
    assert found.query("worst", two.label) != found.query("best", two.label)
