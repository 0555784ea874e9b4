"""`awq` against `base`, from records alone: at the same batch, under a memory budget, what follows.

Percentages are of base: a speed of -50 % is half of base's items per second.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd

from colqwen_lab import analysis
from colqwen_lab.analysis import budget, render
from colqwen_lab.analysis.claims import claims
from colqwen_lab.analysis.render import escape, rounded
from colqwen_lab.analysis.speed import (
    FEWEST_SAMPLES,
    Recommendation,
    batches,
    differences,
    same_batch,
    speed_grid,
    speed_sentences,
    speeds,
)
from colqwen_lab.analysis.table import (
    Pair,
    Results,
    Series,
    conditions,
    disturbed,
    frame,
    on_screen,
    pick,
    random_weights,
    unit,
    value,
)
from colqwen_lab.errors import BadInput, one_of
from colqwen_lab.records import GIB, Cell, published_cells
from colqwen_lab.settings import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARDS_GB = (8, 12, 16, 24)
MOST_PLACES = 50
CLAIMS = "The report's claims against its own rows"
#: Sections that only the Markdown report has.
DETAILS = ("Test environment", "Batch size sweep", CLAIMS)
#: What the figures do not show, in the order of the report.
CAVEATS = {
    "published": "These figures come from the report; they were not measured here.",
    "predicted": "These figures are predictions; they were not measured.",
    "differing": "No verdict on speed: the two sides differ in {differing}.",
    "disturbed": "{disturbed} cells were disturbed: no verdict on their speed.",
    "few": f"Some rates have no interval: fewer than {FEWEST_SAMPLES} samples.",
    "methods": "Peaks come from tracked tensors and from the CUDA allocator.",
    "assumed": "Memory outside torch was not measured: 200 to 700 MB are assumed in what fits.",
    "on_cpu": "Some rates come from a CPU and say nothing about a GPU.",
    "apart": "The two were not interleaved: a drift between the runs looks like a difference.",
    "random": "Random weights: the embeddings mean nothing.",
    "uneven": "Measured were {uneven}: largest batches are of these.",
}
Block: TypeAlias = pd.DataFrame | list[str]


class Comparison:
    """`awq` against `base`: `.text()`, `.to_dict()`, `.markdown()`, `.plot()`, and tables.

    A place is a device, size, workload, execution and protocol. `places` holds a comparison each;
    everything else is of the first place: the series `base` and `awq`, the `speeds` at every shared
    batch, `rows` as in `same_batch`, `cards` as in `card_fits`, the `budgets` at which a largest
    batch changes, or why there are none (`no_budgets`), and the `crossover` from which base is at
    least as fast, if any.
    """

    def __init__(
        self,
        pairs: dict[str, Pair],
        cards_gb: tuple[float, ...] = CARDS_GB,
        skipped: tuple[str, ...] = (),
    ) -> None:
        self.pairs, self.cards_gb, self.skipped = pairs, cards_gb, skipped
        self.pair = next(iter(pairs.values()))
        self.base, self.awq = self.pair
        self.cells = self.base.cells + self.awq.cells
        self.speeds = speeds(*self.pair)
        self.rows = same_batch(self.pair, self.speeds)
        self.cards = budget.card_fits(self.pair, cards_gb)
        self.no_budgets = budget.obstacle(self.pair)
        self.budgets = [] if self.no_budgets else budget.budgets(self.pair)
        self.crossover = budget.find_crossover(self.budgets)
        self.places = dict.fromkeys(pairs, self)
        if len(pairs) > 1:
            self.places = {where: Comparison({where: p}, cards_gb) for where, p in pairs.items()}

    def claims_table(self) -> pd.DataFrame:
        """The report's claims, what its rows say, whether each follows; empty for other rows."""
        published = list(self.cells) == published_cells()
        return claims(self.pair, self.rows, self.budgets) if published else pd.DataFrame()

    def speed_table(self) -> pd.DataFrame:
        """One row a shared batch: rates, speed vs base with interval and verdict, memory saved."""
        rows, what = self.rows.dropna(subset="percent"), unit(self.base.first)
        columns = {
            "batch": rows["batch_size"],
            f"{self.base.label} {what}": rows["base_items_per_s"].map(rounded),
            f"{self.awq.label} {what}": rows["awq_items_per_s"].map(rounded),
            "speed vs base, %": [row.shown for row in self.speeds],
            "verdict": [row.outcome for row in self.speeds],
            "memory saved, %": rows["saving_percent"].round(1),
        }
        return render.screen(columns)

    def card_table(self) -> pd.DataFrame:
        """One row a card and side: does it fit, the largest batch, its rate and peak, headroom."""
        names = ["card_gb", "label", "verdict", "batch_size", "items_per_s"]
        names += ["peak_bytes", "headroom_bytes", "note"]
        table = on_screen(self.cards.reindex(columns=names), names)
        return table.rename(columns={"items/s": unit(self.base.first)})

    def side_by_side(self) -> pd.DataFrame:
        """One row a batch, a column a place: the speed vs base in percent, with its verdict."""
        columns = {where: place.speeds for where, place in self.places.items()}
        return speed_grid(columns, lambda row: f"{row.percent:+.1f} % {row.outcome}")

    def place_table(self) -> pd.DataFrame:
        """One row a place and variant: the largest batch, its rate and peak, and what failed."""
        rows = [(w, s) for w, place in self.places.items() for s in place.pair if s.rated]
        failed = [", ".join(f"{c.batch_size} {c.status}" for c in s.failed) for _, s in rows]
        cells = frame([*series.rated.values()][-1] for _, series in rows)
        table = on_screen(cells, ["variant", "batch_size", "items_per_s", "peak_bytes"])
        table.insert(0, "where", [where for where, _ in rows])
        return render.screen(table.assign(**{"not ok": failed}))

    @property
    def recommendations(self) -> tuple[Recommendation, ...]:
        """When to use which: by memory, by budget, by batch, and by the time of a step."""
        labels = self.base.label, self.awq.label
        rows = [*self._saving, *budget.budget_sentences(self.budgets, *labels)]
        by_batch = speed_sentences(*labels, self.speeds)
        for row in self.speeds[:1]:
            rates = zip(labels, (row.base_items_per_s, row.items_per_s), strict=True)
            took = (f"{render.short(1e3 * row.batch_size / r)} ms with {name}" for name, r in rates)
            kind = self.base.first.workload.kind
            step = f"A batch of {row.batch_size} {kind} takes {', '.join(took)}."
            by_batch.append(Recommendation(by_batch[0].use, step))
        return (*rows, *by_batch)

    @property
    def _saving(self) -> list[Recommendation]:
        rows = self.rows.dropna(subset="saving_percent")
        saves, needs = (rows[(sign * rows["saving_percent"]).round(1) > 0] for sign in (1, -1))
        if saves.empty:
            return []
        saved = f"{render.span(saves['saving_percent'])} % of {self.base.label}'s peak memory"
        sentence = f"{self.awq.label} saves {saved} at {batches(saves['batch_size'])}"
        if len(needs):
            more = render.span(-needs["saving_percent"])
            sentence += f", and needs {more} % more at {batches(needs['batch_size'])}"
        return [Recommendation("awq", f"{sentence}.")]

    @property
    def crossover_sentence(self) -> str:
        """From which memory and batch sizes on base is at least as fast, or why there is none."""
        base, awq, steps = self.base.label, self.awq.label, self.budgets
        if reasons := [step.speed.reason for step in steps if step.speed and step.speed.reason]:
            return f"No verdict on a crossover: {reasons[0]}."
        if start := self.crossover:
            free = f"with {start['need_bytes'] / GIB:.1f} GiB or more free"
            rates = f"The median rate of {base} is at least that of {awq} {free}"
            other = f"batch {size}" if (size := start["awq_batch_size"]) else "none"
            sizes = f"There {base} runs batch {start['base_batch_size']}, and {awq} {other}."
            return f"{rates}, each at its largest batch. {sizes}"
        faster = f"{awq} is faster where every row fits"
        if steps and steps[-1].outcome == "inconclusive":
            faster = "no significant difference where every row fits"
        return f"No crossover: {self.no_budgets or faster}."

    def verdict(self) -> str:
        """Memory, speed at the same batch, and the crossover, in a few sentences a place."""
        if len(self.pairs) > 1:
            return "\n".join(f"{where}: {place.verdict()}" for where, place in self.places.items())
        rows = [*self._saving, *speed_sentences(self.base.label, self.awq.label, self.speeds)]
        return " ".join([*(row.sentence for row in rows), self.crossover_sentence])

    @property
    def caveats(self) -> tuple[str, ...]:
        """What the figures do not show."""
        cells, base, awq = self.cells, self.base.rated, self.awq.rated
        memories = [cell.memory for cell in cells if cell.memory]
        timings = [(base[b].variant, c.timing) for b, c in awq.items() if b in base and c.timing]
        on_cpu = any(cell.environment.cpu and not cell.environment.gpu for cell in cells)
        largest = {series.label: max(series.sized, default=0) for series in self.pair}
        ends = " and ".join(f"{label} up to batch {most}" for label, most in largest.items())
        facts: dict[str, Any] = {
            **{cell.origin: True for cell in cells},
            "differing": "; ".join(differences(self.base.cells, self.awq.cells)),
            "disturbed": disturbed(cells) and f"{disturbed(cells)} of {len(cells)}",
            "few": any(c.status == "ok" and len(c.step_s) < FEWEST_SAMPLES for c in cells),
            "methods": len({memory.method == "tracked" for memory in memories}) > 1,
            "assumed": not on_cpu and None in {memory.device_bytes for memory in memories},
            "on_cpu": on_cpu,
            "apart": any(variant not in timing.interleaved_with for variant, timing in timings),
            "random": any(map(random_weights, cells)),
            "uneven": ends if len({*largest.values()}) > 1 else "",
        }
        failed = [
            f"{series.label} batch {c.batch_size}: {c.status}, {c.reason or 'no reason recorded'}."
            for series in self.pair
            for c in series.failed
        ]
        return (
            *(text.format(**facts) for name, text in CAVEATS.items() if facts.get(name)),
            *failed,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON: schema 2, and the parts of each place."""
        places = [
            {
                "where": where,
                "base": place.base.to_dict(),
                "awq": place.awq.to_dict(),
                "same_batch": _records(place.rows),
                "cards": _records(place.cards),
                "budgets": [
                    {"need_bytes": b.need_bytes, "outcome": b.outcome} for b in place.budgets
                ],
                "crossover": place.crossover,
                "verdict": place.verdict(),
                "recommendations": [row._asdict() for row in place.recommendations],
                "caveats": list(place.caveats),
                "claims": _records(place.claims_table()),
            }
            for where, place in self.places.items()
        ]
        return {"schema": 2, "places": places, "skipped": list(self.skipped)}

    def text(self, width: int | None = None) -> str:
        """The comparison as plain text of at most `width` columns; default: the terminal's."""
        columns = width or shutil.get_terminal_size().columns
        wrap = textwrap.TextWrapper(columns, initial_indent="- ", subsequent_indent="  ")
        return self._document(str, wrap.fill, lambda t: render.text(t, columns), DETAILS)

    def markdown(self) -> str:
        """The comparison as Markdown, in the layout of the report it grew from."""
        overhead = {"speed vs base, %": "Overhead, %"}
        return self._document(
            lambda title: f"## {escape(title)}",
            lambda line: f"- {escape(line)}",
            lambda table: render.markdown(table.rename(columns=overhead)),
        )

    def save(self, path: str | Path) -> Path:
        """Write `markdown()` to a file; returns its path. Raises BadInput for another file."""
        return write_file(path, self.markdown(), "## (Side by side|.+ against .+)\n")

    def _repr_html_(self) -> str:
        return self._document(
            lambda title: f"<h4>{render.as_html(title)}</h4>",
            lambda line: f"<p>{render.as_html(line)}</p>",
            render.html,
            DETAILS,
        )

    def __repr__(self) -> str:
        return self.text(100)

    def _document(
        self,
        heading: Callable[[str], str],
        line: Callable[[str], str],
        table: Callable[[pd.DataFrame], str],
        omitted: Sequence[str] = (),
    ) -> str:
        parts = []
        for title, *blocks in self._sections():
            if title not in omitted:
                parts.append(heading(title))
                parts += [
                    "\n".join(map(line, block)) if isinstance(block, list) else table(block)
                    for block in blocks
                    if len(block)
                ]
        return "\n\n".join(parts) + "\n"

    def _sections(self) -> Iterator[tuple[str, *tuple[Block, ...]]]:
        """Title, tables and lists of sentences, in the order of the report."""
        several = len(self.pairs) > 1
        if several:
            yield "Side by side", self.side_by_side(), self.place_table(), list(self.skipped)
        for where, place in self.places.items():
            base, awq = place.pair
            title = f"{awq.label} against {base.label}"
            yield (f"{title}: {where}" if several else title,)
            yield "Overview", [conditions(place.cells)]
            machines = {series.label: _machine(series.first) for series in place.pair}
            table = pd.DataFrame(machines).dropna(how="all").rename_axis("Parameter")
            yield "Test environment", table
            yield "Batch size sweep", Results(place.cells).table()
            notes = ["Rates are those of the device above, not those of a smaller card."]
            if len(place.cards) and place.cards["note"].any():
                notes += ["A note is the smallest measured batch that does not fit, and its peak."]
            yield "Memory-constrained scenarios", place.card_table(), notes
            yield "Comparison at the same batch size", place.speed_table()
            yield "Crossover", [place.crossover_sentence]
            yield "Recommendations", [row.sentence for row in place.recommendations]
            yield "Caveats", list(place.caveats)
            if len(table := place.claims_table()):
                yield CLAIMS, table

    def plot(self, kind: str = "speed", **options: Any) -> Figure:
        """A figure: speed, throughput, memory (`cards=(8, 12)` in GB), tradeoff or roofline."""
        plots, several = analysis.plots, len(self.pairs) > 1
        one_of("plot", kind, ["speed", *plots.KINDS])
        cells = tuple(cell for place in self.places.values() for cell in place.cells)
        series = Results(cells).series() if several else self.pair
        if kind == "speed":
            places = self.places if several else {self.awq.label: self}
            lines = {name: place.speeds for name, place in places.items()}
            return plots.speed_lines(series, lines)
        cards = {"cards": self.cards_gb} if kind == "memory" else {}
        return plots.KINDS[kind](series, **cards | options)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    return records


def _machine(cell: Cell) -> dict[str, Any]:
    parts = {"weights": cell.weights, "kernels": value(cell, "kernels_used")}
    return parts | cell.environment.model_dump(exclude={"gpu_memory_bytes", "host_memory_bytes"})


def compare(base: Results, awq: Results, cards: Sequence[float] = CARDS_GB) -> Comparison:
    """`awq` against `base` at every place where both were measured; `cards` are budgets in GB.

    Of `base` the variant `base` counts, else its only one; of `awq` its only variant, else its
    only one that is not base. The same variant on both sides is a control. Where a place has one
    16-bit base, each other model and kernel there is compared with it.

    Raises:
        BadInput: series that are ambiguous or differ in their settings.
    """
    sides = _by_place(base), _by_place(awq)
    every = list(sides[0] | sides[1])
    columns = enumerate(zip(*every, strict=True))
    varied = [n for n, values in columns if len({*values}) > 1] or [0]
    names = {place: ", ".join(place[n] for n in varied) for place in every}
    pairs: dict[str, Pair] = {}
    skipped = []
    for place, name in list(names.items())[:MOST_PLACES]:
        ours, theirs = (side.get(place, Results(())) for side in sides)
        bases = [series for series in ours.series() if series.variant == "base"]
        plain = [series for series in bases if not series.first.configuration.eight_bit]
        others = [series for series in theirs.series() if series.variant != "base"]
        if len(plain) == 1 and others:
            for other in others:
                where = f"{name}, {other.label}" if len(others) > 1 else name
                pairs[where] = Series("base", plain[0].cells), Series(other.variant, other.cells)
        elif ours and theirs and (len(every) == 1 or ours != theirs or len(ours.variants) > 1):
            pairs[name] = _pair(ours, theirs)
        else:  # also a single model that is on both sides: it would be compared with itself
            skipped.append(f"{name}: nothing to compare with.")
    if len(names) > MOST_PLACES:
        rest = f"{len(names) - MOST_PLACES} of {len(names)} places are not compared"
        skipped.append(f"{rest}; narrow the records.")
    if not pairs:
        pairs, skipped = {" against ".join(names.values()): _pair(base, awq)}, []
    return Comparison(pairs, tuple(cards), tuple(skipped))


def _by_place(results: Results) -> dict[tuple[str, ...], Results]:
    places = defaultdict[tuple[str, ...], list[Cell]](list)
    for cell in results:
        places[cell.environment.device, *cell.settings()].append(cell)
    return {place: Results(tuple(cells)) for place, cells in places.items()}


def _pair(base: Results, awq: Results) -> Pair:
    quantised = [variant for variant in awq.variants if variant != "base"]
    first = pick(base, "base" if "base" in base.variants else base.variants, "base")
    second = pick(awq, quantised if len(quantised) == 1 else awq.variants, "awq")
    settings = [" ".join(series.first.settings()) for series in (first, second)]
    if settings[0] != settings[1]:
        raise BadInput(
            f"base and awq must share their settings, got {first.label} with {settings[0]} and "
            f"{second.label} with {settings[1]}; narrow the records to equal settings"
        )
    if first.label == second.label:
        return Series(f"{first.label} (A)", first.cells), Series(f"{first.label} (B)", second.cells)
    return first, second
