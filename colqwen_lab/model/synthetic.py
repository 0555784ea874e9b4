"""Synthetic pages, queries about them, and which page answers which query. Imports no torch.

A page reports on one topic with a chart, a table and text. Four facts distinguish pages: the topic,
and the chart's kind, colour and place. A query names a topic, a kind and a colour, every second one
also a place; the pages with all of these answer it.

The split `held-out` has a fifth of the combinations of topic, kind and colour; `train` has the
others. Every pair of facts is in `train`, so only combinations of three are new in `held-out`.

Pages and queries depend on the split and the number alone: trained weights and records rely on it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import chain
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from colqwen_lab.errors import one_of

Colour = tuple[int, ...]
SPLITS = ("train", "held-out")
WIDTH, HEIGHT = 1240, 1754  # A4 at 150 dpi
# The width that the tiny model was trained at: 70 visual tokens a page.
SMALL_WIDTH = 224

TOPICS = (
    *("rainfall", "energy", "traffic", "health", "fishing"),
    *("housing", "tourism", "museums", "wages", "glaciers"),
)
KINDS = {
    "bar": ("bar chart", "bar graph", "column chart"),
    "line": ("line chart", "line graph", "curve"),
    "pie": ("pie chart", "pie", "circular chart"),
    "scatter": ("scatter plot", "dot plot", "cloud of points"),
}
COLOURS = {
    "red": (205, 40, 40),
    "orange": (240, 145, 25),
    "green": (45, 145, 60),
    "blue": (40, 90, 200),
    "purple": (125, 50, 175),
    "pink": (245, 140, 190),
}
PLACES = {
    "top": ("at the top", "in the upper half"),
    "bottom": ("at the bottom", "in the lower half"),
}
PHRASES = (
    "{colour} {kind} about {topic}{place}",
    "show me the {colour} {kind} on {topic}{place}",
    "which page has a {kind} in {colour} about {topic}{place}",
    "{topic}: a {kind}, {colour}{place}",
    "report on {topic} with a {colour} {kind}{place}",
    "find the {topic} page where the {kind}{place} is {colour}",
)

MARGIN, INK, GREY, PALE = 90, (40, 40, 45), (120, 120, 125), (226, 226, 230)
MONTHS = ("January", "March", "April", "June", "August", "September", "November")
REGIONS = ("North", "South", "East", "West", "Coast", "Uplands", "Islands", "Lakes", "Capital")
SENTENCES = """\
In {month} {year} the {region} office recorded a change of {a}.{b} percent against the year before.
The figures for {topic} are based on {a}{b} returns and have been rounded to the nearest unit.
Most of the difference is due to the {region} district, where {topic} came to {a},{b}00 in {year}.
Values for {month} are provisional and will be revised when the last returns have been received.
Over the whole period since {year}, the average stood at {a}.{b}, slightly below the long-term mean.
The committee took note of the results on {topic} and asked for a further survey in {month}.
No comparable data exist for the {region} district before {year}, so the series begins there.
""".splitlines()
POINTS = {"bar": (5, 8), "line": (7, 12), "scatter": (28, 45)}


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
    result = [
        Facts(topic, kind, colour, place)
        for i, topic in enumerate(TOPICS)
        for j, kind in enumerate(KINDS)
        for k, colour in enumerate(COLOURS)
        for place in PLACES
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
    words = {"topic": topic, "kind": random.choice(KINDS[kind]), "colour": colour, "place": where}
    return random.choice(PHRASES).format(**words).replace("a orange", "an orange")


def relevance(queries: int, pages: int, split: str = "train") -> dict[str, dict[str, int]]:
    """The answers of the first `queries` among the first `pages`: {"q0": {"p0": 1, ...}, ...}.

    Every query has an answer if there are at least as many pages.
    """
    judged: dict[str, dict[str, int]] = {}
    for number in range(queries):
        named = query_facts(number, split)
        answers = [page for page in range(pages) if facts(page, split)[: len(named)] == named]
        judged[f"q{number}"] = {f"p{page}": 1 for page in answers}
    return judged


def page(number: int, split: str = "train", width: int = WIDTH) -> Image.Image:
    """A page as an RGB image of A4 proportions, `width` pixels wide. Raises BadInput."""
    return _Page(number, split, width).image


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class _Page:
    """A page in the making. Coordinates are in units of 1240 x 1754, whatever its size."""

    def __init__(self, number: int, split: str, width: int) -> None:
        self.facts, self.random = facts(number, split), Random(f"page {split} {number}")
        self.scale = width / WIDTH
        self.image = Image.new("RGB", (width, round(HEIGHT * self.scale)), "white")
        self.draw = ImageDraw.Draw(self.image)
        random, topic = self.random, self.facts.topic
        year = random.randint(1980, 2024)
        self.text(MARGIN, 60, f"Office of Statistics  -  Bulletin {number}", 26, GREY)
        x, y = MARGIN + random.randint(-12, 12), 95 + random.randint(-8, 8)
        self.text(x, y, topic.capitalize(), 165)
        period = f"{random.choice(REGIONS)} district, {random.choice(MONTHS)} {year}"
        self.text(MARGIN, 305, period, 40, GREY)
        self.draw.rectangle(self.scaled(MARGIN, 372, WIDTH - MARGIN, 378), INK)
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

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        pixels = max(1, round(width * self.scale))
        self.draw.line(self.scaled(*chain(*points)), colour, pixels, joint="curve")

    def circle(self, x: float, y: float, radius: float) -> list[float]:
        return self.scaled(x - radius, y - radius, x + radius, y + radius)

    def endless_sentences(self) -> Iterator[str]:
        random = self.random
        while True:
            for sentence in random.sample(SENTENCES, len(SENTENCES)):
                yield sentence.format(
                    month=random.choice(MONTHS),
                    region=random.choice(REGIONS),
                    topic=self.facts.topic,
                    year=random.randint(1950, 2024),
                    a=random.randint(1, 98),
                    b=random.randint(1, 9),
                )

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
        self.draw.rectangle(self.scaled(MARGIN, y, WIDTH - MARGIN, y + 40), PALE)
        for region in ("District", *regions):
            self.text(MARGIN + 14, y + 8, region, 24)
            for column, year in enumerate(years):
                value = str(year) if region == "District" else f"{random.randint(10, 9999):,}"
                self.text(MARGIN + 260 + column * 165, y + 8, value, 24)
            y += 42
            self.line([(MARGIN, y), (WIDTH - MARGIN, y)], GREY, 2)
        return y + 26

    def chart(self, y: float) -> None:
        """Draw the chart with its caption, 570 units high, from `y` down."""
        random, (topic, kind, name, _) = self.random, self.facts
        colour = tuple(min(255, max(0, part + random.randint(-15, 15))) for part in COLOURS[name])
        if kind == "pie":
            self.pie(y, colour)
        else:
            self.axes(y, kind, colour)
        number, subject = random.randint(1, 9), random.choice(("year", "district", "source"))
        self.text(MARGIN + 300, y + 535, f"Figure {number}: {topic} by {subject}", 26)

    def axes(self, y: float, kind: str, colour: Colour) -> None:
        """Draw a bar, line or scatter chart."""
        left, right, bottom = MARGIN + 70, WIDTH - MARGIN - 40, y + 490
        for tick in range(6):
            level = bottom - tick * 90
            self.line([(left, level), (right, level)], PALE if tick else INK, 2)
            self.text(MARGIN, level - 14, str(tick * 20), 22, GREY)
        count = self.random.randint(*POINTS[kind])
        step = (right - left) / count
        levels = [bottom - self.random.uniform(60, 450) for _ in range(count)]
        points = [(left + (i + 0.5) * step, level) for i, level in enumerate(levels)]
        if kind == "line":
            self.line(points, colour, 14)
        for x, level in points:
            if kind == "bar":
                corners = self.scaled(x - 0.36 * step, level, x + 0.36 * step, bottom)
                self.draw.rectangle(corners, colour)
            elif kind == "scatter":
                self.draw.ellipse(self.circle(x, level, 15), colour)
        for i in range(6):
            self.text(left + i * (right - left) / 6, bottom + 12, str(2000 + i), 22, GREY)

    def pie(self, y: float, colour: Colour) -> None:
        """Draw a pie in tints of one colour, with its legend."""
        shares = [self.random.uniform(0.6, 2) for _ in range(self.random.randint(3, 6))]
        start, edge, x = self.random.uniform(0, 360), max(1, round(4 * self.scale)), WIDTH * 0.72
        for i, (share, region) in enumerate(zip(shares, REGIONS, strict=False)):
            end, tint = start + 360 * share / sum(shares), 0.55 * i / len(shares)
            paint = tuple(round(part + (255 - part) * tint) for part in colour)
            pie = self.circle(WIDTH * 0.42, y + 260, 245)
            self.draw.pieslice(pie, start, end, paint, "white", edge)
            row = y + 50 * i
            self.draw.rectangle(self.scaled(x, row + 120, x + 28, row + 148), paint)
            percent = math.floor(100 * share / sum(shares))
            self.text(x + 44, row + 118, f"{region} {percent} %", 24)
            start = end
