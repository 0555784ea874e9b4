"""The allocator against the rules of PyTorch's source, and under any order of requests."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colqwen_lab.predict.allocator import Allocator, memory_on_gpu, workspace_bytes
from colqwen_lab.predict.trace import Trace

MIB = 2**20


def test_rounds_to_512_bytes_and_reserves_a_small_segment() -> None:
    allocator = Allocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert allocator.allocated == 512 + 1024
    assert allocator.reserved == 2 * MIB


def test_a_large_rest_of_a_mebibyte_or_less_is_not_split_off() -> None:
    """47.5 MiB, a weight of the 4B, takes a segment of 48 MiB and counts whole."""
    allocator = Allocator()
    allocator.allocate(2560 * 9728 * 2)
    assert allocator.allocated == allocator.reserved == 48 * MIB
    allocator = Allocator()
    allocator.allocate(11 * MIB)
    assert allocator.allocated == 12 * MIB
    allocator.allocate(3 * MIB)
    assert allocator.allocated == 15 * MIB
    assert allocator.reserved == (12 + 20) * MIB


def test_smallest_block_that_is_large_enough_serves() -> None:
    allocator = Allocator()
    big, small = allocator.allocate(40 * MIB), allocator.allocate(24 * MIB)
    allocator.release(big)
    allocator.release(small)
    assert allocator.allocate(23 * MIB + 512 * 1024) == small
    assert allocator.reserved == 64 * MIB


def test_neighbours_merge_when_given_back() -> None:
    allocator = Allocator()
    parts = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.reserved == 20 * MIB
    for part in (parts[1], parts[0], parts[3], parts[2]):
        allocator.release(part)
    assert allocator.allocated == 0
    allocator.allocate(9 * MIB)
    allocator.allocate(10 * MIB)
    assert allocator.reserved == 20 * MIB


def test_a_warm_block_takes_all_weights_without_waste() -> None:
    sizes = [2560 * 9728 * 2] * 10
    allocator = Allocator()
    allocator.release(allocator.allocate(sum(sizes)))
    for size in sizes:
        allocator.allocate(size)
    assert sum(sizes) <= allocator.allocated <= sum(sizes) + MIB, "only the last may count its rest"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60 * MIB)), max_size=80))
def test_invariants(moves: list[tuple[int, int]]) -> None:
    allocator, live = Allocator(), {}
    for slot, size in moves:
        if slot in live:
            allocator.release(live.pop(slot)[0])
        else:
            live[slot] = allocator.allocate(size), size
        blocks = sorted((block.address, block.size) for block, _ in live.values())
        assert all(a + size <= b for (a, size), (b, _) in pairwise(blocks)), "blocks never overlap"
        assert all(size <= block.size <= size + MIB + 511 for block, size in live.values())
        assert allocator.allocated == sum(block.size for block, _ in live.values())
        assert allocator.allocated <= allocator.peak_allocated <= allocator.peak_reserved
        assert allocator.reserved == allocator.peak_reserved
    for block, _ in live.values():
        allocator.release(block)
    assert allocator.allocated == 0
    assert (
        sum(entry[0] for pool in allocator._free.values() for entry in pool) == allocator.reserved
    )


def test_under_a_cap_free_segments_are_returned_before_allocation_fails() -> None:
    allocator = Allocator(cap=64 * MIB)
    first = allocator.allocate(30 * MIB)
    allocator.allocate(30 * MIB)
    with pytest.raises(MemoryError):
        allocator.allocate(20 * MIB)
    allocator.release(first)
    allocator.allocate(34 * MIB)
    assert allocator.reserved == 64 * MIB


def test_a_segment_in_use_is_not_returned() -> None:
    allocator = Allocator(cap=40 * MIB)
    whole = allocator.allocate(40 * MIB)
    allocator.release(whole)
    allocator.allocate(4 * MIB)
    with pytest.raises(MemoryError):
        allocator.allocate(38 * MIB)


def test_workspace_by_generation() -> None:
    assert workspace_bytes(8) == 8.125 * MIB
    assert workspace_bytes(9) == workspace_bytes(12) == 32 * MIB


def test_a_replayed_trace() -> None:
    """Weights of 12 MiB load; then a tensor of 4 MiB, freed before one of 30 MiB comes."""
    log = [(0, 12 * MIB), (1, 4 * MIB), (1, 0), (2, 30 * MIB), (2, 0)]
    trace = Trace(log, ["weights", "activations", "activations"], loaded=1, before=1, flops=7)
    memory = memory_on_gpu(trace, 8 * MIB)
    assert memory["peak_bytes"] == (12 + 8 + 30) * MIB
    assert memory["breakdown"] == {
        "cuBLAS workspace": 8 * MIB,
        "allocator rounding": 0,
        "weights": 12 * MIB,
        "activations": 30 * MIB,
    }
    # 12 for the weights, 20 for what is below 10 MiB, 30 for the rest.
    assert memory["reserved_bytes"] == 62 * MIB
    assert memory["peak_bytes"] <= memory["min_reserved_bytes"] <= memory["reserved_bytes"]


def test_a_trace_lies_on_a_line_or_is_none() -> None:
    first = Trace([(0, 10), (1, 4), (1, 0)], ["a", "b"], 1, 1, flops=5)
    second = Trace([(0, 10), (1, 6), (1, 0)], ["a", "b"], 1, 1, flops=8)
    far = first.at(10, second)
    assert far is not None
    assert (far.log, far.flops) == ([(0, 10), (1, 24), (1, 0)], 35)
    assert first.at(10, Trace([(0, 10), (1, 6)], ["a", "b"], 1, 1, 8)) is None
