"""PyTorch's CUDA caching allocator, followed block by block, and a trace replayed through it.

Source: c10/cuda/CUDACachingAllocator.cpp. Sizes are rounded to 512 bytes. Requests up to 1 MiB come
from segments of 2 MiB, those below 10 MiB from segments of 20 MiB, larger ones from a segment of
their own, rounded to 2 MiB. The smallest sufficient free block serves a request. It is split if at
least 512 bytes (small) or more than 1 MiB (large) remain; otherwise the whole block counts, so
`max_memory_allocated` exceeds the sum of the tensors.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

MIB = 2**20
ROUND = 512
# To how many bytes the least memory of a run is searched.
CAP_STEP = 4 * MIB
GRAPH_POOL = -1
ROUNDING, WORKSPACE = "allocator rounding", "cuBLAS workspace"


def workspace_bytes(capability: int) -> int:
    """PyTorch's default cuBLAS workspace: 32 MiB from compute capability 9 on, else 8.125 MiB.

    Source: CublasHandlePool.cpp and pytorch#175344.
    """
    return 32 * MIB if capability >= 9 else 8 * MIB + MIB // 8


def rounded(size: int, to: int) -> int:
    """`size` rounded up to a multiple of `to`, at least one."""
    return max(to, -(-size // to) * to)


class Block(NamedTuple):
    """A piece of a segment; `pool` is the number of its pool and whether the block is small."""

    size: int
    address: int
    segment_size: int
    pool: tuple[int, bool]


class Allocator:
    """Bytes handed out and reserved, now and at the peak, as torch.cuda.memory_stats counts them.

    A new segment that would exceed `cap` makes the allocator return every free segment to the GPU;
    if that is not enough, `allocate` raises MemoryError, as a GPU of that memory would.
    """

    def __init__(self, cap: float = math.inf) -> None:
        self.cap = cap
        self.allocated = self.peak_allocated = self.reserved = self.peak_reserved = self._end = 0
        self._free: defaultdict[tuple[int, bool], list[Block]] = defaultdict(list)  # each sorted
        self._edges: dict[int, Block] = {}  # free blocks by their first address and by their end

    def allocate(self, size: int, pool: int = 0) -> Block:
        """A block of at least `size` bytes. A captured graph has a pool of its own."""
        size = rounded(size, ROUND)
        small = size <= MIB
        free = self._free[pool, small]
        if not free or free[-1].size < size:
            self._reserve(size, (pool, small))
        block = free[bisect_left(free, (size,))]
        self._remove(block)
        rest = block.size - size
        if rest >= ROUND if small else rest > MIB:
            self._add(block._replace(size=rest, address=block.address + size))
            block = block._replace(size=size)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Free `block`, merged with its free neighbours."""
        self.allocated -= block.size
        for edge in (block.address, block.address + block.size):
            if other := self._edges.get(edge):
                self._remove(other)
                address = min(block.address, other.address)
                block = block._replace(size=block.size + other.size, address=address)
        self._add(block)

    def return_segments(self) -> None:
        """Give every wholly free segment back to the GPU."""
        for block in [block for free in self._free.values() for block in free]:
            if block.size == block.segment_size:
                self._remove(block)
                self.reserved -= block.size

    def _reserve(self, size: int, pool: tuple[int, bool]) -> None:
        large = 20 * MIB if size < 10 * MIB else rounded(size, 2 * MIB)
        total = 2 * MIB if pool[1] else large
        if self.reserved + total > self.cap:
            self.return_segments()
        if self.reserved + total > self.cap:
            raise MemoryError
        self._add(Block(total, self._end, total, pool))
        self._end += total + 1  # a gap: blocks of two segments never merge
        self.reserved += total
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _add(self, block: Block) -> None:
        insort(self._free[block.pool], block)
        self._edges[block.address] = self._edges[block.address + block.size] = block

    def _remove(self, block: Block) -> None:
        free = self._free[block.pool]
        del free[bisect_left(free, block)]
        del self._edges[block.address], self._edges[block.address + block.size]


@dataclass(frozen=True)
class Trace:
    """Births (number, bytes) and ends (number, 0) of two steps, the label of each number, the work.

    The first `loaded` events are the births of the weights. Up to `before`, execution fast makes
    its own weights of them, and the inputs come. Births `captured[0]` to `captured[1]` are those of
    a graph.
    """

    log: list[tuple[int, int]]
    labels: list[str]
    loaded: int
    before: int
    flops: int
    captured: tuple[int, int] = (0, 0)

    def holding(self, size: int, label: str) -> Trace:
        """The trace with a weight of `size` bytes more."""
        log, loaded = [(len(self.labels), size), *self.log], self.loaded + 1
        labels = [*self.labels, label]
        return replace(self, log=log, labels=labels, loaded=loaded, before=self.before + 1)

    def at(self, more: int, following: Trace) -> Trace | None:
        """This trace for `more` items more, on the line to `following`, or None.

        None if the two differ in the order of their births and ends.
        """
        (numbers, sizes), (others, more_sizes) = (
            zip(*t.log, strict=True) for t in (self, following)
        )
        if numbers != others or self.labels != following.labels:
            return None
        log = [(n, a + more * (b - a)) for n, a, b in zip(numbers, sizes, more_sizes, strict=True)]
        return replace(self, log=log, flops=self.flops + more * (following.flops - self.flops))


def replay(
    trace: Trace, workspace: int, cap: float = math.inf
) -> tuple[Allocator, dict[int, tuple[Block, int]]]:
    """`(allocator, blocks with their bytes by number)`, the blocks that live at the peak.

    Loading warms the allocator with one block of all weights, as transformers and this lab do. Free
    segments go back to the GPU before the first step, and peaks count from there.

    Raises:
        MemoryError: more than `cap` bytes would be reserved.
    """
    allocator = Allocator(cap)
    allocator.release(allocator.allocate(sum(size for _, size in trace.log[: trace.loaded])))
    live: dict[int, tuple[Block, int]] = {}
    at_peak, peak = live, math.inf
    for index, (number, size) in enumerate(trace.log):
        if index == trace.before:
            allocator.allocate(workspace)
            allocator.return_segments()
            peak = allocator.peak_allocated = allocator.allocated
            allocator.peak_reserved = allocator.reserved
            at_peak = dict(live)
        if size:
            captured = trace.captured[0] <= number < trace.captured[1]
            live[number] = allocator.allocate(size, GRAPH_POOL if captured else 0), size
            if allocator.peak_allocated > peak:
                at_peak, peak = dict(live), allocator.peak_allocated
        elif number in live:
            allocator.release(live.pop(number)[0])
    return allocator, at_peak


def memory_on_gpu(trace: Trace, workspace: int) -> dict[str, Any]:
    """The fields of a `Memory` that depend on the allocator; the breakdown adds up to the peak.

    `min_reserved_bytes` is exact to `CAP_STEP`. It is above the peak, because free memory is
    fragmented, and below what an uncapped run reserves.
    """
    allocator, at_peak = replay(trace, workspace)
    parts: Counter[str] = Counter({WORKSPACE: workspace, ROUNDING: 0})
    for number, (block, size) in at_peak.items():
        parts[trace.labels[number]] += size
        parts[ROUNDING] += block.size - size
    low, high = allocator.peak_allocated - 1, allocator.peak_reserved
    while high - low > CAP_STEP:
        middle = (low + high) // 2
        try:
            replay(trace, workspace, middle)
            high = middle
        except MemoryError:
            low = middle
    return {
        "peak_bytes": allocator.peak_allocated,
        "reserved_bytes": allocator.peak_reserved,
        "min_reserved_bytes": high,
        "breakdown": dict(parts),
    }
