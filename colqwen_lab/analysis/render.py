"""A comparison as a Markdown report, in the layout of the report it grew from."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from colqwen_lab.analysis.compare import fit_everywhere
from colqwen_lab.analysis.results import Series, conditions, kernels, mib, short, unit
from colqwen_lab.errors import plain
from colqwen_lab.records import Cell

if TYPE_CHECKING:
    from colqwen_lab.analysis.compare import CardFit, Comparison, SideBySide

SHOWN = (
    "gpu",
    "driver",
    "cuda",
    "cpu",
    "threads",
    "attention",
    "torch",
    "transformers",
    "auto_round",
    "python",
    "os",
)
# Also a link's `](`, `_` at a word's edge, an address that would become a link, and what begins a block.
MARKUP = re.compile(
    r"[\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|:(?=//)|(?<=www)\.|^(?:[-+](?=[\s-]|$)|[#=])",
    re.IGNORECASE,
)
USES = {"awq": "Use {awq} when", "base": "Use {base} when", "either": "It does not matter when"}


def report(comparison: Comparison) -> str:
    """The whole report, as Markdown. Strings from records are escaped."""
    base, awq, said = comparison.base, comparison.awq, escape(comparison.verdict())
    sections = {
        "Overview": [
            table(["Model", "Variant", "Weights", "Kernels"], map(_model, (base, awq))),
            said,
        ],
        "Test environment": [table(["Parameter", base.label, awq.label], _environment(base, awq))],
        "Batch size sweep": [table(*_sweep(base, awq))],
        "Memory-constrained scenarios": list(_cards(comparison)),
        "Comparison at the same batch size": [table(*_same_batch(comparison))],
        "Crossover": [_crossover(comparison)],
        "Recommendations": list(_recommendations(comparison)),
        "Caveats": ["\n".join(f"- {escape(caveat)}" for caveat in comparison.caveats)],
    }
    if found := comparison.claims:
        rows = [
            [claim.claim, claim.rows_say, "yes" if claim.follows else "**no**"] for claim in found
        ]
        sections["The report's claims against its own rows"] = [
            table(["Claim", "The rows say", "Follows"], rows)
        ]
    parts = [f"# {escape(awq.label)} against {escape(base.label)}"]
    for title, blocks in sections.items():
        parts += [f"## {title}", *blocks]
    parts.append(f"*{escape(conditions([*base.cells, *awq.cells]))}*")
    return "\n\n".join(parts) + "\n"


def side_by_side(found: SideBySide) -> str:
    """The tables of several devices beside each other, then the report of each, as Markdown."""
    parts = ["# Side by side"]
    for title, frame in (
        ("Overhead and memory", found.overhead_table()),
        ("By device", found.gpu_table()),
    ):
        rows = frame.astype(object).where(frame.notna(), None).to_numpy().tolist()
        parts += [f"## {title}", table(list(frame.columns), rows)]
    parts += [escape(one) for one in found.left_out]
    reports = [f"# {escape(where)}\n\n{report(one)}" for where, one in found.comparisons.items()]
    return "\n\n".join([*parts, *reports])


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, every string in it escaped; None is a dash. Only a cell that is wholly `**...**` stays bold."""
    head, *body = ("| " + " | ".join(map(_shown, line)) + " |" for line in (headers, *rows))
    return "\n".join([head, "|" + " --- |" * len(headers), *body])


def escape(text: str) -> str:
    """`text` with what Markdown or HTML would take as markup made plain, on one line, without control characters."""
    marked = MARKUP.sub(r"\\\g<0>", html.escape(plain(text), quote=False))
    return re.sub(r"^(\d+)(?=[.)](?:\s|$))", r"\1\\", marked)


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "-"
    bold = re.fullmatch(r"\*\*([\w ]+)\*\*", str(value))
    return f"**{bold[1]}**" if bold else escape(str(value))


def _model(series: Series) -> list[str]:
    named = dict.fromkeys(kernels(cell) for cell in series.cells)
    return [series.label, series.variant, series.first.weights, "; ".join(named)]


def _environment(base: Series, awq: Series) -> Iterator[list[str]]:
    """The rows that either side recorded."""
    for name in SHOWN:
        values = [_recorded(series, name) for series in (base, awq)]
        if any(values):
            yield [name.replace("_", "-"), *(value or "not recorded" for value in values)]


def _recorded(series: Series, name: str) -> str:
    values = (getattr(cell.environment, name) for cell in series.cells)
    return " and ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _sweep(base: Series, awq: Series) -> tuple[list[str], list[list[Any]]]:
    headers = ["Batch size"]
    headers += [
        f"{series.label} {what}" for series in (base, awq) for what in ("throughput", "peak memory")
    ]
    cells = [cell for series in (base, awq) for cell in series.cells]
    noticed = {
        batch: _noticed(cells, batch) for batch in sorted({cell.batch_size for cell in cells})
    }
    rows = [
        [batch, *_figures(base, batch), *_figures(awq, batch), what]
        for batch, what in noticed.items()
    ]
    return (
        ([*headers, "Noticed"], rows)
        if any(noticed.values())
        else (headers, [row[:-1] for row in rows])
    )


def _noticed(cells: Sequence[Cell], batch: int) -> str:
    return "; ".join(
        dict.fromkeys(
            note for cell in cells if cell.batch_size == batch for note in cell.interference
        )
    )


def _figures(series: Series, batch: int) -> list[str | None]:
    """Throughput and peak of a cell; of one without figures its status and reason."""
    here = [cell for cell in series.cells if cell.batch_size == batch]
    if here and all(cell.status != "ok" for cell in here):
        return [here[-1].status, here[-1].reason]
    rated, sized = series.rated.get(batch), series.sized.get(batch)
    return [
        _rate(rated.items_per_s.median, unit(rated)) if rated and rated.items_per_s else None,
        mib(sized.memory.peak_bytes) if sized and sized.memory else None,
    ]


def _cards(comparison: Comparison) -> Iterator[str]:
    if said := fit_everywhere(comparison.base, comparison.awq, comparison.cards):
        yield f"They say nothing of models this small: {said}."
        return
    headers = ["Model", "Verdict", "Largest batch", "Throughput", "Peak memory", "Headroom", "Note"]
    for card in comparison.cards:
        yield f"### {card.card_gb:g} GB"
        both = ((comparison.base.label, card.base), (comparison.awq.label, card.awq))
        yield table(
            headers, [[label, *_fit(fit, unit(comparison.base.first))] for label, fit in both]
        )
        if card.ratio:
            yield f"At the largest batches the rate is {card.ratio:.3f} times {escape(comparison.base.label)}'s."


def _fit(fit: CardFit, unit: str) -> list[Any]:
    rate = _rate(fit.items_per_s, unit) if fit.items_per_s else None
    sizes = [
        mib(amount) if amount is not None else None
        for amount in (fit.peak_bytes, fit.headroom_bytes)
    ]
    return [fit.verdict, fit.batch_size, rate, *sizes, fit.note]


def _same_batch(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    what = unit(comparison.base.first)
    headers = [
        "Batch size",
        comparison.base.label,
        comparison.awq.label,
        "Overhead",
        "95 % interval",
        "Verdict",
    ]
    headers += ["Memory saved"]
    saved = {row.batch_size: f"{row.saving_percent:.1f} %" for row in comparison.memory}
    rows = [
        [
            row.batch_size,
            _rate(row.base_items_per_s, what),
            _rate(row.awq_items_per_s, what),
            f"{row.overhead_percent:+.1f} %",
            None if row.low is None or row.high is None else f"{row.low:+.1f} to {row.high:+.1f} %",
            row.verdict,
            saved.get(row.batch_size),
        ]
        for row in comparison.overhead
    ]
    return headers, rows


def _crossover(comparison: Comparison) -> str:
    found = comparison.crossover
    if found.budget_bytes is None or found.nominal_bytes is None:
        return f"None: {escape(found.reason)}."
    base, awq = escape(comparison.base.label), escape(comparison.awq.label)
    there = (
        f"{short(found.awq_items_per_s)} at batch {found.awq_batch_size}"
        if found.awq_items_per_s
        else "none that fits"
    )
    rate = _rate(found.base_items_per_s or 0, unit(comparison.base.first))
    return (
        f"From {mib(found.budget_bytes)} of usable memory on (a card of {mib(found.nominal_bytes)} nominal) {base}"
        f" at its largest batch is {found.as_fast}: {rate} at batch {found.base_batch_size}, {awq} {there}."
    )


def _recommendations(comparison: Comparison) -> Iterator[str]:
    for use, title in USES.items():
        found = [one for one in comparison.recommendations if one.use == use]
        if found:
            yield "### " + escape(
                title.format(base=comparison.base.label, awq=comparison.awq.label)
            )
            yield "\n".join(
                f"- {escape(one.sentence)} Derived: {escape(one.derived)}." for one in found
            )


def _rate(items_per_s: float, what: str) -> str:
    return f"{short(items_per_s)} {what}"
