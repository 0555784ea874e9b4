from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from colqwen_lab.runtime.tracking import MemoryTracker


def test_counts_births_ends_and_the_peak() -> None:
    with MemoryTracker() as tracker:
        a = torch.zeros(1000)
        assert tracker.live_bytes == 4000
        b = a + 1
        assert tracker.live_bytes == 8000
        del a
        assert tracker.live_bytes == 4000
        c = b.double()
        assert tracker.live_bytes == tracker.peak_bytes == 12000
        del b, c
    assert tracker.live_bytes == 0
    assert tracker.peak_bytes == 12000


def test_a_temporary_inside_an_expression_counts() -> None:
    x = torch.ones(256)
    with MemoryTracker([("x", x)]) as tracker:
        y = (x * 2 + 1).sum()
    assert tracker.live_bytes == 1024 + 4
    assert tracker.peak_bytes == 3 * 1024
    assert float(y) == 768


def test_views_and_known_tensors_count_once() -> None:
    x = torch.zeros(100, 10)
    with MemoryTracker(("x", view) for view in (x, x.T, x[0])) as tracker:
        y = x.view(10, 100).T.unsqueeze(0)
        x.add_(1)
        assert tracker.live_bytes == 4000
    del y


def test_sees_inside_composite_operators_and_modules() -> None:
    layer = torch.nn.Linear(64, 64)
    x = torch.ones(2, 3, 64)
    with (
        torch.no_grad(),
        MemoryTracker(("weights", t) for t in (x, *layer.parameters())) as tracker,
    ):
        y = torch.nn.functional.gelu(layer(x))
    resident = x.nbytes + sum(p.nbytes for p in layer.parameters())
    assert tracker.peak_bytes >= resident + 2 * y.nbytes
    assert tracker.live_bytes == resident + y.nbytes


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 500)), max_size=40))
def test_agrees_with_an_account_kept_by_hand(moves: list[tuple[int, int]]) -> None:
    slots: dict[int, torch.Tensor] = {}
    expected, peak = {}, 0
    with MemoryTracker() as tracker:
        for slot, size in moves:
            if slot in slots:
                del slots[slot], expected[slot]
            else:
                slots[slot] = torch.empty(size, dtype=torch.uint8)
                expected[slot] = size
            peak = max(peak, sum(expected.values()))
            assert tracker.live_bytes == sum(expected.values())
    assert tracker.peak_bytes == peak
