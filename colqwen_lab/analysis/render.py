"""Frames and values as text, HTML and Markdown. A missing value is "-"; memory is shown in MiB."""

from __future__ import annotations

import html as markup
import re
import shutil
import textwrap
from collections.abc import Iterable
from itertools import zip_longest
from numbers import Number
from typing import Any

import pandas as pd

from colqwen_lab.errors import plain, printable
from colqwen_lab.records import MIB

MISSING = "-"
# Also a link's `](`, `_` at a word's edge, an address that would become a link, and block starts.
MARKUP = re.compile(
    r"[\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|:(?=//)|(?<=www)\.|^(?:[-+](?=[\s-]|$)|[#=])",
    re.IGNORECASE,
)


def short(value: float) -> str:
    """Three significant digits; from 100 on the whole number: "0.0123", "94", "10,220"."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def rounded(value: float) -> float:
    """Four significant digits below 1,000, one decimal above."""
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)


def in_mib(amount_bytes: float) -> float:
    """Bytes in MiB, rounded for a table."""
    return rounded(amount_bytes / MIB)


def mib(amount_bytes: float) -> str:
    """Bytes in MiB for a sentence: "4,278 MiB"."""
    return f"{short(amount_bytes / MIB)} MiB"


def interval(low: float | None, high: float | None, digits: int = 1, sign: str = "") -> str:
    """`[-51.2 to -50.1]`, empty without both ends; sign "+" also marks positive ends."""
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    return f"[{low:{sign}.{digits}f} to {high:{sign}.{digits}f}]"


def span(values: Iterable[float], digits: int = 0, sign: str = "") -> str:
    """`4 to 59`: the smallest and the largest value, or one where they look the same."""
    ends = sorted(values)
    return " to ".join(dict.fromkeys(f"{end:{sign}.{digits}f}" for end in (ends[0], ends[-1])))


def escape(text: str) -> str:
    """`text` on one line, with its Markdown and HTML shown as they are; no control characters."""
    marked = MARKUP.sub(r"\\\g<0>", markup.escape(plain(text), quote=False))
    return re.sub(r"^(\d+)(?=[.)](?:\s|$))", r"\1\\", marked)


def shown(value: Any) -> str:
    """A value as a table shows it: "-" if missing, yes or no, thousands separated."""
    if pd.isna(value) or value in ("", MISSING):
        return MISSING
    if str(value) in ("True", "False"):
        return "yes" if value else "no"
    return f"{value:,.10g}" if isinstance(value, Number) else plain(str(value))


def screen(rows: Any) -> pd.DataFrame:
    """Rows or a frame to look at: every missing value is "-", and whole numbers stay whole."""
    table = pd.DataFrame(rows).convert_dtypes().astype(object)
    return table.where(table.notna() & (table != ""), MISSING)


def html(frame: pd.DataFrame) -> str:
    """An HTML table, everything in it escaped."""
    with pd.option_context("display.max_colwidth", None):
        return _strings(frame).to_html(index=False, border=0)


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table, everything in it escaped."""
    table = _strings(frame)
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    rows = [
        [cell if cell in ("---", MISSING) else escape(str(cell)) for cell in row] for row in rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def text(frame: pd.DataFrame, width: int | None = None) -> str:
    """A plain table of at most `width` columns; the default is the terminal's width.

    Columns of one text throughout are named above the table, empty columns are dropped. A
    table that is too wide even with long cells on several lines continues below, with its first
    two columns again.
    """
    width = width or shutil.get_terminal_size().columns
    table, above, names = _strings(frame), [], []
    for name, cells in table.items():
        varies = len(table) < 2 or cells.nunique() > 1 or (_figures(cells) and cells[0] != MISSING)
        names += [name] if varies else []
        above += [f"{name}: {cells[0]}"] if not varies and cells[0] != MISSING else []
    for longest in (40, 24, 16, 10):
        columns = [_column(str(name), table[name], longest) for name in names]
        blocks = [columns[:2]]
        for column in columns[2:]:
            if sum(len(each[0][0]) + 2 for each in [*blocks[-1], column]) > width + 2:
                blocks.append(columns[:2])
            blocks[-1] = [*blocks[-1], column]
        if len(blocks) == 1:
            break
    constant = [f"{line}\n" for line in textwrap.wrap("; ".join(above), width)]
    return printable("".join(constant) + "\n\n".join(map(_block, blocks)))


def _figures(cells: Iterable[str]) -> bool:
    return all(re.fullmatch(r"-|[-+]?\d.*", cell) for cell in cells)


def _column(name: str, cells: pd.Series[str], longest: int) -> list[list[str]]:
    """The lines of the header, of a rule and of each cell, all of one width."""
    body = [textwrap.wrap(cell, max(longest, len(cell) * _figures([cell]))) for cell in cells]
    head = textwrap.wrap(name, max([6, *map(len, name.split()), *map(_longest, body)]))
    size = max(map(_longest, [head, *body]))
    align = ">" if _figures(cells) else "<"
    return [[f"{line:{align}{size}}" for line in lines] for lines in [head, ["-" * size], *body]]


def _longest(lines: list[str]) -> int:
    return max(map(len, lines), default=0)


def _block(columns: list[list[list[str]]]) -> str:
    lines = []
    for row in zip(*columns, strict=True):
        blank = [" " * len(column[0][0]) for column in columns]
        for parts in zip_longest(*row):
            lines.append("  ".join(p or b for p, b in zip(parts, blank, strict=True)).rstrip())
    return "\n".join(lines)


def _strings(frame: pd.DataFrame) -> pd.DataFrame:
    return (frame.reset_index() if frame.index.name else frame).map(shown)
