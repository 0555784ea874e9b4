"""Variants against BASE on the same inputs: a control, texts and images, and a worse scheme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colqwen_lab.analysis.fidelity import Fidelities, loss
from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model import synthetic
from colqwen_lab.model.checkpoint import FolderCheckpoint
from colqwen_lab.model.config import VARIANTS
from colqwen_lab.model.loading import Loaded, load
from colqwen_lab.model.synthetic import SMALL_WIDTH
from colqwen_lab.options import FidelityOptions
from colqwen_lab.retrieval import evaluate
from colqwen_lab.retrieval.data import Corpus
from colqwen_lab.retrieval.data import load as load_corpus
from colqwen_lab.retrieval.evaluate import Embedded, embed, records_of
from colqwen_lab.retrieval.index import Format
from colqwen_lab.retrieval.record import Fidelity, read


def options(**values: Any) -> FidelityOptions:
    return FidelityOptions.of({"size": "tiny"} | values)


def run(path: Path, **values: Any) -> list[Fidelity]:
    return evaluate.evaluate(options(output=str(path), **values), print)[0]


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
    monkeypatch.setattr(evaluate, "subjects", lambda *_: [(VARIANTS["base"], None)] * 2)
    path = tmp_path / "rows.jsonl"
    records = run(path, model="base", data=str(texts))
    base, twin = records
    for name, values in twin.values.items():
        assert values == pytest.approx(base.values[name], abs=1e-12)
    assert twin.page_cosine.least == pytest.approx(1, abs=1e-12)
    assert twin.values["overlap@5"] == [1.0] * 12
    assert twin.values["Kendall's tau"] == pytest.approx([1.0] * 12)
    assert read(path) == [twin]


def test_a_checkpoint_folder_on_texts(texts: Path, tmp_path: Path, packed: Any) -> None:
    folder = packed("auto_round")
    path = tmp_path / "rows.jsonl"
    base, record = run(path, model=str(folder), data=str(texts), queries=8)
    assert record.variant == folder.name
    assert len(record.query_ids) == 8
    assert record.pages == 12
    assert record.weights_bytes < base.weights_bytes
    assert 0.5 < record.page_cosine.least <= record.page_cosine.q01 <= record.page_cosine.median < 1
    assert sum(record.backend.engaged.values()) == 28
    assert all(value > 0 for value in record.values["score error"])
    assert list(record.values) == list(base.values)
    assert read(path) == [base, record]


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        (
            "text_config",
            {"rope_theta": 10_000, "rope_parameters": None, "rms_norm_eps": 1e-5},
            "text_config.rope_theta 10000, not 5000000.0; text_config.rms_norm_eps 1e-05,",
        ),
        (
            "text_config",
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
            r"text_config.mrope_section \[3, 3, 2\], not \[6, 5, 5\]; "
            "text_config.num_attention_heads 8, not 4; text_config.num_key_value_heads 4, not 2; "
            "text_config.head_dim 16, not 32; name",
        ),
        ("vision_config", {"num_heads": 2}, "vision_config.num_heads 2, not 4;"),
    ],
)
def test_another_network_than_base_s_is_not_compared(
    part: str,
    changes: dict[str, Any],
    says: str,
    texts: Path,
    tmp_path: Path,
    packed: Any,
    edited: Any,
) -> None:
    """All tensors fit, and quantising would be blamed for the difference."""

    def change(config: dict[str, Any]) -> None:
        sections = [3, 3, 2] if "head_dim" in changes else [6, 5, 5]
        config[part] |= {"rope_scaling": {"mrope_section": sections}} | changes
        if "head_dim" in changes:
            config[part]["rope_parameters"]["mrope_section"] = sections

    folder = edited(packed("auto_round"), config=change)
    with pytest.raises(BadInput, match=f"must have the network of base, got {says}"):
        run(tmp_path / "rows.jsonl", model=str(folder), data=str(texts), queries=1, pages=2)


def test_the_default_file_is_named_after_models_size_and_data(
    texts: Path, tmp_path: Path, packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLQWEN_LAB_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.chdir(texts.parent)
    folder = packed("auto_round")
    lines: list[str] = []
    chosen = options(model=str(folder), data=f"../{texts.parent.name}/beir", queries=1, pages=2)
    records, corpus = evaluate.evaluate(chosen, lines.append)
    (path,) = (tmp_path / "out").glob("*.jsonl")
    assert path.name == f"fidelity-{folder.name}-tiny-..-{texts.parent.name}-beir.jsonl"
    assert read(path) == records
    assert corpus.query_ids == ["q0"]
    assert lines[0].endswith("queries dropped, as no page answers them: 10, such as 'q2'")
    assert lines[1].startswith("base tiny: nDCG@5 ")


def test_values_compare_the_scores_with_base_s(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [f"p{number}" for number in range(6)]
    relevance = {"q0": {"p0": 1}, "q1": {"p5": 1}}
    corpus = Corpus("texts", pages, str, ["q0", "q1"], ["a", "b"], relevance)
    base = np.array([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
    scores = torch.tensor([[1.0, 5, 4, 3, 2, 6], [1, 2, 3, 4, 5, 9]])
    unit = torch.eye(2)
    monkeypatch.setattr(evaluate, "embed", lambda _, items, __: ([unit] * len(items), 0.1))
    monkeypatch.setattr(evaluate.metrics, "maxsim", lambda *_: scores)
    turned = torch.tensor([[3**0.5, 1.0], [0, 1]]) / torch.tensor([[2.0], [1.0]])
    reference = Embedded([unit, turned], [unit] * 6, base)
    (record, *_), _ = records_of(tiny, corpus, 64, reference, variant="awq", size="tiny")
    values = record.values
    assert values["recall@5"] == [0, 1]
    assert values["overlap@5"] == [0.8, 1]
    assert values["Kendall's tau"] == [-0.2, 1]
    assert values["score error"] == pytest.approx([(5 / 6 + 5) / 6, 0.5 / 6], abs=1e-6)
    assert values["query cosine"] == pytest.approx([1, (3**0.5 / 2 + 1) / 2], abs=1e-6)
    assert record.top == [["p5", "p1", "p2", "p3", "p4", "p0"], pages[::-1]]


def test_texts_and_images_of_a_batch_keep_their_order(tiny: Loaded) -> None:
    pages = [
        "wheat prices rose",
        synthetic.page(0, width=128),
        "glaciers melt",
        synthetic.page(1, width=128),
    ]
    embeddings, elapsed_s = embed(tiny, pages, 64)
    assert elapsed_s > 0
    alone = [embed(tiny, [page], 64)[0][0] for page in pages]
    assert len(embeddings) == 4
    for ours, theirs in zip(embeddings, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)


def test_a_long_text_loses_its_end_and_is_counted(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = (
        "wheat prices rose",
        "wheat prices rose in the month of June, and in July they fell",
    )
    corpus = Corpus("texts", [short, long], str, ["q"], [long], {"q": {short: 1}})
    assert records_of(tiny, corpus, 64, None, variant="base", size="tiny")[0][0].cut == 0
    monkeypatch.setattr(evaluate, "TEXT_TOKENS", 20)
    (record, *_), base = records_of(tiny, corpus, 64, None, variant="base", size="tiny")
    assert record.cut == 2, "a page and a query"
    assert Fidelity.model_validate_json(record.to_line()) == record
    assert len(base.pages[1]) == len(base.queries[0]) == 20
    ids, suffix = evaluate.query_inputs(tiny, [long])["input_ids"][0].tolist(), [0] * 10
    monkeypatch.setattr(evaluate, "TEXT_TOKENS", 2048)
    assert ids == evaluate.query_inputs(tiny, [long])["input_ids"][0].tolist()[:10] + suffix
    monkeypatch.setattr(evaluate, "TEXT_CHARACTERS", 20)
    assert records_of(tiny, corpus, 64, None, variant="base", size="tiny")[0][0].cut == 2


def test_images_among_texts_and_a_broken_image(texts: Path, tmp_path: Path, packed: Any) -> None:
    """An image takes one page's place; the texts in its batch keep their scores."""
    rows, model = (texts / "corpus.jsonl").read_text().splitlines(), str(packed("auto_round"))
    before, _ = run(tmp_path / "rows.jsonl", model=model, data=str(texts))
    rows[3], rows[5] = ('{"_id": "d3", "image": "a.png"}', '{"_id": "d5", "image": "b.png"}')
    (texts / "corpus.jsonl").write_text("\n".join(rows))
    synthetic.page(0, width=128).save(texts / "a.png")
    (texts / "b.png").write_text("no image")
    lines: list[str] = []
    chosen = options(model=model, data=str(texts), output=str(tmp_path / "mixed.jsonl"))
    (base, _), corpus = evaluate.evaluate(chosen, lines.append)
    assert (base.pages, base.skipped, len(base.query_ids)) == (11, 1, 11)
    assert corpus.skipped == 1
    assert lines[0].startswith("page d5, b.png")
    first = dict(zip(before.query_ids, (row[0] for row in before.top), strict=True))
    assert all(
        row[0] == first[query]
        for query, row in zip(base.query_ids, base.top, strict=True)
        if first[query] not in ("d3", "d5")
    )


def test_cosines_and_scores_use_the_same_inputs(
    texts: Path, tmp_path: Path, edited: Any, packed: Any
) -> None:
    """A head of half the size gives the same unit vectors, so nothing is lost."""

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("embedding_proj_layer.weight", "embedding_proj_layer.bias"):
            tensors[name] = tensors[name] / 2

    folders = (packed("auto_round"), edited(packed("auto_round"), halve))
    ours, theirs = (
        run(tmp_path / "rows.jsonl", model=str(folder), data=str(texts))[1] for folder in folders
    )
    assert ours.values == theirs.values
    assert ours.top == theirs.top


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weights": "random"}, BadInput, "weights must be auto, hub or a folder, got random"),
        ({"weights": "DIR"}, BadInput, "weights must be auto or hub to quantise awq from, got"),
        ({"margin": 0}, BadInput, "margin must be"),
        ({"pages": -1}, BadInput, "pages must be"),
        ({"data": "nothing"}, BadInput, "data must be .* got 'nothing'"),
        ({"model": "W5A16"}, BadInput, "W5A16"),
        ({"size": "4b", "queries": 1}, MissingRequirement, "cannot get TomoroAI"),
        (
            {"model": "PACKED", "weights": "DIR", "size": "mid"},
            MissingRequirement,
            "size must be tiny for .* got mid",
        ),
        ({"visual_tokens": 0}, BadInput, "visual_tokens must be"),
        (
            {"data": "TEXTS", "visual_tokens": 64},
            BadInput,
            "visual_tokens must be 1280 where no page is an image, got 64 for folder beir #",
        ),
        ({"iters": -1}, BadInput, r"iters must be 0 \(plain rounding\) to 1000, got -1"),
        ({"iters": 1001}, BadInput, "iters must be .* got 1001"),
        ({"model": "base"}, BadInput, "model must be .* to compare with base; got base"),
        ({"model": "awq,AWQ"}, BadInput, "model must be different ones of awq, .* got awq,AWQ"),
    ],
)
def test_wrong_values(
    changed: dict[str, Any],
    error: type[Exception],
    message: str,
    base_folder: Path,
    packed: Any,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed_folder = str(packed("auto_round"))
    folders = {"DIR": str(base_folder), "TEXTS": str(texts), "PACKED": packed_folder}
    changed = {name: folders.get(value, value) for name, value in changed.items()}
    monkeypatch.setattr(evaluate, "records_of", lambda *_, **__: pytest.fail("must not embed"))
    with pytest.raises(error, match=message):
        run(tmp_path / "rows.jsonl", **{"size": "tiny", "pages": 2} | changed)


def test_a_size_of_the_environment_is_named(
    base_folder: Path, packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLQWEN_LAB_SIZE", "mid")
    model, weights = str(packed("auto_round")), str(base_folder)
    message = "size must be tiny for .*, got mid from COLQWEN_LAB_SIZE"
    with pytest.raises(MissingRequirement, match=message):
        run(tmp_path / "rows.jsonl", model=model, weights=weights, size="auto", pages=2)


def test_schemes_quantised_here_come_plain_too() -> None:
    def chosen(size: str, **values: Any) -> list[tuple[str, int | None]]:
        subjects = evaluate.subjects(options(plain=True, iters=5, **values), size)
        return [(variant.name, recipe and recipe.iters) for variant, recipe in subjects]

    assert chosen("tiny", model="base,W2A16,some/checkpoint") == [
        *(("base", None), ("W2A16", 5), ("W2A16", 0), ("some/checkpoint", None)),
    ]
    assert chosen("4b", model="awq") == [("base", None), ("awq", None)]


def test_a_folder_named_base_is_compared_with_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base, other = evaluate.subjects(options(model=str(tmp_path / "base")), "tiny")
    assert (base[0].name, base[0].folder) == ("base", None)
    assert (other[0].name, other[0].folder) == ("./base", tmp_path / "base")


@pytest.mark.exhaustive
def test_two_bits_are_worse_than_four_and_eight_equal_base(tmp_path: Path) -> None:
    """Plain rounding of the trained tiny model, on all held-out pages and queries."""
    records = run(tmp_path / "rows.jsonl", model="W8A16,W4A16,W2A16", iters=0)
    base, eight, four, two = records
    assert np.mean(base.values["nDCG@5"]) > 0.8
    row = loss(base, eight, "nDCG@5")
    assert row.low is not None
    assert row.high is not None
    assert row.low <= 0 <= row.high
    assert row.verdict not in ("worse", "better")
    for reference in (base, four):
        row = loss(reference, two, "nDCG@5")
        assert row.verdict == "worse"
        assert row.high is not None
        assert row.high < 0
    fidelities = Fidelities(tuple(records))
    assert fidelities.query("worst", two.label) != fidelities.query("best", two.label)


def test_embeddings_that_are_not_finite_are_named(base_folder: Path, edited: Any) -> None:
    """Finite weights may overflow in the forward."""
    head = "embedding_proj_layer.weight"
    folder = edited(base_folder, tensors=lambda tensors: tensors[head].fill_(3e38))
    loaded = load(FolderCheckpoint(folder), torch.device("cpu"))
    with pytest.raises(MissingRequirement, match=r"edited#.* gives embeddings that are not finite"):
        embed(loaded, ["wheat"], 1280)


def test_index_formats_share_the_embeddings(tiny: Loaded, tmp_path: Path) -> None:
    """One forward a batch; the first record is of pages as they are, and each has its bytes."""
    pages = ["wheat prices rose", "glaciers melt in summer", "a bridge of steel"]
    relevance = {"q": {pages[0]: 1}}
    corpus = Corpus("texts", pages, str, ["q"], ["prices of wheat"], relevance)
    formats = [Format.parse(name) for name in ("int8", "binary", "pool2")]
    records, base = records_of(
        tiny, corpus, 64, None, formats, variant="base", size="tiny", iters=None
    )
    (alone, *_), _ = records_of(tiny, corpus, 64, None, variant="base", size="tiny")
    assert [r.label for r in records] == ["base", "base int8", "base binary", "base pool2"]
    assert records[0].values == alone.values
    lengths = [len(page) for page in base.pages]
    for record, vector_bytes in zip(records[:3], (640, 322, 40), strict=True):
        assert record.page_bytes is not None
        assert 0 < record.page_bytes - vector_bytes * sum(lengths) / 3 < 64
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(record.to_line() for record in records))
    fidelities = Fidelities.load(path)
    assert [r.label for r in fidelities.records] == [r.label for r in records]
    assert "index kB a page" in fidelities.table()
    smallest = min(records, key=lambda r: r.page_bytes or 0)
    assert fidelities.frontier(index=True)[0].label == smallest.label
    assert fidelities.frontier() == [fidelities.base]
    assert len(fidelities.plot("index").axes) == 1


def test_a_wrong_format_is_one_line_before_anything_runs() -> None:
    chosen = FidelityOptions.of({"model": "awq", "size": "tiny", "formats": "int4"})
    with pytest.raises(BadInput, match="format must be bfloat16, float16, int8"):
        evaluate.evaluate(chosen, lambda line: pytest.fail("must not start"))


def test_another_tokenizer_is_one_line(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus("texts", ["a b"], str, ["q"], ["wheat prices rose"], {"q": {"a b": 1}})
    _, base = records_of(tiny, corpus, 64, None, variant="base", size="tiny")
    longer = Embedded([torch.cat([base.queries[0]] * 2)], base.pages, base.scores)
    with pytest.raises(BadInput, match="splits the queries otherwise than base"):
        records_of(tiny, corpus, 64, longer, variant="awq", size="tiny")


def test_queries_with_the_same_answers_are_a_group() -> None:
    relevance = {"a": {"p": 1, "q": 0}, "b": {"q": 1}, "c": {"p": 2}, "d": {"p": 1, "q": 1}}
    assert evaluate.groups_of(Corpus("", [], str, [*"abcd"], [""] * 4, relevance)) == [0, 1, 0, 2]


@pytest.mark.exhaustive
def test_what_a_small_index_costs_on_the_held_out_set(tiny: Loaded) -> None:
    """int8, and pooling by 3, find pages as well as 16 bits; signs and pooling by 8 rank worse.

    The held-out pages differ in 96 facts, which 84 different queries ask for. More phrasings do not
    narrow the intervals: that of nDCG@5 of binary and of pooling by 8 reaches both sides of the
    margin. What both do to the first five pages is beyond doubt.
    """
    corpus = load_corpus("generated", 384, 96, SMALL_WIDTH, print)
    names = ("int8", "int8-pool3", "binary", "hamming", "pool8", "dims64")
    forms = [Format.parse(name) for name in names]
    records, _ = records_of(tiny, corpus, 1280, None, forms, variant="base", size="tiny")
    base = records[0]
    assert len(set(base.query_groups or [])) == 84
    by_format = {record.index_format: record for record in records}
    for metric, verdicts in {
        "nDCG@5": ("same", "same", "inconclusive", "worse", "inconclusive", "worse"),
        "overlap@5": ("same", "worse", "worse", "worse", "worse", "worse"),
    }.items():
        losses = [loss(base, by_format[name], metric) for name in names]
        assert tuple(row.verdict for row in losses) == verdicts, metric
    overlap = {name: loss(base, by_format[name], "overlap@5") for name in names}
    assert max(overlap[name].high or 0 for name in ("binary", "hamming", "pool8")) < -0.05
