"""Traces: layers that are left out have the events that a run of all layers has."""

from __future__ import annotations

from typing import Any

import pytest

from colqwen_lab.predict import predictor
from colqwen_lab.predict.allocator import memory_on_gpu
from colqwen_lab.predict.predictor import FakeNetwork, Setup
from colqwen_lab.predict.trace import Irregular, Loop, Trace, repeated
from colqwen_lab.records import Quantization
from colqwen_lab.runtime.tracking import Mark

MIB = 2**20
W4 = Quantization(bits=4, group_size=128, sym=True)


@pytest.mark.parametrize(
    ("quantization", "fields"),
    [
        (None, {"kernel": "torch", "protocol": "published", "padded": True}),
        (W4, {"kernel": "humming", "execution": "fast"}),
        (W4, {"kernel": "fused", "execution": "fast", "prefetched": ("o",)}),
        (W4, {"kernel": "humming", "workload": "pages", "tokens": 81}),
    ],
)
def test_some_layers_tell_the_events_of_all(
    quantization: Quantization | None, fields: dict[str, Any]
) -> None:
    setup = Setup("mid", quantization, **{"tokens": 20} | fields)
    few, every = FakeNetwork(setup), FakeNetwork(setup, every_layer=True)
    assert (every.more, every.layers, few.layers + few.more) == (0, 8, 8)
    trace, whole = few.traced(2, setup), every.traced(2, setup)
    assert len(trace.log) < len(whole.log)
    for start, stop in ((0, "loaded"), (0, "before"), (0, None)):
        left, right = (list(t.events(start, stop and getattr(t, stop))) for t in (trace, whole))
        assert left == right
    assert (trace.labels, trace.flops, trace.captured) == (
        whole.labels,
        whole.flops,
        whole.captured,
    )
    assert few.parts == every.parts
    assert memory_on_gpu(trace, 8 * MIB) == memory_on_gpu(whole, 8 * MIB)


def layered(widths: list[int]) -> tuple[Trace, list[Mark]]:
    """A pass of layers that each make an output, of `widths` bytes, and a tensor that stays."""
    log, marks, number = [(0, 100)], [], 0
    for width in widths:
        marks.append(Mark(len(log), number + 1, 10 * len(marks)))
        log += [(number + 1, 7), (number + 2, width), (number, 0)]
        number += 2
    log += [(n, 0) for n in range(number - 1, 0, -2)]
    return Trace(log, ["kept", "output"] * len(widths) + ["end"], 0, 0, 10 * len(widths)), marks


def test_repeated_layers_by_hand() -> None:
    """What a layer hands over ends in the next; what stays ends after the last, downwards."""
    (few, marks), (every, _) = layered([50] * 4), layered([50] * 9)
    trace = repeated(few, marks, 4, 5)
    assert list(trace.events()) == every.log
    assert [loop.turns for loop in trace.loops] == [6, 6]
    assert (trace.flops, len(trace.labels)) == (every.flops, len(every.labels))
    assert repeated(few, marks, 4, 0) is few


def test_layers_that_differ_are_irregular() -> None:
    few, marks = layered([50, 50, 51, 50])
    with pytest.raises(Irregular):
        repeated(few, marks, 4, 5)


def test_without_two_layers_alike_every_layer_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("mid", kernel="torch", tokens=7)
    expected = predictor._traced_cell(setup, 3)

    def irregular(trace: Trace, marks: list[Mark], layers: int, more: int) -> Trace:
        if more and marks[-1].flops:
            raise Irregular
        return repeated(trace, marks, layers, more)

    monkeypatch.setattr(predictor, "repeated", irregular)
    predictor._network.cache_clear()
    assert predictor._traced_cell(setup, 3) == expected
    predictor._network.cache_clear()


@pytest.mark.parametrize("turns", [2, 3, 8, 9])
def test_turns_that_come_again_are_skipped(turns: int) -> None:
    """Each output, of 12 MiB, lives until the next one does, beside a buffer of 30 MiB."""
    log = [(1, 12 * MIB), (3, 12 * MIB), (4, 30 * MIB), (4, 0), (1, 0), (2 * turns + 1, 0)]
    log.append((0, 12 * MIB))  # in the place of the last output
    labels = ["x"] * (2 * turns + 3)
    trace = Trace(log, labels, 1, 1, 1, loops=(Loop(1, 5, turns, [2, 2, 2, 2]),))
    whole = Trace(list(trace.events()), labels, 1, 1, 1)
    assert memory_on_gpu(trace, 0) == memory_on_gpu(whole, 0)
    assert memory_on_gpu(trace, 0)["peak_bytes"] == (12 + 12 + 30) * MIB + 512
