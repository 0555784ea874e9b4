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
from collections.abc import Iterable
from copy import copy
from typing import Any, NamedTuple

from colqwen_lab.predict.trace import Event, Trace

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
        self.granted, self.refused = 0, math.inf  # the largest and the smallest request
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
            self._add(Block(rest, block.address + size, *block[2:]))
            block = Block(size, *block[1:])
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
                block = Block(block.size + other.size, address, *block[2:])
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
        if not self._grants(self.reserved + total):
            self.return_segments()
            if not self._grants(self.reserved + total):
                raise MemoryError(self.refused)
        self._add(Block(total, self._end, total, pool))
        self._end += total + 1  # a gap: blocks of two segments never merge
        self.reserved += total
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _grants(self, total: int) -> bool:
        if total > self.cap:
            self.refused = min(self.refused, total)
            return False
        self.granted = max(self.granted, total)
        return True

    def copy(self, cap: float) -> Allocator:
        """The same blocks under another cap."""
        other = copy(self)
        other.cap, other._edges = cap, dict(self._edges)
        other._free = defaultdict(list, {pool: [*free] for pool, free in self._free.items()})
        return other

    def state(self) -> Any:
        """All that later requests depend on, while no segment comes or goes."""
        return self.reserved, *(tuple(free) for free in self._free.values())

    def _add(self, block: Block) -> None:
        insort(self._free[block.pool], block)
        self._edges[block.address] = self._edges[block.address + block.size] = block

    def _remove(self, block: Block) -> None:
        free = self._free[block.pool]
        del free[bisect_left(free, block)]
        del self._edges[block.address], self._edges[block.address + block.size]


class Run:
    """A trace on an allocator; `live` are the blocks in use with their bytes, by number."""

    def __init__(self, trace: Trace, workspace: int, cap: float = math.inf) -> None:
        """Up to the first step, from which peaks count.

        Loading warms the allocator with one block of all weights, as transformers and this lab do.
        Free segments go back to the GPU before the first step.
        """
        self.trace, self.live = trace, dict[int, tuple[Block, int]]()
        self.allocator = allocator = Allocator(cap)
        weights = sum(size for _, size in trace.events(0, trace.loaded))
        allocator.release(allocator.allocate(weights))
        self._play(trace.events(0, trace.before))
        allocator.allocate(workspace)
        allocator.return_segments()
        allocator.peak_allocated, allocator.peak_reserved = allocator.allocated, allocator.reserved
        self.at_peak = dict(self.live)

    def under(self, cap: float) -> Run:
        """A copy on an allocator of another cap, which must grant what was granted so far."""
        run = copy(self)
        run.allocator, run.live = self.allocator.copy(cap), dict(self.live)
        return run

    def steps(self) -> None:
        """Replay the steps; `at_peak` is then what lives at the peak."""
        for events, loop in self.trace.parts(self.trace.before):
            seen, turn = dict[Any, int](), 0
            while turn < loop.turns:
                self._play(loop.at(turn, events), True)
                shifts = zip(events, loop.shifts, strict=False)
                left = [(n + turn * s, s) for (n, _), s in shifts if n + turn * s in self.live]
                state = self.allocator.state(), *(self.live[number] for number, _ in left)
                # A state that comes again repeats the turns in between, peaks included.
                period = turn - seen.setdefault(state, turn)
                skipped = (loop.turns - 1 - turn) // period * period if period else 0
                if skipped:
                    self.live |= {n + skipped * s: self.live.pop(n) for n, s in left}
                turn += 1 + skipped

    def _play(self, events: Iterable[Event], watch: bool = False) -> None:
        allocator, live, (first, last) = self.allocator, self.live, self.trace.captured
        for number, size in events:
            if size:
                peak = allocator.peak_allocated
                pool = GRAPH_POOL if first <= number < last else 0
                live[number] = allocator.allocate(size, pool), size
                if watch and allocator.peak_allocated > peak:
                    self.at_peak = dict(live)
            elif number in live:
                allocator.release(live.pop(number)[0])


def memory_on_gpu(trace: Trace, workspace: int) -> dict[str, Any]:
    """The fields of a `Memory` that depend on the allocator; the breakdown adds up to the peak.

    `min_reserved_bytes` is exact to `CAP_STEP`. It is above the peak, because free memory is
    fragmented, and below what an uncapped run reserves.
    """
    loaded = Run(trace, workspace)
    run = loaded.under(math.inf)
    run.steps()
    allocator = run.allocator
    parts: Counter[str] = Counter({WORKSPACE: workspace, ROUNDING: 0})
    for number, (block, size) in run.at_peak.items():
        parts[trace.labels[number]] += size
        parts[ROUNDING] += block.size - size
    low, high = allocator.peak_allocated - 1, allocator.peak_reserved
    enough, short = allocator.granted, 0.0
    while high - low > CAP_STEP:
        middle = (low + high) // 2
        # A cap that grants and refuses what an earlier one did has the same result.
        if short <= middle < enough:
            try:
                granted = loaded.allocator.granted <= middle
                run = loaded.under(middle) if granted else Run(trace, workspace, middle)
                run.steps()
                enough = run.allocator.granted
            except MemoryError as error:
                short = error.args[0]
        low, high = (middle, high) if middle < short else (low, middle)
    return {
        "peak_bytes": allocator.peak_allocated,
        "reserved_bytes": allocator.peak_reserved,
        "min_reserved_bytes": high,
        "breakdown": dict(parts),
    }
