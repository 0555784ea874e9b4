"""Synthetic pages, queries about them, and which page answers which query. Imports no torch.

A page has a topic and one chart of a kind, colour and place. A query names topic, kind and colour,
every second one also the place; the pages with all of these answer it. The split `held-out` has a
fifth of the combinations of topic, kind and colour, `train` the others and every pair of facts.

Pages and queries depend on the split and the number alone. Trained weights and records rely on it,
and so on the order of every list in `data/synthetic.json`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import chain, product
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from colqwen_lab.errors import one_of
from colqwen_lab.settings import DATA

Colour = tuple[int, ...]
SPLITS = ("train", "held-out")
WIDTH, HEIGHT = 1240, 1754  # A4 at 150 dpi
# The width that the tiny model was trained at: 70 visual tokens a page.
SMALL_WIDTH = 224
MARGIN, INK, GREY, PALE = 90, (40, 40, 45), (120, 120, 125), (226, 226, 230)

_WORDS = json.loads((DATA / "synthetic.json").read_bytes())
TOPICS, KINDS, COLOURS, PLACES, *_TEXTS = _WORDS.values()
PHRASES, MONTHS, REGIONS, SENTENCES, SUBJECTS, POINTS = _TEXTS


class Facts(NamedTuple):
    """What distinguishes pages: a topic, and keys of KINDS, COLOURS and PLACES."""

    topic: str
    kind: str
    colour: str
    place: str


@cache
def _facts(split: str) -> tuple[Facts, ...]:
    """All facts of a split, shuffled. Held out: positions in the lists add up to 0 modulo 5."""
    held_out = one_of("split", split, SPLITS) == "held-out"
    lists = product(enumerate(TOPICS), enumerate(KINDS), enumerate(COLOURS), PLACES)
    result = [
        Facts(topic, kind, colour, place)
        for (i, topic), (j, kind), (k, colour), place in lists
        if ((i + j + k) % 5 == 0) == held_out
    ]
    Random(split).shuffle(result)
    return tuple(result)


def different(split: str) -> int:
    """The number of pages of a split that differ in their facts."""
    return len(_facts(split))


def facts(number: int, split: str = "train") -> Facts:
    """The facts of a page; they repeat after `different(split)` pages."""
    return _facts(split)[number % different(split)]


def query_facts(number: int, split: str = "train") -> tuple[str, ...]:
    """The facts that a query names: those of the page of its number; even numbers name no place."""
    return facts(number, split)[: 3 + number % 2]


def query(number: int, split: str = "train") -> str:
    """The text of a query; the page of the same number answers it, and perhaps others."""
    random = Random(f"query {split} {number}")
    topic, kind, colour, *place = query_facts(number, split)
    where = "".join(f" {random.choice(PLACES[name])}" for name in place)
    names = {"topic": topic, "kind": random.choice(KINDS[kind]), "colour": colour, "place": where}
    return random.choice(PHRASES).format(**names).replace("a orange", "an orange")


def relevance(queries: int, pages: int, split: str = "train") -> dict[str, dict[str, int]]:
    """The answers of the first `queries` among the first `pages`: {"q0": {"p0": 1, ...}, ...}."""
    has = {f"p{number}": facts(number, split) for number in range(pages)}
    named = {f"q{number}": query_facts(number, split) for number in range(queries)}
    return {
        query: {page: 1 for page in has if has[page][: len(wanted)] == wanted}
        for query, wanted in named.items()
    }


def page(number: int, split: str = "train", width: int = WIDTH) -> Image.Image:
    """A page as an RGB image of A4 proportions, `width` pixels wide. Raises BadInput."""
    return _Page(number, split, width).image


_font = cache(ImageFont.load_default)


class _Page:
    """A page being drawn. Coordinates are in units of 1240 x 1754, whatever its size."""

    def __init__(self, number: int, split: str, width: int) -> None:
        self.facts = facts(number, split)
        self.random = random = Random(f"page {split} {number}")
        self.scale = width / WIDTH
        self.image = Image.new("RGB", (width, round(HEIGHT * self.scale)), "white")
        self.draw = ImageDraw.Draw(self.image)
        year = random.randint(1980, 2024)
        self.text(MARGIN, 60, f"Office of Statistics  -  Bulletin {number}", 26, GREY)
        x, y = MARGIN + random.randint(-12, 12), 95 + random.randint(-8, 8)
        self.text(x, y, self.facts.topic.capitalize(), 165)
        period = f"{random.choice(REGIONS)} district, {random.choice(MONTHS)} {year}"
        self.text(MARGIN, 305, period, 40, GREY)
        self.box(INK, MARGIN, 372, WIDTH - MARGIN, 378)
        self.sentences = self.endless_sentences()
        y = 410 + random.randint(0, 20)
        if self.facts.place == "top":
            self.chart(y)
            self.table(self.paragraphs(y + 590, random.randint(2, 3)))
        else:
            self.paragraphs(self.table(self.paragraphs(y, 2)), 1)
            self.chart(y + 650)
        self.text(WIDTH // 2, HEIGHT - 70, str(number + 1), 26, GREY)

    def scaled(self, *values: float) -> list[float]:
        return [value * self.scale for value in values]

    def text(self, x: float, y: float, text: str, size: float, colour: Colour = INK) -> None:
        place, font = (x * self.scale, y * self.scale), _font(size * self.scale)
        self.draw.text(place, text, colour, font, spacing=0.5 * size * self.scale)

    def line(self, colour: Colour, width: float, *points: float) -> None:
        pixels = max(1, round(width * self.scale))
        self.draw.line(self.scaled(*points), colour, pixels, joint="curve")

    def box(self, colour: Colour, *corners: float) -> None:
        self.draw.rectangle(self.scaled(*corners), colour)

    def endless_sentences(self) -> Iterator[str]:
        choice, number = self.random.choice, self.random.randint
        while True:
            for sentence in self.random.sample(SENTENCES, len(SENTENCES)):
                words = {"month": choice(MONTHS), "region": choice(REGIONS)}
                words |= {"year": number(1950, 2024), "a": number(1, 98), "b": number(1, 9)}
                yield sentence.format(topic=self.facts.topic, **words)

    def paragraphs(self, y: float, count: int) -> float:
        """Write `count` paragraphs from `y` down; the y where they end."""
        for _ in range(count):
            lines = textwrap.wrap(f"{next(self.sentences)} {next(self.sentences)}", 88)
            self.text(MARGIN, y, "\n".join(lines), 25)
            y += 38 * len(lines) + 22
        return y

    def table(self, y: float) -> float:
        """Draw a table of regions over years from `y` down; the y where it ends."""
        random = self.random
        years = sorted(random.sample(range(1990, 2025), random.randint(4, 5)))
        regions = random.sample(REGIONS, 4)
        self.box(PALE, MARGIN, y, WIDTH - MARGIN, y + 40)
        for region in ("District", *regions):
            self.text(MARGIN + 14, y + 8, region, 24)
            for column, year in enumerate(years):
                value = str(year) if region == "District" else f"{random.randint(10, 9999):,}"
                self.text(MARGIN + 260 + column * 165, y + 8, value, 24)
            y += 42
            self.line(GREY, 2, MARGIN, y, WIDTH - MARGIN, y)
        return y + 26

    def chart(self, y: float) -> None:
        """Draw the chart with its caption, 570 units high, from `y` down."""
        random, (topic, kind, name, _) = self.random, self.facts
        colour = tuple(min(255, max(0, part + random.randint(-15, 15))) for part in COLOURS[name])
        if kind == "pie":
            self.pie(y, colour)
        else:
            self.axes(y, kind, colour)
        number, subject = random.randint(1, 9), random.choice(SUBJECTS)
        self.text(MARGIN + 300, y + 535, f"Figure {number}: {topic} by {subject}", 26)

    def axes(self, y: float, kind: str, colour: Colour) -> None:
        """Draw a bar, line or scatter chart."""
        left, right, bottom = MARGIN + 70, WIDTH - MARGIN - 40, y + 490
        for tick in range(6):
            level = bottom - tick * 90
            self.line(PALE if tick else INK, 2, left, level, right, level)
            self.text(MARGIN, level - 14, str(tick * 20), 22, GREY)
            self.text(left + tick * (right - left) / 6, bottom + 12, str(2000 + tick), 22, GREY)
        count = self.random.randint(*POINTS[kind])
        step = (right - left) / count
        height = self.random.uniform
        points = [(left + (i + 0.5) * step, bottom - height(60, 450)) for i in range(count)]
        if kind == "line":
            self.line(colour, 14, *chain(*points))
        for x, y in points:
            if kind == "bar":
                self.box(colour, x - 0.36 * step, y, x + 0.36 * step, bottom)
            elif kind == "scatter":
                self.draw.ellipse(self.scaled(x - 15, y - 15, x + 15, y + 15), colour)

    def pie(self, y: float, colour: Colour) -> None:
        """Draw a pie in tints of one colour, with its legend."""
        shares = [self.random.uniform(0.6, 2) for _ in range(self.random.randint(3, 6))]
        start, edge = self.random.uniform(0, 360), max(1, round(4 * self.scale))
        middle, left = WIDTH * 0.42, WIDTH * 0.72
        circle = self.scaled(middle - 245, y + 15, middle + 245, y + 505)
        for i, share in enumerate(shares):
            end, tint = start + 360 * share / sum(shares), 0.55 * i / len(shares)
            paint = tuple(round(part + (255 - part) * tint) for part in colour)
            self.draw.pieslice(circle, start, end, paint, "white", edge)
            row, percent = y + 50 * i, int(100 * share / sum(shares))
            self.box(paint, left, row + 120, left + 28, row + 148)
            self.text(left + 44, row + 118, f"{REGIONS[i]} {percent} %", 24)
            start = end
