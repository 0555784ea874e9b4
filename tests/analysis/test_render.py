from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from nbconvert.filters.markdown_mistune import markdown2html_mistune as markdown2html

from colqwen_lab.analysis import render
from colqwen_lab.analysis.compare import compare
from colqwen_lab.analysis.render import escape
from colqwen_lab.analysis.table import Results
from colqwen_lab.records import MIB, Environment, published_cells

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
ODD = "<script>alert(1)</script>[x](javascript:alert(2))"


@pytest.fixture(scope="module")
def text() -> str:
    results = Results.load("published")
    return compare(results, results).markdown()


def test_sections_stand_in_the_reports_order(text: str) -> None:
    assert re.findall(r"^## (.*)$", text, re.M) == [
        "awq against base",
        "Overview",
        "Test environment",
        "Batch size sweep",
        "Memory-constrained scenarios",
        "Comparison at the same batch size",
        "Crossover",
        "Recommendations",
        "Caveats",
        "The report's claims against its own rows",
    ]
    assert "published · NVIDIA A100-SXM4-40GB · 4b · queries · eager · protocol published" in text
    assert "Overhead, %" in text


@pytest.mark.parametrize(
    "row",
    [
        "| base | 8 | published | 191 | - | - | 8,527 | ok | no interval: under 6 samples | - |",
        "| awq | 512 | published | 951 | - | - | 6,963 | ok | no interval: under 6 samples | - |",
        "| 8 | base | does not fit | - | - | - | - | batch 8: 8,527 MiB |",
        "| 8 | awq | fits | 512 | 951 | 6,963 | 291 | - |",
        "| 16 | 374 | 152 | -59.4 | slower | 59.1 |",
        "| overhead -51 % at batch 8 | -50.8 % | yes |",
        "| gpu | NVIDIA A100-SXM4-40GB | NVIDIA A100-SXM4-40GB |",
    ],
)
def test_rows_hold_the_figures(text: str, row: str) -> None:
    assert row in text.splitlines()


def test_tables_are_whole(text: str) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        lines = block.splitlines()
        assert set(lines[1]) <= set("|- ")
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_claims_only_of_the_published_figures() -> None:
    results = Results(tuple(cell for cell in published_cells() if cell.batch_size != 32))
    assert "claims against" not in compare(results, results).markdown()


def test_failed_cell_is_in_the_sweep_with_its_reason() -> None:
    cells = published_cells()
    change = {"status": "oom", "reason": "2 GiB | <b>", "items_per_s": None, "memory": None}
    cells[-1] = cells[-1].model_copy(update=change)
    results = Results(tuple(cells))
    assert "| oom | 2 GiB \\| &lt;b&gt; |" in compare(results, results).markdown()


def test_strings_from_records_are_escaped() -> None:
    odd = Environment(gpu="a|b <img src=x>\n# title", cuda="[x](javascript:y) `z` **w**")
    changes = {"environment": odd, "variant": ODD, "weights": "<script>"}
    results = Results(tuple(cell.model_copy(update=changes) for cell in published_cells()[:6]))
    text = compare(results, results).markdown()
    assert not re.search(r"<(script|img)|\[x\]\(", text)
    assert "\n# title" not in text
    assert r"a\|b &lt;img src=x&gt; # title" in text
    assert r"[x\](javascript:y) \`z\` \*\*w\*\*" in text


def test_missing_values_are_a_dash_and_zero_is_kept() -> None:
    frame = pd.DataFrame({"a": [None, 0, float("nan")], "b": ["", "no", pd.NA], "c": [True, 1, 2]})
    assert render.markdown(frame).splitlines()[2:] == [
        "| - | - | yes |",
        "| 0 | no | 1 |",
        "| - | - | 2 |",
    ]
    assert "NaN" not in render.html(frame) + render.text(frame, 80)
    assert render.screen(frame)["a"].tolist() == ["-", 0, "-"]
    assert escape("a\\|b") == r"a<span>&#92;</span>\|b"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_text_fits_its_width_and_names_constant_columns_once(width: int) -> None:
    frame = pd.DataFrame(
        {
            "variant": ["base", "awq"],
            "batch": [8, 1024],
            "origin": ["measured", "measured"],
            "low": [None, None],
            **{f"figure number {n}": [1234.5, -0.25] for n in range(8)},
            "reason": ["CUDA out of memory: " * 6, "-"],
        }
    )
    text = render.text(frame, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.splitlines()[0] == "origin: measured"
    assert text.count("measured") == 1
    assert "low" not in text
    assert text.count("1,234.5") == 8
    assert "1,024" in text


def test_names_stay_whole_in_a_table_of_80_columns() -> None:
    results = Results.load(NOTEBOOKS.parent / "outputs" / "cpu" / "mid.jsonl")
    text = render.text(results.table(), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert {kernel for cell in results for kernel in cell.backend.engaged} <= {*text.split()}


def test_words_that_do_not_fit_are_cut() -> None:
    frame = pd.DataFrame({name: ["x" * 30, "y" * 200] for name in "abcd"})
    assert max(map(len, render.text(frame, 80).splitlines())) <= 80


@pytest.mark.parametrize(
    ("value", "sentence", "cell"),
    [
        (0.012344, "0.0123", 0.01234),
        (94.04, "94", 94.04),
        (99.97, "100", 99.97),
        (10220.26, "10,220", 10220.3),
    ],
)
def test_figures_for_the_screen(value: float, sentence: str, cell: float) -> None:
    assert render.short(value) == sentence
    assert render.rounded(value) == cell
    assert render.in_mib(value * MIB) == round(value, 0 if value >= 10 else 1)
    assert render.mib(value * MIB) == f"{sentence} MiB"


def test_intervals() -> None:
    assert render.interval(-51.24, -50.1) == "[-51.2 to -50.1]"
    assert render.interval(-0.005, 0.004, 3, "+") == "[-0.005 to +0.004]"
    assert render.interval(None, 1) == render.interval(float("nan"), 1.0) == ""
    assert render.span([3.0, 1, 2], 1, "+") == "+1.0 to +3.0"
    assert render.span([1.04, 1.01], 1) == "1.0"


@pytest.mark.parametrize(
    "text",
    [
        "_em_ __b__ *a* **b** ~~x~~ ~x~ `c` a_b_ _a_b snake_case auto_round:torch_zp",
        "<https://evil> https://evil www.evil.com <b>b</b> &lt; &amp;",
        "![x](javascript:y) [x](y) [x][y] [x]: y [a [b](c)](d) \\[x](y) [x\\](y)",
        "[-0.5 to 0.4], [^1]",
        "[x]: javascript:y",
        *(
            "# title",
            "- item",
            "+ item",
            "---",
            "- - -",
            "===",
            "1. item",
            "12) item",
            "> quote",
            "-0.4 %",
            "$x$ | y",
            r"\(x\) \[y\] $$z$$ \$v\$ \begin{equation}w\end{equation}",
            "mail eve@evil.com or mailto:eve@evil.co.uk",
        ),
    ],
)
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    shown = re.sub(r"<span>([$\\])</span>", r"\1", markdown2html(escape(text)).strip())
    assert re.fullmatch(r"<p>[^<]*</p>", shown)
    assert html.unescape(shown)[3:-4] == text
    assert not re.search(r"(?<!\\)://|www\.|(?<!\\)\]\(|[$]|\\[(\[b]|\w@", escape(text))
    assert not re.search(r"[$\\](?!</span>)", html.unescape(render.as_html(text)))


def test_control_characters_are_dropped_and_the_lab_s_own_words_are_left() -> None:
    assert escape("a\x1b[2Jb\x00\x9b31m\r\nc\x7f") == "a[2Jb31m c"
    plain = "W4A16 at batch 8 (-0.000 [-0.005 to +0.004]), 94 % of base's pages; "
    plain += "auto_round:torch_zp x 28: hub:a/b@c1"
    assert escape(plain) == plain


HOSTILE = "\x1b[2J\u202e$x$ \\(y\\) [a](https://evil.com) www.evil.com eve@evil.com <b>z</b>\u061c"


def test_what_a_record_says_stays_text_in_every_output(tmp_path: Path) -> None:
    """No formula, link, element, control or bidirectional character."""
    lines = []
    for cell in published_cells():
        row = json.loads(cell.to_line())
        for part in (row, row["environment"], row["backend"], row["workload"]):
            free = part.keys() & {"variant", "weights", "gpu", "cuda", "dtype", "texts", "source"}
            part |= {name: f"{part[name]}{HOSTILE}" for name in free}
        row |= {"interference": [HOSTILE], "reason": HOSTILE}
        row["backend"]["engaged"] = {HOSTILE: 3}
        lines.append(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    results = Results.load(tmp_path / "rows.jsonl")
    first, second = results.variants
    comparison = compare(results[first], results[second])
    tables = [results.table(), results.to_frame(), comparison.speed_table()]
    tables += [comparison.card_table(), comparison.place_table()]
    texts = [repr(results), repr(comparison), comparison.markdown(), comparison.verdict()]
    texts += [results._repr_html_(), comparison._repr_html_(), *map(str, tables)]
    for text in [*texts, json.dumps(comparison.to_dict(), ensure_ascii=False)]:
        assert not {one for one in text if not (one.isprintable() or one == "\n")}
    pages = [results._repr_html_(), comparison._repr_html_(), markdown2html(comparison.markdown())]
    for page in pages:
        page = re.sub(r'<a class="anchor-link"[^>]*>', "", page)  # of a heading to itself
        assert not re.search(r"<(a|b)[ >]", page)
        assert "evil" in page
        shown = html.unescape(re.sub(r"<(/?\w+)[^>]*>", r"<\1>", page))
        assert not re.search(r"[$\\](?!</span>)", shown)
    for table in tables:
        assert "mathjax_ignore" in table._repr_html_()
        assert "<a " not in table._repr_html_()


def test_notebooks_escape_what_a_record_says() -> None:
    """Their Markdown is made of the lab's words, figures and what goes through `lab.escape`."""
    sources = [
        "".join(cell["source"])
        for path in NOTEBOOKS.glob("*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]
    shown = [source for source in sources if "Markdown(" in source]
    assert len(shown) >= 9
    for source in shown:
        raw = re.sub(r"lab\.escape\((?:[^()]|\([^()]*\))*\)", "", source)
        assert not re.search(
            r"\.(verdict\(|variant\}|label|device|sentence|derived|card\}|card\.name\})|caveat\}|rows\.variant",
            raw,
        ), raw
