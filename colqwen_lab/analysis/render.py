"""Frames and values as text, HTML and Markdown. A missing value is "-"; memory is shown in MiB."""

from __future__ import annotations

import html as markup
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain, zip_longest
from numbers import Number
from typing import Any

import pandas as pd

from colqwen_lab.errors import plain, printable
from colqwen_lab.records import MIB

MISSING = "-"
FIGURE = re.compile(r"[-+]?\d")
# Also a link's `](`, `_` at a word's edge, an address that would become a link, and block starts.
MARKUP = re.compile(
    r"[\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|:(?=//)|(?<=www)\.|@(?=[\w-]+\.)"
    r"|^(?:[-+](?=[\s-]|$)|[#=])",
    re.IGNORECASE,
)
# These begin a formula, in HTML and in Markdown, even behind a backslash; an element of its own
# keeps each from what follows.
FORMULA = {mark: f"<span>&#{ord(mark)};</span>" for mark in "$\\"}
pd.set_option("display.html.use_mathjax", False)  # the same for a frame that a notebook shows


def short(value: float) -> str:
    """Three significant digits; from 100 on the whole number: "0.0123", "94", "10,220"."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def rounded(value: float) -> float:
    """Four significant digits below 1,000, one decimal above."""
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)


def in_mib(amount_bytes: float) -> float:
    """Bytes in MiB for a table: whole from 10 on, else one decimal."""
    value = amount_bytes / MIB
    return round(value, 0 if abs(value) >= 10 else 1)


def mib(amount_bytes: float) -> str:
    """Bytes in MiB for a sentence: "4,278 MiB"."""
    return f"{short(amount_bytes / MIB)} MiB"


def interval(low: float | None, high: float | None, digits: int = 1, sign: str = "") -> str:
    """`[-51.2 to -50.1]`, empty without both ends; sign "+" also marks positive ends."""
    if pd.isna(low) or pd.isna(high):
        return ""
    return f"[{low:{sign}.{digits}f} to {high:{sign}.{digits}f}]"


def span(values: Iterable[float], digits: int = 0, sign: str = "") -> str:
    """`4 to 59`: the smallest and the largest value, or one where they look the same."""
    ends = sorted(values)
    return " to ".join(dict.fromkeys(f"{end:{sign}.{digits}f}" for end in (ends[0], ends[-1])))


def escape(text: str) -> str:
    """`text` on one line, with its Markdown and HTML shown as they are; no control characters."""
    marked = MARKUP.sub(
        lambda mark: FORMULA.get(mark[0], f"\\{mark[0]}"), markup.escape(plain(text), quote=False)
    )
    return re.sub(r"^(\d+)(?=[.)](?:\s|$))", r"\1\\", marked)


def as_html(text: str) -> str:
    """`text` on one line as HTML that shows it as it is: no element, no formula."""
    return re.sub(r"[$\\]", lambda mark: FORMULA[mark[0]], markup.escape(plain(text)))


def shown(value: Any) -> str:
    """A value as a table shows it: "-" if missing, yes or no, thousands separated."""
    if pd.isna(value) or value == "":
        return MISSING
    if str(value) in ("True", "False"):
        return "yes" if value else "no"
    return f"{value:,.10g}" if isinstance(value, Number) else plain(str(value))


def screen(rows: Any) -> pd.DataFrame:
    """Rows or a frame to look at: every missing value is "-", and whole numbers stay whole."""
    table = pd.DataFrame(rows).convert_dtypes().astype(object)
    return table.where(table.notna() & (table != ""), MISSING)


def by_batch(columns: Mapping[str, Mapping[int, Any]]) -> pd.DataFrame:
    """Columns of values by batch size to look at: one row a batch."""
    return screen(pd.DataFrame(columns).sort_index().rename_axis("batch"))


def html(frame: pd.DataFrame) -> str:
    """An HTML table, everything in it escaped."""
    table = _strings(frame).map(as_html)
    table.columns = [as_html(str(name)) for name in table]
    with pd.option_context("display.max_colwidth", None):
        return table.to_html(index=False, border=0, escape=False)


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table, everything in it escaped."""
    table = _strings(frame)
    rows = [
        [cell if cell == MISSING else escape(cell) for cell in row]
        for row in [map(str, table.columns), *table.to_numpy()]
    ]
    rows.insert(1, ["---"] * len(table.columns))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def text(frame: pd.DataFrame, width: int | None = None) -> str:
    """A plain table of at most `width` columns; the default is the terminal's width.

    Columns of one text throughout are named above the table, empty columns are dropped. A
    table that is too wide even with long cells on several lines continues below, with its first
    two columns again. A word of up to 40 characters stays whole where it fits.
    """
    width = width or shutil.get_terminal_size().columns
    table = _strings(frame)
    same = [
        name
        for name, cells in table.items()
        if len(cells) > 1 and cells.nunique() == 1 and not FIGURE.match(cells[0])
    ]
    above = "; ".join(f"{name}: {table[name][0]}" for name in same if table[name][0] != MISSING)
    names = [name for name in table if name not in same]
    heads = [textwrap.wrap(str(name), 10, break_long_words=False) for name in names]
    for longest, most in ((40, 40), (24, 40), (12, 40), (12, 12)):
        body = table[names].map(partial(_wrap, longest=longest, most=most))
        cells = pd.concat([pd.DataFrame([heads], columns=names), body])
        sizes = cells.map(lambda lines: max(map(len, lines))).max()
        blocks = [names[:2]]
        for name in names[2:]:
            if sum(sizes[[*blocks[-1], name]] + 2) > width + 2:
                blocks.append(names[:2])
            blocks[-1] = [*blocks[-1], name]
        fits = all(sum(sizes[block] + 2) <= width + 2 for block in blocks)
        if fits and (len(blocks) == 1 or longest == 12):
            break
    figures = body.map(lambda lines: all(s == MISSING or FIGURE.match(s) for s in lines)).all()
    looks = {name: f"{'>' if figures[name] else '<'}{sizes[name]}" for name in names}
    parts = []
    for block in blocks:
        rows = [[*zip_longest(*row, fillvalue="")] for row in cells[block].to_numpy()]
        rows.insert(1, [tuple("-" * sizes[name] for name in block)])
        form = "  ".join(f"{{:{looks[name]}}}" for name in block)
        parts.append("\n".join(form.format(*line).rstrip() for line in chain(*rows)))
    return printable("\n".join([*textwrap.wrap(above, width), "\n\n".join(parts)]))


def _wrap(cell: str, longest: int, most: int) -> list[str]:
    word = max(map(len, re.findall(r"[^\s-]+-?", cell)), default=0)
    return textwrap.wrap(cell, max(longest, min(word, most)))


def _strings(frame: pd.DataFrame) -> pd.DataFrame:
    return (frame.reset_index() if frame.index.name else frame).map(shown)
