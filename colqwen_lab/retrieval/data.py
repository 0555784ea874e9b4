"""Queries, pages and relevance: synthetic pages, a ViDoRe benchmark, or a folder in BEIR layout.

A page is an image or a text, read when it is needed. Queries without a relevant page are dropped.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
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
Page = Image.Image | str
Progress = Callable[[str], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Corpus:
    """A data set; `label` names it with its revision, `page` reads a page by its number.

    `relevance` maps query id and page id to a score, above 0 where the page answers the query.
    `skipped` counts pages that could not be read; they have no id here.
    """

    label: str
    page_ids: list[str]
    page: Callable[[int], Page]
    query_ids: list[str]
    queries: list[str]
    relevance: dict[str, dict[str, int]]
    skipped: int = 0


class _Source(NamedTuple):
    """All of a data set: page ids, queries (id, text), judgements (query id, page id, score)."""

    label: str
    page_ids: list[str]
    page: Callable[[int], Page]
    queries: list[tuple[str, str]]
    judgements: list[tuple[str, str, int]]


def load(
    source: str,
    queries: int = 0,
    pages: int = 0,
    width: int = synthetic.WIDTH,
    progress: Progress = warnings.warn,
) -> Corpus:
    """The data set named `source`, without unreadable pages and unanswered queries.

    Args:
        source: `generated` (synthetic pages held out of training); `vidore:NAME` (a ViDoRe data set
            such as docvqa_test_subsampled, or an OWNER/NAME or folder with its columns); or a
            folder in BEIR layout: corpus.jsonl (`_id`, `text` or the path of an `image`),
            queries.jsonl, qrels/test.tsv.
        queries: the most queries; 0 means all.
        pages: the most pages; 0 means all.
        width: of a generated page, in pixels.
        progress: receives a line for each skipped page.

    Raises:
        BadInput: no such data set, or it cannot be read.
        MissingRequirement: the package `datasets` or the hub is needed.
    """
    if source == GENERATED:
        everything = _generated(pages or HELD_OUT, queries or HELD_OUT, width)
    elif source.startswith(VIDORE) and source != VIDORE:
        everything = _vidore(source.removeprefix(VIDORE))
    elif os.path.isdir(source):
        everything = _folder(Path(source))
    else:
        raise BadInput(f"data must be {GENERATED}, {VIDORE}NAME or a BEIR folder, got {source!r}")
    return _corpus(everything, queries, pages, progress, check=source != GENERATED)


def _corpus(source: _Source, queries: int, pages: int, progress: Progress, check: bool) -> Corpus:
    """The first pages and the queries that they answer; with `check`, only readable pages."""
    label, page_ids, page, rows, judgements = source
    for kind, ids in (("page", page_ids), ("query", [query for query, _ in rows])):
        if repeated := [name for name, count in Counter(ids).items() if count > 1]:
            raise BadInput(f"{label}: duplicate {kind} id {repeated[0]!r}")
    for query, text in rows:
        if not isinstance(text, str):
            raise BadInput(f"{label}: query {query!r} must be a text, got {text!r}")
    page_ids = page_ids[: pages or None]
    kept = {}
    for number, page_id in enumerate(page_ids):
        try:
            if check:
                page(number)
            kept[page_id] = number
        except BadInput as error:
            progress(str(error))
    skipped = len(page_ids) - len(kept)
    if skipped:
        progress(f"{label}: {skipped} of {len(page_ids)} pages skipped")
    relevance: dict[str, dict[str, int]] = defaultdict(dict)
    for query, page_id, score in judgements:
        if page_id in kept:
            relevance[query][page_id] = score
    answered = [row for row in rows if any(score > 0 for score in relevance[row[0]].values())]
    if not answered:
        raise BadInput(f"{label}: none of {len(kept)} pages answers a query")
    numbers = list(kept.values())
    query_ids, texts = map(list, zip(*answered[: queries or None], strict=True))
    judged = {query: relevance[query] for query in query_ids}
    return Corpus(
        label, list(kept), lambda at: page(numbers[at]), query_ids, texts, judged, skipped
    )


def _generated(pages: int, queries: int, width: int) -> _Source:
    split = "held-out"
    relevance = synthetic.relevance(queries, pages, split)
    return _Source(
        f"generated, held out, {width} px",
        [f"p{number}" for number in range(pages)],
        partial(synthetic.page, split=split, width=width),
        [(f"q{number}", synthetic.query(number, split)) for number in range(queries)],
        [(query, page, 1) for query, answers in relevance.items() for page in answers],
    )


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
    rows = _rows(
        files[0],
        _Page.model_validate_json,
        "a JSON object with _id and a text, or the path of an image within the folder",
    )
    queries = _rows(files[1], _Query.model_validate_json, "a JSON object with _id, text")
    qrels = _rows(files[2], _judgement, "QUERY-ID, CORPUS-ID and a whole SCORE, by tabs")

    def page(number: int) -> Page:
        row = rows[number]
        if not row.image:
            return " ".join(text for text in (row.title, row.text) if text)
        with decoding(f"page {row.id}, {row.image},"), Image.open(folder / row.image) as image:
            return to_rgb(image)

    content = digest([*files, *(folder / row.image for row in rows if row.image)])
    return _Source(
        f"folder {folder.resolve().name} #{content}",
        [row.id for row in rows],
        page,
        [(row.id, row.text) for row in queries],
        qrels,
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
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        label = f"folder {Path(name).resolve().name} #{digest(files)}"
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


def _table(rows: Any, *columns: str) -> Any:
    """`rows` with ids named as in version 2 (corpus-id, not corpus_id); raises BadInput."""
    names = {name: name.replace("_id", "-id") for name in rows.column_names if "_id" in name}
    rows = rows.rename_columns(names)
    if not set(columns) <= set(rows.column_names):
        raise BadInput(
            "columns must be query, image; or in subsets corpus (corpus-id, image), queries "
            "(query-id, query), qrels (query-id, corpus-id, score); got "
            f"{', '.join(rows.column_names)}"
        )
    return rows


def _reader(rows: Any, ids: Sequence[str], column: str = "image") -> Callable[[int], Page]:
    def page(number: int) -> Page:
        with decoding(f"page {ids[number]}"):
            content = rows[number][column]
            if content is None:
                raise ValueError(f"its {column} is null")
            return content if isinstance(content, str) else to_rgb(content)

    return page


def _subsets(label: str, corpus: Any, queries: Any, qrels: Any) -> _Source:
    texts = "text" in corpus.column_names and "image" not in corpus.column_names
    column = "text" if texts else "image"
    corpus, queries = _table(corpus, "corpus-id", column), _table(queries, "query-id", "query")
    qrels = _table(qrels, "query-id", "corpus-id", "score")
    ids = list(map(str, corpus["corpus-id"]))
    return _Source(
        label,
        ids,
        _reader(corpus, ids, column),
        [(str(row["query-id"]), row["query"]) for row in queries],
        [(str(row["query-id"]), str(row["corpus-id"]), int(row["score"])) for row in qrels],
    )


def _questions(label: str, rows: Any) -> _Source:
    """A page has a row for each of its questions, with one file name; rows may lack a question."""
    rows = _table(rows, "query", "image")
    frame = rows.remove_columns("image").to_pandas()
    names = frame.get("image_filename", frame.index.to_series()).astype(str)
    pages = names.drop_duplicates()
    answered = frame["query"].fillna("") != ""
    codes, texts = pd.factorize(frame["query"][answered])
    return _Source(
        label,
        list(pages),
        _reader(rows.select(pages.index), list(pages)),
        [(f"q{code}", text) for code, text in enumerate(texts)],
        [(f"q{code}", name, 1) for code, name in zip(codes, names[answered], strict=True)],
    )
