"""Synthetic pages, a folder in BEIR layout, and both ViDoRe layouts."""

from __future__ import annotations

import json
import logging
import os
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model import synthetic
from colqwen_lab.retrieval import data


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (40, 56), (shade, 0, 255 - shade))


def test_generated_is_the_held_out_split() -> None:
    corpus = data.load("generated", queries=5, pages=40, width=128)
    assert corpus.page_ids == [f"p{number}" for number in range(40)]
    assert corpus.page("p3").tobytes() == synthetic.page(3, "held-out", 128).tobytes()  # type: ignore[union-attr]
    assert len(corpus.queries) == 5
    assert corpus.queries[0] == synthetic.query(0, "held-out")
    assert corpus.relevance["q0"]["p0"] == 1
    assert synthetic.facts(data.HELD_OUT, "held-out") == synthetic.facts(0, "held-out")
    assert (
        len({synthetic.facts(number, "held-out") for number in range(data.HELD_OUT)})
        == data.HELD_OUT
    )


PAGES = [
    '{"_id": "d1", "title": "Wheat", "text": "prices rose"}\n',
    '{"_id": "d2", "text": "glaciers melt"}\n',
    '{"_id": "d3", "image": "three.png"}\n',
    '{"_id": "d4", "image": "broken.png"}\n',
]


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    queries = [
        {"_id": "1", "text": "grain"},
        {"_id": "2", "text": "ice"},
        {"_id": "3", "text": "not judged"},
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(PAGES))
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n1\td1\t2\n2\td2\t1\n2\td1\t0\n3\td9\t1\n"
    )
    picture(9).convert("LA").save(tmp_path / "three.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    return tmp_path


def test_a_beir_folder_of_texts_and_images(beir: Path) -> None:
    lines: list[str] = []
    corpus = data.load(str(beir), progress=lines.append)
    assert corpus.page_ids == ["d1", "d2", "d3"]
    assert corpus.skipped == 1
    assert lines[1].startswith("page d4, broken.png")
    of = f"{corpus.label}: "
    unknown = "1 of 4 judgements name an unknown query or page, such as query '3', page 'd9'"
    dropped = "queries dropped, as no page answers them: 1, such as '3'"
    assert [lines[0], *lines[2:]] == [of + unknown, f"{of}1 of 4 pages skipped", of + dropped]
    assert corpus.query_ids == ["1", "2"]
    assert corpus.relevance == {"1": {"d1": 2}, "2": {"d2": 1, "d1": 0}}
    assert corpus.page("d1") == "Wheat prices rose"
    assert corpus.page("d2") == "glaciers melt"
    image = corpus.page("d3")
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    assert data.load(str(beir), pages=1, progress=list).query_ids == ["1"]
    assert data.load(str(beir), queries=1, progress=list).query_ids == ["1"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("qrels/test.tsv", "1\td9\t1\n", "none of 3 pages answers a query"),
        ("qrels/test.tsv", "1\td1\n", r"test\.tsv line 1 must be QUERY-ID, .*, got '1\\td1'"),
        ("qrels/test.tsv", "1\td1\t0.5\n", r"line 1 must be .* a whole SCORE"),
        (
            "queries.jsonl",
            '{"_id": "1"}\n',
            "line 1 must be a JSON object .*, and text, got",
        ),
        ("queries.jsonl", '\n{"_id": "1", "text": null}', r"queries\.jsonl line 2 must be a JSON"),
        ("queries.jsonl", '{"_id": null, "text": "a"}', r"queries\.jsonl line 1 must be a JSON"),
        (
            "queries.jsonl",
            '{"_id": "1", "text": "a"}\n{"_id": 1, "text": "b"}',
            "duplicate query id '1'",
        ),
        (
            "corpus.jsonl",
            '{"_id": "1", "text": "a"}\n{"_id": 1, "text": "b"}',
            "duplicate page id '1'",
        ),
        (
            "corpus.jsonl",
            '{"_id": "d1", "title": "a"}',
            "line 1 must be .* a text, or the path",
        ),
        ("corpus.jsonl", '{"_id": "d1", "image": "a/../../b.png"}', "line 1 .* within the folder"),
        ("corpus.jsonl", '{"_id": "d1", "image": "/b.png"}', "line 1 .* within the folder"),
        ("corpus.jsonl", '{"_id": "d1", "image": [1]}', "line 1 .* within the folder"),
        ("corpus.jsonl", "[1]\n", r"corpus\.jsonl line 1 must be a JSON object"),
        ("corpus.jsonl", None, r"corpus\.jsonl cannot be read"),
    ],
)
def test_errors_of_a_folder(beir: Path, file: str, text: str | None, message: str) -> None:
    (beir / file).unlink() if text is None else (beir / file).write_text(text)
    with pytest.raises(BadInput, match=message):
        data.load(str(beir), progress=list)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("corpus.jsonl", '{"_id": "a\\u0000", "text": "x"}'),
        ("corpus.jsonl", '{"_id": "a\\ud800", "text": "x"}'),
        ("corpus.jsonl", '{"_id": "a\udcff", "text": "x"}'),
        ("corpus.jsonl", '{"_id": "a ", "text": "x"}'),
        ("corpus.jsonl", '{"_id": "", "text": "x"}'),
        ("corpus.jsonl", '{"_id": "a", "text": "x", "y": ' + "[" * 9999 + "]" * 9999 + "}"),
        ("corpus.jsonl", "\0" * 100),
        ("queries.jsonl", '{"_id": "a\\u202e", "text": "x"}'),
        ("queries.jsonl", '{"_id": "a", "text": "\\ud800"}'),
        ("qrels/test.tsv", "2\td2 \t1"),
        ("qrels/test.tsv", "2\0\td2\t1"),
        ("qrels/test.tsv", "2\udcff\td2\t1"),
        ("qrels/test.tsv", f"2\td2\t{10**20}"),
        ("qrels/test.tsv", "2\td2\t-10001"),
        ("qrels/test.tsv", "2\td2\t" + "9" * 5000),
    ],
)
def test_a_hostile_line_is_named_and_the_rest_is_used(beir: Path, file: str, line: str) -> None:
    path, lines = beir / file, list[str]()
    (beir / "corpus.jsonl").write_text("".join(PAGES[:2]))
    whole = data.load(str(beir), progress=list)
    with path.open("a", encoding="utf-8", errors="surrogateescape") as opened:
        opened.write(line)
    corpus = data.load(str(beir), progress=lines.append)
    number = path.read_bytes().count(b"\n") + 1
    assert lines[0].startswith(f"{path} line {number} must be ")
    assert lines[0].endswith("; it is skipped")
    assert len(lines[0]) < 700
    assert (corpus.page_ids, corpus.queries) == (whole.page_ids, whole.queries)
    assert corpus.relevance == whole.relevance
    assert corpus.skipped == whole.skipped + (file == "corpus.jsonl")


def test_many_bad_lines_and_a_long_one_are_counted(
    beir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "LINE", 100)
    (beir / "corpus.jsonl").write_text("".join(PAGES[:2]))
    with (beir / "queries.jsonl").open("a") as opened:
        opened.write("x" * 650 + "\n")
    lines: list[str] = []
    assert data.load(str(beir), progress=lines.append).query_ids == ["1", "2"]
    assert sum("is skipped" in line for line in lines[:5]) == 5
    assert lines[5] == f"{beir / 'queries.jsonl'}: 7 lines are skipped"


def test_a_pair_given_twice(beir: Path) -> None:
    with (beir / "qrels/test.tsv").open("a") as opened:
        opened.write("2\td2\t1\n")
    lines: list[str] = []
    corpus = data.load(str(beir), progress=lines.append)
    assert lines[0] == f"{corpus.label}: 1 of 5 judgements repeat another"
    assert corpus.relevance["2"] == {"d2": 1, "d1": 0}
    with (beir / "qrels/test.tsv").open("a") as opened:
        opened.write("2\td2\t0\n")
    with pytest.raises(BadInput, match="query '2' and page 'd2' have two different scores"):
        data.load(str(beir), progress=list)


@pytest.mark.parametrize("name", ["three.png", "corpus.jsonl", "qrels/test.tsv"])
def test_what_is_no_regular_file_is_never_opened(beir: Path, name: str) -> None:
    (beir / name).unlink()
    os.mkfifo(beir / name)
    lines: list[str] = []
    if name != "three.png":
        with pytest.raises(BadInput, match="cannot be read: it is not a regular file"):
            data.load(str(beir), progress=list)
        return
    assert data.load(str(beir), progress=lines.append).page_ids == ["d1", "d2"]
    assert "page d3, three.png, is skipped: it is not a regular file" in lines


def test_an_image_of_several_pages_is_named(beir: Path) -> None:
    picture(1).save(beir / "three.tiff", save_all=True, append_images=[picture(2)])
    (beir / "three.tiff").rename(beir / "three.png")
    lines: list[str] = []
    data.load(str(beir), progress=lines.append)
    assert "page d3, three.png, is skipped: its image holds 2 pages" in lines


def test_a_folder_s_name_that_is_no_utf_8(beir: Path, tmp_path_factory: Any) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path_factory.mktemp("x")) + b"/caf\xe9"))
    shutil.copytree(beir, folder)
    assert data.load(str(folder), progress=list).label.startswith("folder caf #")


def test_generated_says_which_queries_are_dropped() -> None:
    lines: list[str] = []
    corpus = data.load("generated", queries=5, pages=2, progress=lines.append)
    assert len(corpus.queries) < 5
    assert lines == [
        f"{corpus.label}: queries dropped, as no page answers them: {5 - len(corpus.queries)}, "
        "such as 'q2'"
    ]


def test_lines_end_at_newlines_only_and_a_byte_order_mark_is_none(beir: Path) -> None:
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        path = beir / name
        path.write_bytes(
            b"\xef\xbb\xbf"
            + path.read_bytes().replace(b"\n", b"\r\n").replace(b"melt", "m\u2028e\x85lt".encode())
        )
    corpus = data.load(str(beir), progress=list)
    assert corpus.page("d2") == "glaciers m\u2028e\x85lt"
    assert corpus.query_ids == ["1", "2"]


def test_the_label_depends_on_the_contents(beir: Path) -> None:
    labels = [data.load(str(beir), progress=list).label]
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "three.png"):
        (beir / name).write_bytes((beir / name).read_bytes() + b"\n")
        labels.append(data.load(str(beir), progress=list).label)
    assert len(set(labels)) == 5
    assert all(label.startswith(f"folder {beir.name} #") for label in labels)


def test_a_page_too_long_is_skipped_and_a_transparent_page_is_on_white(beir: Path) -> None:
    Image.new("RGB", (20_000, 10)).save(beir / "broken.png")
    Image.new("RGBA", (40, 56), (255, 0, 0, 0)).save(beir / "three.png")
    lines: list[str] = []
    corpus = data.load(str(beir), progress=lines.append)
    assert "20000 x 10" in lines[1]
    assert corpus.page("d3").getpixel((0, 0)) == (255, 255, 255)  # type: ignore[union-attr]


@pytest.mark.parametrize("source", ["vidore:", "vidre:x"])
def test_an_unknown_source(source: str) -> None:
    with pytest.raises(BadInput, match=f"data must be generated, vidore:NAME .* got '{source}'"):
        data.load(source)


def parquet(folder: Path, subsets: dict[str, dict[str, list[Any]]]) -> Path:
    """A data set as the hub keeps it: parquet files, and their subsets in the card."""
    datasets = pytest.importorskip("datasets")
    lines = ["---", "configs:"]
    for name, columns in subsets.items():
        features = datasets.Dataset.from_dict(
            {key: value for key, value in columns.items() if key != "image"}
        )
        if "image" in columns:
            features = features.add_column("image", columns["image"], feature=datasets.Image())
        (folder / name).mkdir(parents=True)
        features.to_parquet(folder / name / "test.parquet")
        lines += [
            f"- config_name: {name}",
            "  data_files:",
            "  - split: test",
            f"    path: {name}/test.parquet",
        ]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's cache of prepared data sets, which would outlive a test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.parametrize("dash", ["-", "_"])
def test_vidore_in_three_subsets(tmp_path: Path, dash: str) -> None:
    folder = parquet(
        tmp_path / "set",
        {
            "corpus": {
                f"corpus{dash}id": [10, 11, 12],
                "image": [encoded(shade) for shade in (0, 100, 200)],
            },
            "queries": {
                f"query{dash}id": [0, 1],
                "query": ["red?", "blue?"],
                "language": ["en", "en"],
            },
            "qrels": {
                f"query{dash}id": [0, 1, 1],
                f"corpus{dash}id": [12, 10, 11],
                "score": [1, 2, 1],
            },
        },
    )
    corpus = data.load(f"vidore:{folder}")
    assert corpus.page_ids == ["10", "11", "12"]
    assert corpus.queries == ["red?", "blue?"]
    assert corpus.relevance == {"0": {"12": 1}, "1": {"10": 2, "11": 1}}
    assert corpus.page("11").getpixel((0, 0)) == (100, 0, 155)  # type: ignore[union-attr]


def test_vidore_skips_images_that_cannot_be_read(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (40, 56), (255, 0, 0, 0))
    images = [
        None,
        {"bytes": b"no image", "path": None},
        encoded(clear),
        encoded(Image.new("RGB", (20_000, 10))),
    ]
    subsets: dict[str, dict[str, list[Any]]] = {
        "corpus": {"corpus-id": [0, 1, 2, 3], "image": images},
        "queries": {"query-id": [0, 1], "query": ["red?", "none?"]},
        "qrels": {"query-id": [0, 1], "corpus-id": [2, 0], "score": [1, 1]},
    }
    lines: list[str] = []
    corpus = data.load(f"vidore:{parquet(tmp_path / 'set', subsets)}", progress=lines.append)
    assert (corpus.page_ids, corpus.queries, corpus.skipped) == (["2"], ["red?"], 3)
    assert corpus.page("2").getpixel((0, 0)) == (255, 255, 255)  # type: ignore[union-attr]
    assert [line[:6] for line in lines[:3]] == ["page 0", "page 1", "page 3"]
    subsets["queries"]["query"][1] = None
    with pytest.raises(BadInput, match="query '1' must be a text, got None"):
        data.load(f"vidore:{parquet(tmp_path / 'null', subsets)}", progress=list)
    subsets["corpus"] = {"corpus-id": [0, 1], "title": ["", ""]}
    with pytest.raises(BadInput, match=r"columns must be .* got corpus-id, title"):
        data.load(f"vidore:{parquet(tmp_path / 'other', subsets)}")


@pytest.mark.parametrize("name", ["", None, "same.png"])
def test_vidore_of_questions(tmp_path: Path, name: str | None) -> None:
    """A page with two questions, and a page without one; the names of files say nothing."""
    rows = {
        "query": ["red?", "blue?", "more red?", None, "red?", "red?"],
        "image_filename": [name] * 6,
        "answer": [""] * 6,
        "image": [encoded(shade) for shade in (200, 0, 200, 50, 0, 0)],
    }
    lines: list[str] = []
    folder = parquet(tmp_path / "set", {"default": rows})
    corpus = data.load(f"vidore:{folder}", progress=lines.append)
    assert lines == [f"{corpus.label}: 3 of 6 rows repeat an image, which is one page"]
    assert corpus.page_ids == ["p0", "p1", "p3"]
    assert corpus.queries == ["red?", "blue?", "more red?"]
    assert corpus.relevance == {"q0": {"p0": 1, "p1": 1}, "q1": {"p1": 1}, "q2": {"p0": 1}}
    assert corpus.page("p3").getpixel((0, 0)) == (50, 0, 205)  # type: ignore[union-attr]


def test_vidore_pages_without_an_image_stay_apart(tmp_path: Path) -> None:
    images = [None, encoded(9), None, {"bytes": None, "path": "/dev/zero"}]
    rows = {"query": ["a", "b", "c", "d"], "image": images}
    lines: list[str] = []
    folder = parquet(tmp_path / "set", {"default": rows})
    corpus = data.load(f"vidore:{folder}", progress=lines.append)
    assert (corpus.page_ids, corpus.query_ids, corpus.skipped) == (["p1"], ["q1"], 3)
    assert lines[:2] == [f"page p{n} is skipped: its image is null" for n in (0, 2)]
    assert lines[2] == "page p3 is skipped: it is not a regular file"
    assert lines[-1].endswith("queries dropped, as no page answers them: 3, such as 'q0'")


@pytest.mark.parametrize(
    ("subset", "column", "values", "message"),
    [
        ("corpus", "corpus-id", ["1", None], "a page id must be a text .* got None"),
        ("queries", "query-id", ["", "2"], "a query id must be a text .* got ''"),
        ("qrels", "score", [1, 10**12], r"a whole SCORE up to 10000, got \('2', '2', 10+\)"),
        ("qrels", "score", [0.5, 1.0], r"a whole SCORE up to 10000, got \('1', '1', 0.5\)"),
        ("qrels", "score", [None, 1], r"a whole SCORE up to 10000, got \('1', '1', None\)"),
        ("qrels", "query-id", ["1", None], "a judgement must be"),
    ],
)
def test_vidore_with_odd_ids_and_scores(
    tmp_path: Path, subset: str, column: str, values: list[Any], message: str
) -> None:
    both = ["1", "2"]
    subsets: dict[str, dict[str, list[Any]]] = {
        "corpus": {"corpus-id": both, "image": [encoded(0), encoded(1)]},
        "queries": {"query-id": both, "query": ["a", "b"]},
        "qrels": {"query-id": both, "corpus-id": both, "score": [1, 1]},
    }
    subsets[subset][column] = values
    with pytest.raises(BadInput, match=message):
        data.load(f"vidore:{parquet(tmp_path / 'set', subsets)}", progress=list)


def test_vidore_with_other_columns_or_unavailable(tmp_path: Path) -> None:
    two = {name: {"query": ["?"], "image": [encoded(0)]} for name in ("english", "french")}
    with pytest.raises(
        BadInput, match="must have one subset, or corpus, queries, qrels, got english, french"
    ):
        data.load(f"vidore:{parquet(tmp_path / 'two', two)}")
    folder = parquet(tmp_path / "set", {"default": {"question": ["?"]}})
    with pytest.raises(BadInput, match=r"columns must be query, image; .* got question"):
        data.load(f"vidore:{folder}")
    with pytest.raises(MissingRequirement, match="cannot get vidore/none"):
        data.load("vidore:none")


def test_without_a_network_the_hub_s_retries_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")

    def unreached(*_: object, **__: object) -> None:
        logger.warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach it")

    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.get_dataset_config_names", unreached)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    level = logger.getEffectiveLevel()
    with pytest.raises(
        MissingRequirement,
        match="cannot get vidore/none: Couldn't reach it; where there is a network",
    ):
        data.load("vidore:none")
    assert not caplog.records
    assert logger.getEffectiveLevel() == level


def encoded(image: int | Image.Image) -> dict[str, Any]:
    file = BytesIO()
    (picture(image) if isinstance(image, int) else image).save(file, format="png")
    return {"bytes": file.getvalue(), "path": None}


def test_a_blank_query_is_said_and_skipped(beir: Path) -> None:
    whole = data.load(str(beir))
    with (beir / "queries.jsonl").open("a") as file:
        file.write('{"_id": "blank", "text": "   "}\n')
    with (beir / "qrels" / "test.tsv").open("a") as file:
        file.write(f"blank\t{whole.page_ids[0]}\t1\n")
    lines: list[str] = []
    corpus = data.load(str(beir), progress=lines.append)
    assert corpus.queries == whole.queries
    assert any("1 queries are blank, such as 'blank'; skipped" in line for line in lines)
