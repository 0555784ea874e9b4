"""Queries, pages and relevance: synthetic pages, a ViDoRe benchmark, or a folder in BEIR layout.

A page is an image or a text, read when it is needed. Queries without a relevant page are dropped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, TypeVar

import pandas as pd
from huggingface_hub import HfApi
from huggingface_hub.utils import logging
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from colqwen_lab.errors import BadInput, MissingRequirement, plain
from colqwen_lab.model import synthetic
from colqwen_lab.model.decode import Decoder, Source, check_regular
from colqwen_lab.model.inputs import digest, skipped

GENERATED, VIDORE = "generated", "vidore:"
#: Held-out pages with different facts; later pages repeat them.
HELD_OUT = synthetic.different("held-out")
SUBSETS = ("corpus", "queries", "qrels")
COLUMNS = (
    "columns must be query, image; or in subsets corpus (corpus-id, image), queries (query-id, "
    "query), qrels (query-id, corpus-id, score)"
)
QRELS = ("query-id", "corpus-id", "score")
# trec_eval, behind ir-measures, takes 8 bytes for each score up to the largest.
MOST_SCORE = 10_000
AN_ID = "a text without control characters and needless blanks"
A_JUDGEMENT = f"QUERY-ID, CORPUS-ID (each {AN_ID}) and a whole SCORE up to {MOST_SCORE}"
# Characters of a line, and bad lines of a file that are named.
LINE, MOST_NAMED = 2**24, 5
Page = Image.Image | str
Progress = Callable[[str], object]
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
    """All of a data set: `queries` are texts by id, `qrels` has the columns QRELS.

    `skipped` counts pages that are not among `page_ids`.
    """

    label: str
    page_ids: list[str]
    page: Callable[[str], Page]
    queries: pd.Series[str]
    qrels: pd.DataFrame
    skipped: int = 0


def load(
    source: str,
    queries: int = 0,
    pages: int = 0,
    width: int = synthetic.WIDTH,
    progress: Progress = warnings.warn,
) -> Corpus:
    """The data set named `source`, without unreadable pages and unanswered queries.

    `source` is `generated` (synthetic pages held out of training, `width` pixels wide),
    `vidore:NAME` (docvqa_test_subsampled, an OWNER/NAME or a folder with the same columns), or a
    folder in BEIR layout: corpus.jsonl (`_id`, `text` or the path of an `image`), queries.jsonl,
    qrels/test.tsv. `queries` and `pages` are the most to use; 0 means all. Raises BadInput for an
    unusable data set, MissingRequirement if the package `datasets` or the hub is needed.
    """
    if source == GENERATED:
        return _generated(queries or HELD_OUT, pages or HELD_OUT, width, progress)
    if source.startswith(VIDORE) and source != VIDORE:
        everything = _vidore(source.removeprefix(VIDORE), progress)
    elif os.path.isdir(source):
        everything = _folder(Path(source), progress)
    else:
        raise BadInput(f"data must be {GENERATED}, {VIDORE}NAME or a BEIR folder, got {source!r}")
    return _usable(everything, queries, pages, progress)


def _usable(source: _Source, queries: int, pages: int, progress: Progress) -> Corpus:
    """The first pages that can be read, and the first queries that they answer."""
    label, page_ids, page, texts, qrels, bad = source

    def say(line: str) -> None:
        progress(f"{label}: {line}")

    for kind, ids in (("page", pd.Index(page_ids)), ("query", texts.index)):
        if not ids.is_unique:
            raise BadInput(f"{label}: duplicate {kind} id {ids[ids.duplicated()][0]!r}")
    for query, text in texts.items():
        if not isinstance(text, str):
            raise BadInput(f"{label}: query {query!r} must be a text, got {text!r}")
    if (blank := texts.str.strip() == "").any():
        say(f"{blank.sum()} queries are blank, such as {texts.index[blank][0]!r}; skipped")
        texts = texts[~blank]
    qrels, repeated = qrels.drop_duplicates(), qrels.duplicated()
    if repeated.any():
        say(f"{repeated.sum()} of {len(repeated)} judgements repeat another")
    if (twice := qrels.duplicated([*QRELS[:2]])).any():
        query, page_id, _ = qrels[twice].iloc[0]
        raise BadInput(f"{label}: query {query!r} and page {page_id!r} have two different scores")
    unknown = ~(qrels["query-id"].isin(texts.index) & qrels["corpus-id"].isin(page_ids))
    if unknown.any():
        query, page_id, _ = qrels[unknown].iloc[0]
        named = f"query or page, such as query {query!r}, page {page_id!r}"
        say(f"{unknown.sum()} of {len(qrels)} judgements name an unknown {named}")
    kept = []
    for page_id in page_ids[: pages or None]:
        try:
            page(page_id)
            kept.append(page_id)
        except BadInput as error:
            progress(str(error))
            bad += 1
    if bad:
        say(f"{bad} of {bad + len(kept)} pages skipped")
    qrels = qrels[~unknown & qrels["corpus-id"].isin(kept)]
    answered = texts.index.isin(qrels["query-id"][qrels["score"] > 0])
    if not answered.any():
        raise BadInput(f"{label}: none of {len(kept)} pages answers a query")
    _say_dropped(label, texts.index[~answered], progress)
    texts = texts[answered][: queries or None]
    scores = qrels.set_index("corpus-id").groupby("query-id")["score"]
    relevance = {query: scores.get_group(query).to_dict() for query in texts.index}
    return Corpus(label, kept, page, [*texts.index], [*texts], relevance, bad)


def _say_dropped(label: str, ids: Sequence[str], progress: Progress) -> None:
    if len(ids):
        dropped = f"{len(ids)}, such as {ids[0]!r}"
        progress(f"{label}: queries dropped, as no page answers them: {dropped}")


def _generated(queries: int, pages: int, width: int, progress: Progress) -> Corpus:
    split, label = "held-out", f"generated, held out, {width} px"
    everything = synthetic.relevance(queries, pages, split)
    relevance = {query: answers for query, answers in everything.items() if answers}
    _say_dropped(label, [query for query in everything if query not in relevance], progress)
    return Corpus(
        label,
        [f"p{number}" for number in range(pages)],
        lambda page_id: synthetic.page(int(page_id[1:]), split, width),
        [*relevance],
        [synthetic.query(int(query[1:]), split) for query in relevance],
        relevance,
    )


def _check_id(value: object) -> Any:
    if not isinstance(value, str) or not value or value != plain(value):
        raise ValueError
    return value


def _image(decoder: Decoder, name: str, source: Source | None) -> Image.Image:
    """The one page of an image. Raises BadInput with `name` if it cannot be read."""
    try:
        if source is None:
            raise ValueError("its image is null")
        if (count := decoder.count(source)) > 1:
            raise ValueError(f"its image holds {count} pages")
        return decoder.page(source)
    except ValueError as error:
        raise skipped(name, error) from None


def _folder_label(folder: Path, files: Iterable[Path]) -> str:
    return f"folder {plain(folder.resolve().name)} #{digest(files)}"


# ---------------------------------------------------------------- a folder in BEIR layout


_Id = Annotated[str, AfterValidator(_check_id)]


class _Row(BaseModel, coerce_numbers_to_str=True):
    id: _Id = Field(alias="_id")


class _Query(_Row):
    text: str


class _Page(_Row):
    title: str | None = None
    text: str | None = None
    image: str | None = None

    @model_validator(mode="after")
    def _valid(self) -> Self:
        path = Path(self.image or "")
        if path.is_absolute() or ".." in path.parts or (self.text is None and not self.image):
            raise ValueError
        return self


_COERCED = ConfigDict(coerce_numbers_to_str=True)
_ID = TypeAdapter(_Id, config=_COERCED)
_Score = Annotated[int, Field(ge=-MOST_SCORE, le=MOST_SCORE)]
_JUDGEMENT = TypeAdapter(tuple[_Id, _Id, _Score], config=_COERCED)


def _judgement(line: str) -> tuple[str, str, int] | None:
    fields = line.rstrip("\r\n").split("\t")
    return None if fields[2:] == ["score"] else _JUDGEMENT.validate_python(tuple(fields))


def _folder(folder: Path, progress: Progress) -> _Source:
    files = [folder / name for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")]
    valid = f"a JSON object with _id, {AN_ID}, and "
    content = f"{valid}a text, or the path of an image within the folder"
    rows, bad = _rows(files[0], _Page.model_validate_json, content, progress)
    queries, _ = _rows(files[1], _Query.model_validate_json, f"{valid}text", progress)
    judgements, _ = _rows(files[2], _judgement, f"{A_JUDGEMENT}, by tabs", progress)
    by_id, decoder = {row.id: row for row in rows}, Decoder()

    def page(page_id: str) -> Page:
        row = by_id[page_id]
        if not row.image:
            return " ".join(filter(None, (row.title, row.text)))
        return _image(decoder, f"page {row.id}, {row.image},", str(folder / row.image))

    images = dict.fromkeys(folder / row.image for row in rows if row.image)
    texts = pd.Series([row.text for row in queries], [row.id for row in queries], dtype=object)
    qrels = pd.DataFrame(judgements, columns=QRELS)
    label = _folder_label(folder, [*files, *images])
    return _Source(label, [row.id for row in rows], page, texts, qrels, bad)


def _rows(
    path: Path, parse: Callable[[str], T | None], valid: str, progress: Progress
) -> tuple[list[T], int]:
    """The parsed lines, and how many are skipped with a word, as they are not `valid`.

    Raises BadInput if no line is valid. Blank lines do not count.
    """
    rows, bad = [], []
    try:
        check_regular(path)
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            # A longer line comes in parts, none of which is valid.
            for number, line in enumerate(iter(partial(file.readline, LINE), ""), 1):
                try:
                    rows += [row] if line.strip() and (row := parse(line)) else []
                except ValueError:
                    bad.append(f"{path} line {number} must be {valid}, got {line[:80].strip()!r}")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}; a BEIR folder must hold it") from None
    if bad and not rows:
        raise BadInput(bad[0])
    for text in bad[:MOST_NAMED]:
        progress(f"{text}; it is skipped")
    if bad[MOST_NAMED:]:
        progress(f"{path}: {len(bad)} lines are skipped")
    return rows, len(bad)


# ---------------------------------------------------------------- ViDoRe


def _vidore(name: str, progress: Progress) -> _Source:
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

    def subset(config: str) -> Any:
        rows = datasets.load_dataset(repository, config, split="test", revision=revision)
        if "image" not in rows.column_names:
            return rows
        return rows.cast_column("image", datasets.Image(decode=False))  # `Decoder` decodes

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # hides a line for each retry
    try:
        configs = datasets.get_dataset_config_names(repository, revision=revision)
        if len(configs) == 1:
            return _questions(label, subset(configs[0]), progress)
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


def _images(rows: Any, numbers: dict[str, int]) -> Callable[[str], Page]:
    """Reads a page by its id; `numbers` holds the row of each."""
    decoder = Decoder()
    return lambda page_id: _image(
        decoder, f"page {page_id}", _source(rows[numbers[page_id]]["image"])
    )


def _source(image: dict[str, Any] | None) -> Source | None:
    return (image["bytes"] or image["path"]) if image else None


def _validated(what: str, validate: Callable[[Any], T], values: Iterable[Any]) -> list[T]:
    result = []
    for value in values:
        try:
            result.append(validate(value))
        except ValueError:
            raise BadInput(f"{what}, got {value!r}") from None
    return result


def _subsets(label: str, corpus: Any, queries: Any, qrels: Any) -> _Source:
    corpus, queries = _columns(corpus, "corpus-id", "image"), _columns(queries, "query-id", "query")
    qrels = _columns(qrels, *QRELS)
    pages = _validated(
        f"{label}: a page id must be {AN_ID}", _ID.validate_python, corpus["corpus-id"]
    )
    ids = _validated(
        f"{label}: a query id must be {AN_ID}", _ID.validate_python, queries["query-id"]
    )
    rows = zip(*(qrels[name] for name in QRELS), strict=True)
    must = f"{label}: a judgement must be {A_JUDGEMENT}"
    judged = pd.DataFrame(_validated(must, _JUDGEMENT.validate_python, rows), columns=QRELS)
    page = _images(corpus, {page_id: number for number, page_id in enumerate(pages)})
    return _Source(label, pages, page, pd.Series(list(queries["query"]), ids, dtype=object), judged)


def _questions(label: str, rows: Any, progress: Progress) -> _Source:
    """A row holds a page and a question, or none; rows with the same image are one page."""
    rows = _columns(rows, "query", "image")
    first: dict[object, int] = {}
    numbers = []
    for number, image in enumerate(rows["image"]):
        source = _source(image)
        content = sha256(source).digest() if isinstance(source, bytes) else source
        numbers.append(first.setdefault(content or number, number))
    if repeated := len(numbers) - len(first):
        progress(f"{label}: {repeated} of {len(numbers)} rows repeat an image, which is one page")
    ids = pd.Series([f"p{number}" for number in numbers])
    questions = pd.Series(list(rows["query"]), dtype=object).replace("", None).dropna()
    codes, texts = pd.factorize(questions)
    queries = [f"q{code}" for code in codes]
    qrels = pd.DataFrame({"query-id": queries, "corpus-id": ids[questions.index], "score": 1})
    page = _images(rows, {f"p{number}": number for number in first.values()})
    by_id = pd.Series(texts, list(dict.fromkeys(queries)), dtype=object)
    return _Source(label, [*ids.unique()], page, by_id, qrels.drop_duplicates())
