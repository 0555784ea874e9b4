"""Queries, pages and relevance: synthetic pages, a ViDoRe benchmark, or a folder in BEIR layout.

A page is an image or a text, read when it is needed. Queries without a relevant page are dropped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import pandas as pd
from huggingface_hub import HfApi
from huggingface_hub.utils import logging
from PIL import Image
from pydantic import BaseModel, Field, model_validator

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model import synthetic
from colqwen_lab.model.inputs import decoding, digest, to_rgb

GENERATED, VIDORE = "generated", "vidore:"
#: Held-out pages with different facts; later pages repeat them.
HELD_OUT = synthetic.different("held-out")
SUBSETS = ("corpus", "queries", "qrels")
COLUMNS = (
    "columns must be query, image; or in subsets corpus (corpus-id, image), queries (query-id, "
    "query), qrels (query-id, corpus-id, score)"
)
QRELS = ("query-id", "corpus-id", "score")
Page = Image.Image | str
T = TypeVar("T")


@dataclass(frozen=True)
class Corpus:
    """A data set; `label` names it with its revision, `page` reads a page by its id.

    `relevance` maps query id and page id to a score, above 0 where the page answers the query.
    `skipped` counts pages that could not be read; they have no id here.
    """

    label: str
    page_ids: list[str]
    page: Callable[[str], Page]
    query_ids: list[str]
    queries: list[str]
    relevance: dict[str, dict[str, int]]
    skipped: int = 0


class _Source(NamedTuple):
    """All of a data set: `queries` are texts by id, `qrels` has the columns QRELS."""

    label: str
    page_ids: list[str]
    page: Callable[[str], Page]
    queries: pd.Series[str]
    qrels: pd.DataFrame


def load(
    source: str,
    queries: int = 0,
    pages: int = 0,
    width: int = synthetic.WIDTH,
    progress: Callable[[str], object] = warnings.warn,
) -> Corpus:
    """The data set named `source`, without unreadable pages and unanswered queries.

    `source` is `generated` (synthetic pages held out of training, `width` pixels wide),
    `vidore:NAME` (docvqa_test_subsampled, an OWNER/NAME or a folder with the same columns), or a
    folder in BEIR layout: corpus.jsonl (`_id`, `text` or the path of an `image`), queries.jsonl,
    qrels/test.tsv. `queries` and `pages` are the most to use; 0 means all. Raises BadInput for an
    unusable data set, MissingRequirement if the package `datasets` or the hub is needed.
    """
    if source == GENERATED:
        return _generated(queries or HELD_OUT, pages or HELD_OUT, width)
    if source.startswith(VIDORE) and source != VIDORE:
        everything = _vidore(source.removeprefix(VIDORE))
    elif os.path.isdir(source):
        everything = _folder(Path(source))
    else:
        raise BadInput(f"data must be {GENERATED}, {VIDORE}NAME or a BEIR folder, got {source!r}")
    return _usable(everything, queries, pages, progress)


def _usable(source: _Source, queries: int, pages: int, progress: Callable[[str], object]) -> Corpus:
    """The first pages that can be read, and the first queries that they answer."""
    label, page_ids, page, texts, qrels = source
    for kind, ids in (("page", pd.Index(page_ids)), ("query", texts.index)):
        if not ids.is_unique:
            raise BadInput(f"{label}: duplicate {kind} id {ids[ids.duplicated()][0]!r}")
    for query, text in texts.items():
        if not isinstance(text, str):
            raise BadInput(f"{label}: query {query!r} must be a text, got {text!r}")
    page_ids, kept = page_ids[: pages or None], []
    for page_id in page_ids:
        try:
            page(page_id)
            kept.append(page_id)
        except BadInput as error:
            progress(str(error))
    if skipped := len(page_ids) - len(kept):
        progress(f"{label}: {skipped} of {len(page_ids)} pages skipped")
    qrels = qrels[qrels["corpus-id"].isin(kept)]
    answered = texts.index.isin(qrels["query-id"][qrels["score"] > 0])
    texts = texts[answered][: queries or None]
    if texts.empty:
        raise BadInput(f"{label}: none of {len(kept)} pages answers a query")
    scores = qrels.set_index("corpus-id").groupby("query-id")["score"]
    relevance = {query: scores.get_group(query).to_dict() for query in texts.index}
    return Corpus(label, kept, page, [*texts.index], [*texts], relevance, skipped)


def _generated(queries: int, pages: int, width: int) -> Corpus:
    split = "held-out"
    relevance = synthetic.relevance(queries, pages, split)
    answered = [query for query, answers in relevance.items() if answers]
    return Corpus(
        f"generated, held out, {width} px",
        [f"p{number}" for number in range(pages)],
        lambda page_id: synthetic.page(int(page_id[1:]), split, width),
        answered,
        [synthetic.query(int(query[1:]), split) for query in answered],
        {query: relevance[query] for query in answered},
    )


def _folder_label(folder: Path, files: Iterable[Path]) -> str:
    return f"folder {folder.resolve().name} #{digest(files)}"


# ---------------------------------------------------------------- a folder in BEIR layout


class _Query(BaseModel, coerce_numbers_to_str=True):
    id: str = Field(alias="_id")
    text: str


class _Page(BaseModel, coerce_numbers_to_str=True):
    id: str = Field(alias="_id")
    title: str | None = None
    text: str | None = None
    image: str | None = None

    @model_validator(mode="after")
    def _valid(self) -> Self:
        path = Path(self.image or "")
        outside = path.is_absolute() or ".." in path.parts
        if outside or (self.text is None and not self.image):
            raise ValueError
        return self


def _judgement(line: str) -> tuple[str, str, int]:
    query, page, score = line.split("\t")
    return query, page, 0 if score == "score" else int(score)  # 0: the header


def _folder(folder: Path) -> _Source:
    files = [folder / name for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")]
    valid = "a JSON object with _id and a text, or the path of an image within the folder"
    rows = _rows(files[0], _Page.model_validate_json, valid)
    by_id = {row.id: row for row in rows}
    queries = _rows(files[1], _Query.model_validate_json, "a JSON object with _id, text")
    judgements = _rows(files[2], _judgement, "QUERY-ID, CORPUS-ID and a whole SCORE, by tabs")

    def page(page_id: str) -> Page:
        row = by_id[page_id]
        if not row.image:
            return " ".join(filter(None, (row.title, row.text)))
        with decoding(f"page {row.id}, {row.image},"), Image.open(folder / row.image) as image:
            return to_rgb(image)

    return _Source(
        _folder_label(folder, [*files, *(folder / row.image for row in rows if row.image)]),
        [row.id for row in rows],
        page,
        pd.Series([row.text for row in queries], [row.id for row in queries]),
        pd.DataFrame(judgements, columns=QRELS),
    )


def _rows(path: Path, parse: Callable[[str], T], valid: str) -> list[T]:
    """Every line that is not blank, parsed; raises BadInput where it is not `valid`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}; a BEIR folder must hold it") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [parse(line)] if line.strip() else []
        except ValueError:
            raise BadInput(f"{path} line {number} must be {valid}, got {line!r:.100}") from None
    return rows


# ---------------------------------------------------------------- ViDoRe


def _vidore(name: str) -> _Source:
    """A ViDoRe data set in either layout.

    Version 1 has one subset with a question and its page in a row. Later versions have the subsets
    corpus, queries and qrels.
    """
    try:
        import datasets
    except ImportError:
        raise MissingRequirement(
            'ViDoRe needs the package datasets: `pip install -e ".[data]"`'
        ) from None
    repository, revision = name, None
    if os.path.isdir(name):
        label = _folder_label(Path(name), sorted(filter(Path.is_file, Path(name).rglob("*"))))
    else:
        repository = name if "/" in name else f"vidore/{name}"
        with suppress(Exception):  # without a network the cached copy serves
            revision = HfApi().dataset_info(repository, timeout=20).sha
        label = f"{repository}@{revision or 'cached'}"
    subset = partial(datasets.load_dataset, repository, split="test", revision=revision)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # hides a line for each retry
    try:
        configs = datasets.get_dataset_config_names(repository, revision=revision)
        if len(configs) == 1:
            return _questions(label, subset(configs[0]))
        if set(SUBSETS) <= set(configs):
            return _subsets(label, *map(subset, SUBSETS))
    except BadInput:
        raise
    except Exception as error:  # of the hub, of the builders of `datasets`, of pyarrow
        raise MissingRequirement(
            f"cannot get {repository}: {error!s:.200}; where there is a network: "
            f"`hf download --repo-type dataset {repository}`"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    valid = f"one subset, or {', '.join(SUBSETS)}"
    raise BadInput(f"{repository} must have {valid}, got {', '.join(configs)}")


def _columns(rows: Any, *columns: str) -> Any:
    """`rows` with ids named as in version 2 (corpus-id, not corpus_id); raises BadInput."""
    rows = rows.rename_columns({name: name.replace("_id", "-id") for name in rows.column_names})
    if not set(columns) <= set(rows.column_names):
        raise BadInput(f"{COLUMNS}; got {', '.join(rows.column_names)}")
    return rows


def _images(rows: Any, ids: list[str]) -> Callable[[str], Page]:
    def page(page_id: str) -> Page:
        with decoding(f"page {page_id}"):
            if (image := rows[ids.index(page_id)]["image"]) is None:
                raise ValueError("its image is null")
            return to_rgb(image)

    return page


def _subsets(label: str, corpus: Any, queries: Any, qrels: Any) -> _Source:
    corpus = _columns(corpus, "corpus-id", "image")
    pages = list(map(str, corpus["corpus-id"]))
    queries = _columns(queries, "query-id", "query")
    texts = pd.Series(list(queries["query"]), map(str, queries["query-id"]), dtype=object)
    types = {"query-id": str, "corpus-id": str, "score": int}
    judged = _columns(qrels, *QRELS).to_pandas().astype(types)
    return _Source(label, pages, _images(corpus, pages), texts, judged)


def _questions(label: str, rows: Any) -> _Source:
    """A page has a row for each of its questions, with one file name; rows may lack a question."""
    rows = _columns(rows, "query", "image")
    frame = rows.remove_columns("image").to_pandas()
    names = frame.get("image_filename", frame.index.to_series()).astype(str)
    pages, questions = names.drop_duplicates(), frame["query"].replace("", None).dropna()
    codes, texts = pd.factorize(questions)
    ids = [f"q{code}" for code in codes]
    qrels = pd.DataFrame({"query-id": ids, "corpus-id": names[questions.index], "score": 1})
    return _Source(
        label,
        list(pages),
        _images(rows.select(pages.index), list(pages)),
        pd.Series(texts, list(dict.fromkeys(ids))),
        qrels,
    )
