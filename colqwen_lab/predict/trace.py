"""Traces of a run: births and ends of its tensors, those of repeated layers kept once.

Identical layers have identical events, except the first and the last ones. So a network of a few
layers is traced, and the events of its last but one layer stand for those of all that are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from colqwen_lab.runtime.tracking import Mark

Event = tuple[int, int]


class Loop(NamedTuple):
    """Events `start` to `stop` of a log; a number grows by its part of `shifts` at each turn."""

    start: int
    stop: int
    turns: int
    shifts: list[int]

    def at(self, turn: int, events: list[Event]) -> list[Event]:
        """The events of a turn."""
        if not turn:
            return events
        shifts = zip(events, self.shifts, strict=True)
        return [(number + turn * shift, size) for (number, size), shift in shifts]


@dataclass(frozen=True)
class Trace:
    """Births (number, bytes) and ends (number, 0) of two steps, the label of each number, the work.

    `log` holds the events of each loop once. The first `loaded` events are the births of the
    weights. Up to `before`, execution fast makes its own weights of them, and the inputs come.
    Births `captured[0]` to `captured[1]` are those of a graph. `flops` are those of one step.
    """

    log: list[Event]
    labels: list[str]
    loaded: int
    before: int
    flops: int
    captured: tuple[int, int] = (0, 0)
    loops: tuple[Loop, ...] = ()

    def parts(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[list[Event], Loop]]:
        """The events `start` to `stop` in their order: runs of one turn, and loops."""
        stop, none = len(self.log) if stop is None else stop, Loop(0, 0, 1, [])
        for loop in self.loops:
            if start <= loop.start and loop.stop <= stop:
                yield self.log[start : loop.start], none
                yield self.log[loop.start : loop.stop], loop
                start = loop.stop
        yield self.log[start:stop], none

    def events(self, start: int = 0, stop: int | None = None) -> Iterator[Event]:
        """Every event from `start` to `stop` of the log, at each turn."""
        for events, loop in self.parts(start, stop):
            for turn in range(loop.turns):
                yield from loop.at(turn, events)

    def holding(self, size: int, label: str) -> Trace:
        """The trace with a weight of `size` bytes more."""
        return replace(
            self,
            log=[(len(self.labels), size), *self.log],
            labels=[*self.labels, label],
            loaded=self.loaded + 1,
            before=self.before + 1,
            loops=tuple(
                loop._replace(start=loop.start + 1, stop=loop.stop + 1) for loop in self.loops
            ),
        )

    def at(self, more: int, following: Trace) -> Trace | None:
        """This trace for `more` items more, on the line to `following`, or None.

        None if the two differ in the order of their births and ends.
        """
        (numbers, sizes), (others, more_sizes) = (
            zip(*t.log, strict=True) for t in (self, following)
        )
        if (numbers, self.labels, self.loops) != (others, following.labels, following.loops):
            return None
        log = [(n, a + more * (b - a)) for n, a, b in zip(numbers, sizes, more_sizes, strict=True)]
        return replace(self, log=log, flops=self.flops + more * (following.flops - self.flops))


class Irregular(Exception):
    """The traced layers do not have the same events."""


def repeated(trace: Trace, marks: Sequence[Mark], layers: int, more: int) -> Trace:
    """The trace with `more` layers more, of a network of `layers` layers; each pass marks them all.

    A pass repeats its last layer but one. Raises Irregular unless the layer before has the same
    events, births and labels.
    """
    if not more:
        return trace
    log, labels = trace.log, trace.labels
    passes = [marks[first : first + layers][-3:] for first in range(0, len(marks), layers)]
    shifts, repeating, own = dict[int, int](), set[int](), set[int]()
    for _, layer, last in passes:
        width = last.births - layer.births
        shifts |= dict.fromkeys(range(layer.births - 2 * width, last.births), width)
        repeating.update(range(layer.births, last.births))
        own.update(range(layer.events, last.events))
    handed, loops = set[int](), []
    for before, layer, last in passes:
        events, width = log[layer.events : last.events], last.births - layer.births
        earlier = [(n + shifts.get(n, 0), size) for n, size in log[before.events : layer.events]]
        named = labels[layer.births - width : layer.births] == labels[layer.births : last.births]
        if earlier != events or not named or any(n not in shifts for n, _ in events):
            raise Irregular
        loops.append(Loop(layer.events, last.events, more + 1, [shifts[n] for n, _ in events]))
        # What a layer leaves to the next one ends there.
        handed |= {n + shifts[n] for n, _ in events if n not in repeating}

    # What every layer leaves ends later, layer by layer, upwards or downwards.
    left = repeating - handed
    for chosen, run in groupby(range(len(log)), lambda at: at not in own and log[at][0] in left):
        if chosen:
            start, stop = (places := [*run])[0], places[-1] + 1
            ends, width = [n for n, _ in log[start:stop]], stop - start
            below = [(n - shifts[n], 0) for n in ends]
            sign = 1 if log[start - width : start] == below else -1
            if sign < 0:
                if log[stop : stop + width] != below:
                    raise Irregular
                handed.update(ends)
            loops.append(Loop(start, stop, more + 1, [sign * shifts[n] for n in ends]))
    numbers, names, first, grown = list[int](), list[str](), 0, 0
    for _, layer, last in passes:
        numbers += range(first + grown, last.births + grown)
        names += labels[first : layer.births] + labels[layer.births : last.births] * (more + 1)
        first, grown = last.births, grown + more * (last.births - layer.births)
    numbers += range(first + grown, len(labels) + grown + 1)
    return replace(
        trace,
        log=[
            (numbers[n] + (more * shifts[n] if n in handed and at not in own else 0), size)
            for at, (n, size) in enumerate(log)
        ],
        labels=names + labels[first:],
        flops=trace.flops
        + more * sum(b.flops - a.flops for _, a, b in passes if b.flops <= trace.flops),
        captured=(numbers[trace.captured[0]], numbers[trace.captured[1]]),
        loops=tuple(sorted(loops)),
    )
