"""Drawn pages: documents that the lab draws, queries about them, and which page answers which query.

A page is a report on one topic with a chart, a table and text. Four facts tell pages apart: the topic, the chart's
kind, its colour and its place. A query asks in words for a topic, a kind and a colour, and every second one for a
place too; a page answers a query if all that is asked holds.

Held out is a fifth of the combinations of topic, kind and colour: pages and queries of the split `held-out` have
these and no others, those of `train` never. Each pair of facts in them is in training too, so what a model meets for
the first time in `held-out` is how the three go together.

Everything hangs on the split and the number alone, drawn with PIL's own font; no torch.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import product
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from colqwen_lab.errors import one_of

SPLITS = ("train", "held-out")
WIDTH, HEIGHT = 1240, 1754  # A4 at 150 dpi
# Where the tiny model was trained: 70 visual tokens a page.
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
SENTENCES = (
    "In {month} {year} the {region} office recorded a change of {a}.{b} percent against the year before.",
    "The figures for {topic} are based on {a}{b} returns and have been rounded to the nearest unit.",
    "Most of the difference is due to the {region} district, where {topic} came to {a},{b}00 in {year}.",
    "Values for {month} are provisional and will be revised when the last returns have been received.",
    "Over the whole period since {year}, the average stood at {a}.{b}, slightly below the long-term mean.",
    "The committee took note of the results on {topic} and asked for a further survey in {month}.",
    "No comparable data exist for the {region} district before {year}, so the series begins there.",
)


class Facts(NamedTuple):
    """What tells pages apart, as keys of TOPICS, KINDS, COLOURS and PLACES."""

    topic: str
    kind: str
    colour: str
    place: str


@cache
def _facts(split: str) -> tuple[Facts, ...]:
    """All facts of a split, shuffled: held out are topics, kinds and colours whose places in their lists add up to 0
    modulo 5."""
    held_out = one_of("split", split, SPLITS) == "held-out"
    every = product(enumerate(TOPICS), enumerate(KINDS), enumerate(COLOURS), PLACES)
    found = [
        Facts(t, k, c, place)
        for (i, t), (j, k), (n, c), place in every
        if ((i + j + n) % 5 == 0) == held_out
    ]
    Random(split).shuffle(found)
    return tuple(found)


def different(split: str) -> int:
    """How many pages of a split differ in their facts, before these come back."""
    return len(_facts(split))


def facts(number: int, split: str = "train") -> Facts:
    """The facts of a page; they come back after `different(split)` pages."""
    return _facts(split)[number % different(split)]


def asked(number: int, split: str = "train") -> tuple[str, ...]:
    """What query `number` asks for: the facts of the page of this number, without the place if the number is even."""
    return facts(number, split)[: 3 + number % 2]


def query(number: int, split: str = "train") -> str:
    """Query `number` in words; the page of the same number answers it, and perhaps others."""
    random = Random(f"query {split} {number}")
    topic, kind, colour, *place = asked(number, split)
    where = "".join(f" {random.choice(PLACES[name])}" for name in place)
    words = {"topic": topic, "kind": random.choice(KINDS[kind]), "colour": colour, "place": where}
    return random.choice(PHRASES).format(**words).replace("a orange", "an orange")


def relevance(queries: int, pages: int, split: str = "train") -> dict[str, dict[str, int]]:
    """For each of the first `queries`, the pages among the first `pages` that answer it: {"q0": {"p0": 1, ...}, ...}.

    Every query has an answer if there are at least as many pages.
    """
    described = [facts(number, split) for number in range(pages)]
    judged = {}
    for number in range(queries):
        wanted = asked(number, split)
        answers = (page for page, has in enumerate(described) if has[: len(wanted)] == wanted)
        judged[f"q{number}"] = {f"p{page}": 1 for page in answers}
    return judged


def page(number: int, split: str = "train", width: int = WIDTH) -> Image.Image:
    """Page `number` as an RGB image of A4 proportions, `width` pixels wide. All pages differ.

    Raises:
        BadInput: no such split.
    """
    has, random = facts(number, split), Random(f"page {split} {number}")
    pen = _Pen(width)
    year = random.randint(1980, 2024)
    pen.text(MARGIN, 60, f"Office of Statistics  -  Bulletin {number}", 26, GREY)
    pen.text(
        MARGIN + random.randint(-12, 12),
        95 + random.randint(-8, 8),
        has.topic.capitalize(),
        165,
        INK,
    )
    pen.text(
        MARGIN, 305, f"{random.choice(REGIONS)} district, {random.choice(MONTHS)} {year}", 40, GREY
    )
    pen.box((MARGIN, 372, WIDTH - MARGIN, 378), INK)
    sentences = _sentences(random, has.topic)
    top = 410 + random.randint(0, 20)
    if has.place == "top":
        _chart(pen, random, has, top)
        _table(pen, random, _paragraphs(pen, sentences, top + 590, random.randint(2, 3)))
    else:
        _paragraphs(pen, sentences, _table(pen, random, _paragraphs(pen, sentences, top, 2)), 1)
        _chart(pen, random, has, top + 650)
    pen.text(WIDTH // 2, HEIGHT - 70, str(number + 1), 26, GREY)
    return pen.image


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class _Pen:
    """Draws in the units of a page of 1240 x 1754, whatever its size."""

    def __init__(self, width: int) -> None:
        self.scale = width / WIDTH
        self.image = Image.new("RGB", (width, round(HEIGHT * self.scale)), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, text: str, size: float, colour: tuple[int, ...] = INK
    ) -> None:
        scaled = (x * self.scale, y * self.scale)
        self.draw.text(
            scaled, text, colour, _font(size * self.scale), spacing=0.5 * size * self.scale
        )

    def box(self, corners: tuple[float, float, float, float], colour: tuple[int, ...]) -> None:
        self.draw.rectangle([value * self.scale for value in corners], colour)

    def line(
        self, points: list[tuple[float, float]], colour: tuple[int, ...], thick: float = 2
    ) -> None:
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(scaled, colour, max(1, round(thick * self.scale)), joint="curve")

    def around(self, x: float, y: float, radius: float) -> list[float]:
        """The corners of a circle, as PIL takes them."""
        return [value * self.scale for value in (x - radius, y - radius, x + radius, y + radius)]


def _sentences(random: Random, topic: str) -> Iterator[str]:
    while True:
        for sentence in random.sample(SENTENCES, len(SENTENCES)):
            words = {
                "month": random.choice(MONTHS),
                "region": random.choice(REGIONS),
                "topic": topic,
            }
            numbers = {
                "year": random.randint(1950, 2024),
                "a": random.randint(1, 98),
                "b": random.randint(1, 9),
            }
            yield sentence.format(**words, **numbers)


def _paragraphs(pen: _Pen, sentences: Iterator[str], y: float, count: int) -> float:
    """Draw `count` paragraphs from `y` down; where they end."""
    for _ in range(count):
        lines = textwrap.wrap(" ".join(next(sentences) for _ in range(2)), 88)
        pen.text(MARGIN, y, "\n".join(lines), 25)
        y += 38 * len(lines) + 22
    return y


def _table(pen: _Pen, random: Random, y: float) -> float:
    """Draw a table of regions over years from `y` down; where it ends."""
    years = sorted(random.sample(range(1990, 2025), random.randint(4, 5)))
    regions = random.sample(REGIONS, 4)
    pen.box((MARGIN, y, WIDTH - MARGIN, y + 40), PALE)
    for row, first in enumerate(["District", *regions]):
        pen.text(MARGIN + 14, y + 8, first, 24)
        for column, year in enumerate(years):
            value = str(year) if row == 0 else f"{random.randint(10, 9999):,}"
            pen.text(MARGIN + 260 + column * 165, y + 8, value, 24)
        y += 42
        pen.line([(MARGIN, y), (WIDTH - MARGIN, y)], GREY)
    return y + 26


def _chart(pen: _Pen, random: Random, has: Facts, y: float) -> None:
    """Draw the page's chart with its caption, 570 units high, from `y` down."""
    colour = tuple(min(255, max(0, part + random.randint(-15, 15))) for part in COLOURS[has.colour])
    left, right, bottom = MARGIN + 70, WIDTH - MARGIN - 40, y + 490
    if has.kind == "pie":
        _pie(pen, random, colour, y)
    else:
        for tick in range(6):
            level = bottom - tick * 90
            pen.line([(left, level), (right, level)], INK if tick == 0 else PALE)
            pen.text(MARGIN, level - 14, str(tick * 20), 22, GREY)
        count = random.randint(*{"bar": (5, 8), "line": (7, 12), "scatter": (28, 45)}[has.kind])
        step = (right - left) / count
        points = [(left + (i + 0.5) * step, bottom - random.uniform(60, 450)) for i in range(count)]
        if has.kind == "bar":
            for x, level in points:
                pen.box((x - 0.36 * step, level, x + 0.36 * step, bottom), colour)
        elif has.kind == "line":
            pen.line(points, colour, 14)
        else:
            for x, level in points:
                pen.draw.ellipse(pen.around(x, level, 15), colour)
        for i in range(6):
            pen.text(left + i * (right - left) / 6, bottom + 12, str(2000 + i), 22, GREY)
    caption = f"Figure {random.randint(1, 9)}: {has.topic} by {random.choice(('year', 'district', 'source'))}"
    pen.text(MARGIN + 300, y + 535, caption, 26, INK)


def _pie(pen: _Pen, random: Random, colour: tuple[int, ...], y: float) -> None:
    """A pie in tints of one colour, with its legend."""
    shares = [random.uniform(0.6, 2) for _ in range(random.randint(3, 6))]
    start = random.uniform(0, 360)
    for i, (share, region) in enumerate(zip(shares, REGIONS, strict=False)):
        end, tint = start + 360 * share / sum(shares), 0.55 * i / len(shares)
        paint = tuple(round(part + (255 - part) * tint) for part in colour)
        edge = max(1, round(4 * pen.scale))
        pen.draw.pieslice(pen.around(WIDTH * 0.42, y + 260, 245), start, end, paint, "white", edge)
        pen.box((WIDTH * 0.72, y + 120 + 50 * i, WIDTH * 0.72 + 28, y + 148 + 50 * i), paint)
        pen.text(
            WIDTH * 0.72 + 44,
            y + 118 + 50 * i,
            f"{region} {math.floor(100 * share / sum(shares))} %",
            24,
        )
        start = end
