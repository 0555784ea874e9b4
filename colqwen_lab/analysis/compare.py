"""`awq` against `base`, from records alone: at the same batch, under a memory budget, what follows.

Percentages are of base: a speed of -50 % is half of base's items per second.
"""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape as html_escape
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import pandas as pd

from colqwen_lab import analysis
from colqwen_lab.analysis import render
from colqwen_lab.analysis.budget import (
    budgets,
    card_fits,
    find_crossover,
    stretches,
    too_small,
)
from colqwen_lab.analysis.claims import claims
from colqwen_lab.analysis.render import escape, interval, markdown, mib, short, span
from colqwen_lab.analysis.speed import (
    FEWEST_SAMPLES,
    SAME_PERCENT,
    Speed,
    differences,
    same_batch,
    speed_ratio,
    speeds,
)
from colqwen_lab.analysis.table import (
    Pair,
    Results,
    Series,
    conditions,
    disturbed,
    frame,
    kernels,
    peak,
    pick,
    random_weights,
    rate,
    unit,
)
from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.hardware import OUTSIDE_TORCH_BYTES
from colqwen_lab.records import GIB, Cell, published_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CARDS_GB", "SAME_PERCENT", "Comparison", "Speed", "compare", "speed_ratio", "speeds"]

CARDS_GB = (8, 12, 16, 24)
PARAMETERS = ["variant", "weights", "kernels", "gpu", "driver", "cuda", "cpu", "threads"]
PARAMETERS += ["attention", "torch", "transformers", "auto_round", "python", "os"]
SUMMARY = (
    "Overview",
    "Comparison at the same batch size",
    "Memory-constrained scenarios",
    "Caveats",
)
USE_OF = {"faster": "awq", "only awq": "awq", "slower": "base", "only base": "base"}
EACH = "each at its largest batch that fits"

Block: TypeAlias = pd.DataFrame | list[str]


class Recommendation(NamedTuple):
    """What to use (`base`, `awq` or `either`), and when."""

    use: str
    sentence: str


@dataclass(frozen=True, repr=False)
class Comparison:
    """`awq` against `base`: `.text()`, `.to_dict()`, `.markdown()`, `.plot()`, and tables.

    A place is a device, size, workload, execution and protocol. `places` holds a comparison each;
    `base`, `awq`, `speeds`, `rows` and the like are of the first place.
    """

    pairs: dict[str, Pair]
    cards_gb: tuple[float, ...] = CARDS_GB
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for gb in self.cards_gb:
            if not 0 < gb < math.inf:
                raise BadInput(f"a card must be memory in GB above 0, such as 8 or 12, got {gb}")

    @cached_property
    def places(self) -> dict[str, Comparison]:
        """Place to its comparison."""
        if len(self.pairs) == 1:
            return dict.fromkeys(self.pairs, self)
        return {name: Comparison({name: pair}, self.cards_gb) for name, pair in self.pairs.items()}

    @property
    def pair(self) -> Pair:
        """Base and awq of the first place."""
        return next(iter(self.pairs.values()))

    @property
    def base(self) -> Series:
        return self.pair[0]

    @property
    def awq(self) -> Series:
        return self.pair[1]

    @property
    def cells(self) -> list[Cell]:
        """The cells of both sides."""
        return [*self.base.cells, *self.awq.cells]

    @cached_property
    def speeds(self) -> tuple[Speed, ...]:
        """The speed at every shared batch."""
        return speeds(*self.pair)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The tidy frame of both sides, one row a batch: see `same_batch`."""
        return same_batch(*self.pair, self.speeds)

    @cached_property
    def cards(self) -> pd.DataFrame:
        """One row a card and side: see `card_fits`."""
        return card_fits(self.pair, self.cards_gb)

    @cached_property
    def budgets(self) -> pd.DataFrame:
        """One row a memory budget at which a largest batch changes: see `budgets`."""
        return budgets(self.pair)

    @cached_property
    def crossover(self) -> dict[str, Any]:
        """The memory from which on base is at least as fast: see `find_crossover`."""
        return {} if self.no_budgets else find_crossover(self.budgets)

    @cached_property
    def no_budgets(self) -> str:
        """Why memory budgets say nothing of these models; empty where they do."""
        if differences(self.base.cells, self.awq.cells):
            return "the two sides were not measured under the same conditions"
        if not all(series.rated and series.sized for series in self.pair):
            return "one side has no row with a rate and a peak"
        return too_small(self.pair, self.cards_gb)

    @cached_property
    def claims_table(self) -> pd.DataFrame:
        """The report's claims, what its rows say, whether each follows; empty for other rows."""
        published = self.cells == published_cells()
        return claims(self.pair, self.rows, self.budgets) if published else pd.DataFrame()

    def speed_table(self) -> pd.DataFrame:
        """One row a shared batch: rates, speed vs base with its verdict, memory saved."""
        rows, what = self.rows.dropna(subset="percent"), unit(self.base.first)
        ends = rows[["low", "high"]].to_numpy()
        columns = {
            "batch": rows["batch_size"],
            f"{self.base.label} {what}": rows["base_items_per_s"].map(render.rounded),
            f"{self.awq.label} {what}": rows["awq_items_per_s"].map(render.rounded),
            "speed vs base, %": rows["percent"].map("{:+.1f}".format),
            "95 % interval": [interval(low, high, sign="+") for low, high in ends],
            "verdict": rows["verdict"],
            "memory saved, %": rows["saving_percent"].round(1),
        }
        return render.screen(columns | ({"reason": rows["reason"]} if any(rows["reason"]) else {}))

    def card_table(self) -> pd.DataFrame:
        """One row a card and side: does it fit, the largest batch, the rate there, the headroom."""
        cards = self.cards
        if cards.empty:
            return cards
        columns = {
            "card GB": cards["card_gb"],
            "variant": cards["label"],
            "verdict": cards["verdict"],
            "largest batch": cards["batch_size"],
            unit(self.base.first): cards["items_per_s"].map(render.rounded, "ignore"),
            "peak MiB": cards["peak_bytes"].map(render.in_mib, "ignore"),
            "headroom": cards["headroom_bytes"].map(mib, "ignore"),
            "note": cards["note"],
        }
        return render.screen(columns)

    def side_by_side(self) -> pd.DataFrame:
        """One row a batch, a column a place: the speed vs base with its verdict, and the saving."""
        columns = {
            where: {
                speed.batch_size: f"{speed.percent:+.1f} % {speed.verdict}"
                for speed in place.speeds
            }
            for where, place in self.places.items()
        }
        return render.screen(pd.DataFrame(columns).sort_index().rename_axis("batch"))

    def place_table(self) -> pd.DataFrame:
        """One row a place and variant: the largest batch, its rate and peak, the fastest batch."""
        rows = []
        for where, place in self.places.items():
            for series in place.pair:
                row: dict[str, Any] = {"where": where, "variant": series.variant}
                if series.rated:
                    largest = series.rated[max(series.rated)]
                    fastest = max(series.rated.values(), key=rate)
                    row |= {"largest batch": largest.batch_size}
                    row |= {"items/s": render.rounded(rate(largest))}
                    row |= {"peak MiB": largest.memory and render.in_mib(peak(largest))}
                    row |= {"fastest batch": fastest.batch_size}
                    row |= {"items/s there": render.rounded(rate(fastest))}
                failed = [f"{cell.batch_size} {cell.status}" for cell in series.failed]
                rows.append(row | {"not ok": ", ".join(failed)})
        return render.screen(rows)

    # ------------------------------------------------------------ output

    @cached_property
    def recommendations(self) -> tuple[Recommendation, ...]:
        """When to use which: by memory, by budget, by batch, and by the time of a step."""
        return tuple(_recommendations(self))

    @cached_property
    def caveats(self) -> tuple[str, ...]:
        """What the figures do not show."""
        return tuple(_caveats(self))

    def verdict(self) -> str:
        """Memory, speed at the same batch, and the crossover, in a few sentences a place."""
        if len(self.pairs) > 1:
            return "\n".join(f"{where}: {place.verdict()}" for where, place in self.places.items())
        return " ".join(self.sentences)

    @cached_property
    def sentences(self) -> list[str]:
        """The sentences of the verdict."""
        spoken = [
            row.sentence for row in speed_sentences(self.base.label, self.awq.label, self.speeds)
        ]
        return [*_saving_sentences(self), *spoken, _crossover_sentence(self)]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON: schema 2, and the parts of each place."""
        places = []
        for where, place in self.places.items():
            tables = {"same_batch": place.rows, "cards": place.cards, "budgets": place.budgets}
            tables["claims"] = place.claims_table
            tables = {name: table.to_json(orient="records") for name, table in tables.items()}
            places.append(
                {"where": where, "base": place.base.to_dict(), "awq": place.awq.to_dict()}
                | {name: json.loads(table) for name, table in tables.items()}
                | {"crossover": place.crossover, "verdict": place.verdict()}
                | {"recommendations": [row._asdict() for row in place.recommendations]}
                | {"caveats": list(place.caveats)}
            )
        return {"schema": 2, "places": places, "skipped": list(self.skipped)}

    def text(self, width: int | None = None) -> str:
        """The comparison as plain text of at most `width` columns; default: the terminal's."""
        columns = width or shutil.get_terminal_size().columns

        def wrapped(sentence: str) -> str:
            return textwrap.fill(sentence, columns, initial_indent="- ", subsequent_indent="  ")

        return self._document("{}".format, wrapped, lambda t: render.text(t, columns), SUMMARY)

    def markdown(self) -> str:
        """The comparison as Markdown, in the layout of the report it grew from."""
        overhead = {"speed vs base, %": "Overhead, %"}
        return self._document(
            lambda title: f"## {escape(title)}",
            lambda sentence: f"- {escape(sentence)}",
            lambda table: markdown(table.rename(columns=overhead)),
        )

    def _repr_html_(self) -> str:
        return self._document(
            lambda title: f"<h4>{html_escape(title)}</h4>",
            lambda sentence: f"<p>{html_escape(sentence)}</p>",
            render.html,
            SUMMARY,
        )

    def __repr__(self) -> str:
        return self.text(100)

    def _document(
        self,
        heading: Callable[[str], str],
        line: Callable[[str], str],
        table: Callable[[pd.DataFrame], str],
        titles: Sequence[str] = (),
    ) -> str:
        """Titles, sentences and tables of all places; of the sections only `titles`, if any."""
        sections: list[tuple[str, list[Block]]] = []
        if several := len(self.pairs) > 1:
            side_by_side = [self.side_by_side(), self.place_table(), list(self.skipped)]
            sections.append(("Side by side", side_by_side))
        for where, place in self.places.items():
            title = f"{place.awq.label} against {place.base.label}"
            sections.append((f"{title}: {where}" if several else title, []))
            sections += [s for s in _sections(place).items() if not titles or s[0] in titles]
        parts = []
        for title, blocks in sections:
            parts.append(heading(title))
            for block in blocks:
                frame_ = isinstance(block, pd.DataFrame)
                parts += [table(block) if frame_ else "\n".join(map(line, block))]
        return "\n\n".join(filter(None, parts)) + "\n"

    def plot(self, kind: str = "speed", **options: Any) -> Figure:
        """A figure: speed, throughput, memory (with `cards=(8, 12)` in GB), tradeoff or roofline.

        Raises:
            BadInput: an unknown kind.
        """
        plots = analysis.plots
        series: Sequence[Series] = self.pair
        one_of("plot", kind, ["speed", *plots.KINDS])
        if len(self.pairs) > 1:
            cells = {id(cell): cell for place in self.places.values() for cell in place.cells}
            series = Results(tuple(cells.values())).series()
        if kind == "speed" and len(self.pairs) == 1:
            return plots.speed_vs_base(self)
        if kind == "speed":
            return plots.speed_lines(
                series, {where: place.speeds for where, place in self.places.items()}
            )
        cards = {"cards": self.cards_gb} if kind == "memory" and self.cards_gb != CARDS_GB else {}
        return plots.KINDS[kind](series, **cards | options)


# ---------------------------------------------------------------- which series


def compare(base: Results, awq: Results, cards: Sequence[float] = CARDS_GB) -> Comparison:
    """`awq` against `base` at every place where both were measured; `cards` are budgets in GB.

    Of `base` the variant `base` counts, else its only one; of `awq` its only variant, else its
    only one that is not base. The same variant on both sides is a control. Where a place has one
    16-bit base, each other model and kernel there is compared with it.

    Raises:
        BadInput: series that are ambiguous or differ in their settings, or a card of 0 GB or less.
    """
    sides = [_by_place(side) for side in (base, awq)]
    every = list(dict.fromkeys([*sides[0], *sides[1]]))
    shared = [place for place in every if place in sides[0] and place in sides[1]]
    if len(every) > 1:  # a single model that is on both sides would be compared with itself
        alone = [p for p in shared if sides[0][p] == sides[1][p] and len(sides[0][p].variants) == 1]
        shared = [place for place in shared if place not in alone]
    columns = enumerate(zip(*every, strict=True))
    varied = [n for n, values in columns if len({*values}) > 1] or [0]
    names = {place: ", ".join(place[n] for n in varied) for place in every}
    skipped = [
        f"{names[place]}: nothing to compare with." for place in every if place not in shared
    ]
    pairs: dict[str, Pair] = {}
    for place in shared:
        name, both = names[place], (sides[0][place], sides[1][place])
        bases = [series for series in both[0].series() if series.variant == "base"]
        plain = [series for series in bases if not series.first.configuration.eight_bit]
        others = [series for series in both[1].series() if series.variant != "base"]
        if len(plain) != 1 or not others:
            pairs[name] = _pair(*both)
            continue
        own = [series.label for series in bases if series is not plain[0]]
        skipped += [f"{name}: {label} is a configuration of base itself." for label in own]
        for other in others:
            where = f"{name}, {other.label}" if len(others) > 1 else name
            pairs[where] = Series("base", plain[0].cells), Series(other.variant, other.cells)
    if not pairs:
        pairs, skipped = {" against ".join(names.values()): _pair(base, awq)}, []
    return Comparison(pairs, tuple(cards), tuple(skipped))


def _by_place(results: Results) -> dict[tuple[str, ...], Results]:
    places: dict[tuple[str, ...], list[Cell]] = {}
    for cell in results:
        places.setdefault((cell.environment.device, *cell.settings()), []).append(cell)
    return {place: Results(tuple(cells)) for place, cells in places.items()}


def _pair(base: Results, awq: Results) -> Pair:
    quantised = [variant for variant in awq.variants if variant != "base"]
    only = quantised if len(quantised) == 1 else awq.variants
    first = pick(base, "base" if "base" in base.variants else base.variants, "base")
    second = pick(awq, only, "awq")
    if first.first.settings() != second.first.settings():
        ours, theirs = (" ".join(series.first.settings()) for series in (first, second))
        raise BadInput(
            f"base and awq must share their settings, got {first.label} with {ours} and "
            f"{second.label} with {theirs}; narrow them with .select(...)"
        )
    if first.label == second.label:
        return Series(f"{first.label} (A)", first.cells), Series(f"{first.label} (B)", second.cells)
    return first, second


# ---------------------------------------------------------------- sentences


def speed_sentences(base: str, other: str, rows: Sequence[Speed]) -> list[Recommendation]:
    """A sentence for the batch sizes of each verdict, and what it speaks for."""
    table = pd.DataFrame(map(asdict, rows), columns=["verdict", "reason", "batch_size", "percent"])
    sentences = []
    for (verdict, reason), group in table.groupby(["verdict", "reason"], sort=False):
        where, size = _batches(group["batch_size"]), span(group["percent"].abs())
        signed = f"({span(group['percent'], 1, '+')} %)"
        if reason:
            sentence = f"No verdict at {where} {signed}: {reason}."
        elif verdict == "inconclusive":
            sentence = f"No significant difference at {where} {signed}."
        else:
            row = rows[group.index[0]]
            within = ""
            if len(group) == 1 and row.low is not None and row.high is not None:
                low, high = sorted((abs(row.low), abs(row.high)))
                within = f" {interval(low, high, 0)}"
            what = f"{other} is {size} % {verdict} than {base}"
            sentence = f"{what}{within} at {where}."
        sentences.append(Recommendation(USE_OF.get(verdict, "either"), sentence))
    return sentences


def _batches(sizes: Iterable[int]) -> str:
    """`batch 8, 16 and 32`."""
    return "batch " + " and ".join(", ".join(map(str, sizes)).rsplit(", ", 1))


def _saving_sentences(place: Comparison) -> Iterator[str]:
    rows = place.rows[place.rows["saving_percent"] > 0]
    if len(rows):
        saved = f"{span(rows['saving_percent'])} % of {place.base.label}'s peak memory"
        yield f"{place.awq.label} saves {saved} at {_batches(rows['batch_size'])}."


def _free(start: float, end: float | None = None) -> str:
    upper = f" to {end / GIB:.1f} GiB" if end and end == end else " GiB or more"
    return f"With {start / GIB:.1f}{upper} free"


def _crossover_sentence(place: Comparison) -> str:
    base, cross = place.base.label, place.crossover
    if place.no_budgets:
        return f"No crossover: {place.no_budgets}."
    if not cross:
        why = f"{place.awq.label} is faster"
        if place.budgets["outcome"].iloc[-1] == "inconclusive":
            why = "no significant difference"
        return f"No crossover: {why} where every row fits, {EACH}."
    ours, theirs = cross["base_items_per_s"], cross["awq_items_per_s"]
    what = f"{base} is at least as fast"
    if cross["open"]:
        what += ", or the difference is not significant"
    elif theirs and 100 * abs(theirs / ours - 1) < SAME_PERCENT:
        what += f" (at first by less than {SAME_PERCENT:g} %)"
    return f"{_free(cross['need_bytes'])}, {what}, {EACH}."


def _recommendations(place: Comparison) -> Iterator[Recommendation]:
    base, awq = place.base.label, place.awq.label
    yield from (Recommendation("awq", sentence) for sentence in _saving_sentences(place))
    if differences(place.base.cells, place.awq.cells):
        return
    steps = place.budgets if not too_small(place.pair, place.cards_gb) else place.budgets[:0]
    for row in stretches(steps).itertuples():
        signed = f"({span(row.percents, 1, '+')} %)" if row.percents else ""
        size = span(map(abs, row.percents)) if row.percents else ""
        within = bool(row.percents) and max(map(abs, row.percents)) < SAME_PERCENT
        undecided = "no verdict" if row.disturbed else "no significant difference"
        inconclusive = f"{undecided} {signed}, {EACH}"
        if within and not row.disturbed:
            inconclusive = f"the two are within {SAME_PERCENT:g} %, {EACH}"
        sentence = {
            "only awq": f"only {awq} fits",
            "only base": f"only {base} fits",
            "faster": f"{awq} is {size} % faster, {EACH}",
            "slower": f"{awq} is {size} % slower, {EACH}",
            "inconclusive": inconclusive,
        }.get(row.outcome)
        if sentence:
            free = _free(row.start_bytes, row.end_bytes)
            yield Recommendation(USE_OF.get(row.outcome, "either"), f"{free}, {sentence}.")
    yield from speed_sentences(base, awq, place.speeds)
    for row in place.speeds[:1]:
        ours, theirs = (
            f"{short(1000 * row.batch_size / items)} ms with {label}"
            for label, items in ((base, row.base_items_per_s), (awq, row.items_per_s))
        )
        use = USE_OF.get(row.verdict, "either")
        yield Recommendation(use, f"A step of {row.batch_size} takes {ours}, {theirs}.")


def _caveats(place: Comparison) -> Iterator[str]:
    cells, table = place.cells, frame(place.cells)
    ok, count = table[table["status"] == "ok"], disturbed(cells)
    shared = place.rows.dropna(subset="percent")
    differing = differences(place.base.cells, place.awq.cells)
    unlike: list[str] = []
    for name in ("texts", "tokens", "dtype"):
        values = shared[[f"base_{name}", f"awq_{name}"]].map(render.shown).to_numpy()
        different = [
            f"{name} ({ours} against {theirs})" for ours, theirs in values if ours != theirs
        ]
        unlike += different[:1]
    least, most = (amount // 10**6 for amount in OUTSIDE_TORCH_BYTES)
    devices = " and ".join(table["device"].unique())
    timings = [(cell.timing, place.base.rated.get(b)) for b, cell in place.awq.rated.items()]
    methods = {cell.memory.method == "tracked" for cell in cells if cell.memory}
    few = [c for c in cells if c.status == "ok" and len(c.step_s) < FEWEST_SAMPLES]
    on_cpu = [c for c in cells if c.environment.cpu and not c.environment.gpu]
    outside = ok["device_bytes"].isna() | ok["reserved_bytes"].isna()
    apart = [t for t, c in timings if t and c and c.variant not in t.interleaved_with]
    origins = {*table["origin"]}
    sentences = {
        "These figures come from the report; they were not measured here.": "published" in origins,
        "These figures are predictions; they were not measured.": "predicted" in origins,
        f"No verdict on speed: the two sides differ in {'; '.join(differing)}.": differing,
        f"{count} of {len(cells)} cells were disturbed and give no verdict on speed.": count,
        "No batch size was measured on both sides.": shared.empty,
        f"Some rows have no error bars: they kept fewer than {FEWEST_SAMPLES} samples.": few,
        "Peaks come from tracked tensors and from the CUDA allocator.": len(methods) > 1,
        f"Some rows lack the memory outside torch: {least} to {most} MB are assumed.": any(outside),
        f"Rates under a memory budget are those of {devices}, not those of a smaller card.": True,
        "Some rates come from a CPU and say nothing about a GPU.": on_cpu,
        f"The two sides differ in {', '.join(unlike)}.": unlike,
        "The two were not interleaved: a drift between the runs looks like a difference.": apart,
    }
    yield from (sentence for sentence, holds in sentences.items() if holds)
    for series in place.pair:
        unsteady = [c.batch_size for c in series.cells if c.timing and not c.timing.steady]
        if any(map(random_weights, series.cells)):
            yield f"{series.label} has random weights: its embeddings mean nothing."
        if unsteady:
            yield f"{series.label} was not steady at {_batches(unsteady)}."
        if series.repeated:
            yield f"{series.label} has {_batches(series.repeated)} twice; the last row counts."
        for cell in series.failed:
            reason = cell.reason or "no reason recorded"
            yield f"{series.label} batch {cell.batch_size}: {cell.status}, {reason}."


# ---------------------------------------------------------------- the report's layout


def _sections(place: Comparison) -> dict[str, list[Block]]:
    """Title to tables and sentences, in the order of the report."""
    base, awq = place.pair
    parameters = {
        series.label: pd.DataFrame(
            [
                {"variant": c.variant, "weights": c.weights, "kernels": kernels(c)}
                | dict(c.environment)
                for c in series.cells
            ]
        )[PARAMETERS].agg(lambda column: " and ".join(map(str, column.dropna().unique())))
        for series in place.pair
    }
    table = pd.DataFrame(parameters).rename_axis("Parameter")
    small = too_small(place.pair, place.cards_gb)
    crossover, cross = [_crossover_sentence(place)], place.crossover
    if cross:
        nominal, need = mib(cross["nominal_bytes"]), mib(cross["need_bytes"])
        crossover.append(f"A card of {nominal} has these {need}.")
    names = {"base": f"Use {base.label}", "awq": f"Use {awq.label}", "either": "Either"}
    sections: dict[str, list[Block]] = {
        "Overview": [[conditions(place.cells), *place.sentences]],
        "Test environment": [table[table.ne("").any(axis=1)]],
        "Batch size sweep": [Results(tuple(place.cells)).table()],
        "Memory-constrained scenarios": [
            [f"Cards say nothing of models this small: {small}."] if small else place.card_table()
        ],
        "Comparison at the same batch size": [place.speed_table()],
        "Crossover": [crossover],
        "Recommendations": [[f"{names[row.use]}: {row.sentence}" for row in place.recommendations]],
        "Caveats": [list(place.caveats)],
    }
    if len(place.claims_table):
        sections["The report's claims against its own rows"] = [place.claims_table]
    return sections
