"""Queries, pages, and which page answers which query: the lab's own, a ViDoRe benchmark, or a folder. No torch.

A page is an image or a text, and is made or read when it is asked for. Queries that no page here answers are left
out, as a metric has nothing to say of them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model import synthetic

GENERATED, VIDORE = "generated", "vidore:"
#: Pages held out whose facts all differ; from there on they come back.
HELD_OUT = synthetic.different("held-out")
Page = Image.Image | str


@dataclass(frozen=True)
class Corpus:
    """A data set. `label` names it with its revision; `relevance` is by query and page, above 0 where it answers.

    `refused` pages could not be read, and are not among the others.
    """

    label: str
    page_ids: list[str]
    page: Callable[[int], Page]
    query_ids: list[str]
    queries: list[str]
    relevance: dict[str, dict[str, int]]
    refused: int = 0


def load(
    source: str,
    queries: int = 0,
    pages: int = 0,
    width: int = synthetic.WIDTH,
    say: Callable[[str], object] = warnings.warn,
) -> Corpus:
    """The data set of this name, or the first of its queries and pages; of those what can be read.

    Args:
        source: `generated` (drawn pages held out of the tiny model's training), `vidore:NAME` (a ViDoRe benchmark of
            the hub, such as vidore:docvqa_test_subsampled, or any OWNER/NAME or folder of the same columns), or a
            folder in BEIR layout: corpus.jsonl (`_id`, `text` or the path of an `image`), queries.jsonl,
            qrels/test.tsv.
        queries: how many at most; 0 means all.
        pages: how many at most; 0 means all.
        width: pixels that a generated page is wide.
        say: takes a line for each page that is left out.

    Raises:
        BadInput: no such data set, or one that cannot be read.
        MissingRequirement: the package `datasets` or the hub is needed.
    """
    if min(queries, pages) < 0:
        raise BadInput(f"queries {queries}, pages {pages}; valid: 0 for all, or 1 or more")
    if source == GENERATED:
        found = _generated(pages or HELD_OUT, queries or HELD_OUT, width)
    elif source.startswith(VIDORE) and source != VIDORE:
        found = _vidore(source.removeprefix(VIDORE))
    elif os.path.isdir(source):
        found = _folder(Path(source))
    else:
        raise BadInput(
            f"unknown data {source!r}; valid: {GENERATED}, {VIDORE}NAME, or a folder that holds corpus.jsonl"
        )
    for what, ids in (("page", found.page_ids), ("query", found.query_ids)):
        if twice := [one for one, count in Counter(ids).items() if count > 1]:
            raise BadInput(
                f"{found.label}: the {what} id {twice[0]!r} stands twice; valid: each once"
            )
    for query, text in zip(found.query_ids, found.queries, strict=True):
        if not isinstance(text, str):
            raise BadInput(f"{found.label}: the text of query {query!r} is {text!r}; valid: a text")
    return _cut(found, queries, pages, None if source == GENERATED else say)


def _cut(corpus: Corpus, queries: int, pages: int, say: Callable[[str], object] | None) -> Corpus:
    """The first pages, without those that cannot be read if there is a `say`, and the queries that they answer."""
    numbers = range(len(corpus.page_ids[: pages or None]))
    legible = [number for number in numbers if say is None or _legible(corpus, number, say)]
    page_ids = [corpus.page_ids[number] for number in legible]
    refused = len(numbers) - len(legible)
    if say and refused:
        say(f"{corpus.label}: {refused} of {len(numbers)} pages are left out")
    known = set(page_ids)
    judged = {
        query: {
            page: score for page, score in corpus.relevance.get(query, {}).items() if page in known
        }
        for query in corpus.query_ids
    }
    kept = [
        place
        for place, query in enumerate(corpus.query_ids)
        if any(s > 0 for s in judged[query].values())
    ]
    kept = kept[: queries or None]
    if not kept:
        raise BadInput(f"{corpus.label}: none of {len(page_ids)} pages answers a query")
    ids = [corpus.query_ids[place] for place in kept]
    texts = [corpus.queries[place] for place in kept]
    relevance = {query: judged[query] for query in ids}
    return Corpus(
        corpus.label, page_ids, lambda at: corpus.page(legible[at]), ids, texts, relevance, refused
    )


def _legible(corpus: Corpus, number: int, say: Callable[[str], object]) -> bool:
    try:
        corpus.page(number)
    except BadInput as error:
        say(str(error))
        return False
    return True


def _generated(pages: int, queries: int, width: int) -> Corpus:
    return Corpus(
        label=f"generated, held out, {width} px",
        page_ids=[f"p{number}" for number in range(pages)],
        page=lambda number: synthetic.page(number, "held-out", width),
        query_ids=[f"q{number}" for number in range(queries)],
        queries=[synthetic.query(number, "held-out") for number in range(queries)],
        relevance=synthetic.relevance(queries, pages, "held-out"),
    )


# ---------------------------------------------------------------- a folder in BEIR layout


def _folder(folder: Path) -> Corpus:
    from colqwen_lab.model.inputs import decoding, digest, to_rgb

    names = [folder / name for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")]
    corpus, path = (
        [_page_row(names[0], *numbered) for numbered in _json_lines(names[0], "_id")],
        names[2],
    )
    queries = [row for _, row in _json_lines(names[1], "_id", "text")]
    relevance: dict[str, dict[str, int]] = {}
    for number, line in _lines(path):
        parts = line.split("\t")
        if number == 1 and parts[-1] == "score":
            continue
        try:
            query, answer, score = parts
            relevance.setdefault(query, {})[answer] = int(score)
        except ValueError:
            raise BadInput(
                f"{path} line {number} is not QUERY-ID, CORPUS-ID and a whole SCORE, by tabs"
            ) from None

    def page(number: int) -> Page:
        row = corpus[number]
        if row.get("image"):
            with (
                decoding(f"page {row['_id']}, {row['image']},"),
                Image.open(folder / row["image"]) as image,
            ):
                return to_rgb(image)
        return " ".join(str(row[name]) for name in ("title", "text") if row.get(name))

    images = [folder / row["image"] for row in corpus if row.get("image")]
    return Corpus(
        f"folder {folder.resolve().name} #{digest([*names, *images])}",
        [str(row["_id"]) for row in corpus],
        page,
        [str(row["_id"]) for row in queries],
        [row["text"] for row in queries],
        relevance,
    )


def _page_row(path: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """`row`, if it is a page. Raises BadInput."""
    if image := row.get("image"):
        if not isinstance(image, str) or Path(image).is_absolute() or ".." in Path(image).parts:
            raise BadInput(
                f"{path} line {number}: image {image!r}; valid: the path of a file within {path.parent}"
            )
    elif not isinstance(row.get("text"), str):
        raise BadInput(f"{path} line {number} has neither a text nor the path of an image")
    return row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}; a BEIR folder holds it") from None
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _json_lines(path: Path, *needed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(
            isinstance(row.get(name), (str, int) if name == "_id" else str) for name in needed
        ):
            raise BadInput(f"{path} line {number} is not a JSON object with {', '.join(needed)}")
        yield number, row


# ---------------------------------------------------------------- ViDoRe, in both of its layouts


def _vidore(name: str) -> Corpus:
    """Layout of version 1: one subset, a question and its page a row. Later ones: subsets corpus, queries, qrels."""
    try:
        import datasets
    except ImportError:
        raise MissingRequirement(
            'ViDoRe needs the package datasets: `pip install -e ".[data]"`'
        ) from None
    from huggingface_hub.utils import logging

    from colqwen_lab.model.inputs import digest

    folder = os.path.isdir(name)
    repository = name if folder or "/" in name else f"vidore/{name}"
    if folder:
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        revision, label = None, f"folder {Path(name).resolve().name} #{digest(files)}"
    else:
        revision = _commit(repository)
        label = f"{repository}@{revision or 'cached'}"

    def subset(config: str) -> Any:
        return datasets.load_dataset(repository, config, split="test", revision=revision)

    told = logging.get_verbosity()
    logging.set_verbosity_error()  # no line for each of its retries
    try:
        configs = datasets.get_dataset_config_names(repository, revision=revision)
        if set(configs) >= {"corpus", "queries", "qrels"}:
            return _beir(label, subset("corpus"), subset("queries"), subset("qrels"))
        if len(configs) > 1:
            raise BadInput(
                f"{repository} has the subsets {', '.join(configs)}; valid: one, or corpus, queries, qrels"
            )
        return _questions(label, subset(configs[0]))
    except BadInput:
        raise
    except (
        Exception
    ) as error:  # the library raises those of the hub, of its builders and of pyarrow
        get = f"where there is a network: `hf download --repo-type dataset {repository}`"
        raise MissingRequirement(f"cannot get {repository}: {error!s:.200}; {get}") from None
    finally:
        logging.set_verbosity(told)


def _commit(repository: str) -> str | None:
    """The commit of the hub's data set now; None where there is no network, and the cached one is taken."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repository, timeout=20).sha
    except Exception:  # the hub's library raises those of whichever HTTP client it uses
        return None


def _with(table: Any, *columns: str) -> Any:
    """`table`, its ids named as version 2 names them (corpus-id, and not corpus_id), if it has these columns."""
    table = table.rename_columns(
        {name: name.replace("_id", "-id") for name in table.column_names if "_id" in name}
    )
    if missing := set(columns) - set(table.column_names):
        raise BadInput(
            f"no column {sorted(missing)[0]} among {', '.join(table.column_names)}; valid: query, image; or subsets "
            "corpus (corpus-id, image), queries (query-id, query), qrels (query-id, corpus-id, score)"
        )
    return table


def _content(page_id: str, rows: Any, number: int) -> Page:
    """The text of a row, or its image. Raises BadInput where that is missing, or cannot be read."""
    from colqwen_lab.model.inputs import decoding, to_rgb

    name = "image" if "image" in rows.column_names else "text"
    with decoding(f"page {page_id}"):
        content = rows[number][name]
        if content is None:
            raise ValueError(f"its {name} is null")
        return content if isinstance(content, str) else to_rgb(content)


def _beir(label: str, corpus: Any, queries: Any, qrels: Any) -> Corpus:
    corpus, queries = _with(corpus, "corpus-id"), _with(queries, "query-id", "query")
    if not {"image", "text"} & set(corpus.column_names):
        corpus = _with(corpus, "image")
    relevance: dict[str, dict[str, int]] = {}
    for row in _with(qrels, "query-id", "corpus-id", "score"):
        relevance.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = int(row["score"])
    pages = [str(page) for page in corpus["corpus-id"]]
    return Corpus(
        label,
        pages,
        lambda number: _content(pages[number], corpus, number),
        [str(query) for query in queries["query-id"]],
        list(queries["query"]),
        relevance,
    )


def _questions(label: str, rows: Any) -> Corpus:
    """A page stands in as many rows as it has questions, under one file name; rows without a question are pages too."""
    rows = _with(rows, "query", "image")
    names = [
        str(name)
        for name in (
            rows["image_filename"] if "image_filename" in rows.column_names else range(len(rows))
        )
    ]
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        first.setdefault(name, number)
    pages = list(first)
    relevance: dict[str, dict[str, int]] = {}
    for question, name in zip(rows["query"], names, strict=True):
        if question:
            relevance.setdefault(question, {})[name] = 1
    ids = {question: f"q{number}" for number, question in enumerate(relevance)}
    return Corpus(
        label,
        pages,
        lambda number: _content(pages[number], rows, first[pages[number]]),
        list(ids.values()),
        list(ids),
        {ids[question]: answers for question, answers in relevance.items()},
    )
