"""The texts in the package: the report's queries by their formula, natural queries, and calibration texts."""

from __future__ import annotations

from functools import cache

from colqwen_lab.settings import DATA

TEXTS = ("report", "natural")


@cache
def _lines(name: str) -> tuple[str, ...]:
    return tuple((DATA / name).read_text(encoding="utf-8").splitlines())


def natural_queries() -> tuple[str, ...]:
    """Queries of several lengths and languages, all distinct."""
    return _lines("queries.txt")


def calibration_texts() -> tuple[str, ...]:
    """Passages and queries to quantise with; none of them is one of `natural_queries`."""
    return _lines("calibration.txt")


def report_query(number: int) -> str:
    """The report's query of this number. Source: its script, as told in the project's facts."""
    return f"Retrieve information about topic number {number}"


def queries(texts: str, count: int) -> list[str]:
    """`count` distinct queries, `report` or `natural`; beyond the list, natural ones are numbered."""
    if texts == "report":
        return [report_query(number) for number in range(count)]
    pool = natural_queries()
    return [pool[i % len(pool)] + (f" ({i // len(pool) + 1})" if i >= len(pool) else "") for i in range(count)]
