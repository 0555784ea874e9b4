"""PyTorch's CUDA caching allocator, followed block by block, so that a peak can be told without a GPU.

Source: c10/cuda/CUDACachingAllocator.cpp. Sizes are rounded to 512 bytes. Requests up to 1 MiB come from segments of
2 MiB, those below 10 MiB from segments of 20 MiB, larger ones from a segment of their own, rounded to 2 MiB. The
smallest free block that is large enough serves a request; it is split if at least 512 bytes (small) or more than 1 MiB
(large) remain, and otherwise counts whole: that is why `max_memory_allocated` exceeds the sum of the tensors.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass, field

ROUND = 512
SMALL = 2**20
SMALL_SEGMENT = 2 * 2**20
LARGE_BELOW = 10 * 2**20
LARGE_SEGMENT = 20 * 2**20
SEGMENT_ROUND = 2 * 2**20


def rounded(size: int, to: int = ROUND) -> int:
    return max(to, -(-size // to) * to)


# The pool that a block belongs to, and whether it is of the small ones: free blocks of one place serve no other.
Place = tuple[int, bool]


@dataclass(eq=False)
class Block:
    """A piece of a segment at an address; `before` and `after` are its neighbours in the segment."""

    address: int
    size: int
    place: Place
    before: Block | None = None
    after: Block | None = None
    free: bool = False


@dataclass
class Allocator:
    """Bytes handed out and reserved, now and at the peak, as torch.cuda.memory_stats counts them.

    Under a `cap` a new segment that would exceed it makes the allocator give back every segment that is wholly free;
    if that is not enough, `allocate` raises MemoryError, as a GPU of that memory would.
    """

    cap: float = math.inf
    allocated: int = 0
    peak_allocated: int = 0
    reserved: int = 0
    peak_reserved: int = 0
    _free: defaultdict[Place, list[tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _at: dict[int, Block] = field(default_factory=dict)
    _end: int = 0

    def allocate(self, size: int, pool: int = 0) -> Block:
        """A block for `size` bytes. Streams and captured graphs have pools of their own."""
        size = rounded(size)
        small = size <= SMALL
        free = self._free[pool, small]
        found = bisect_left(free, (size, 0))
        block = (
            self._at[free.pop(found)[1]]
            if found < len(free)
            else self._segment(size, (pool, small))
        )
        block.free = False
        remaining = block.size - size
        if remaining >= ROUND if small else remaining > SMALL:
            rest = Block(
                block.address + size, remaining, block.place, block, block.after, free=True
            )
            if block.after:
                block.after.before = rest
            block.after, block.size = rest, size
            self._offer(rest)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._free[other.place].remove((other.size, other.address))
                del self._at[other.address]
                first, second = (other, block) if other is block.before else (block, other)
                first.size += second.size
                first.after = second.after
                if second.after:
                    second.after.before = first
                block = first
        self._offer(block)

    def _offer(self, block: Block) -> None:
        block.free = True
        self._at[block.address] = block
        insort(self._free[block.place], (block.size, block.address))

    def give_back(self) -> None:
        """Every segment that is wholly free."""
        for place, free in self._free.items():
            whole = [at for at in free if not (self._at[at[1]].before or self._at[at[1]].after)]
            self._free[place] = [at for at in free if at not in whole]
            for size, address in whole:
                del self._at[address]
                self.reserved -= size

    def restart_peaks(self) -> None:
        """Peaks count from what is there now, as after `torch.cuda.reset_peak_memory_stats`."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _segment(self, size: int, place: Place) -> Block:
        total = (
            SMALL_SEGMENT
            if place[1]
            else LARGE_SEGMENT
            if size < LARGE_BELOW
            else rounded(size, SEGMENT_ROUND)
        )
        if self.reserved + total > self.cap:
            self.give_back()
        if self.reserved + total > self.cap:
            raise MemoryError
        block = Block(self._end, total, place)
        self._end += total
        self._at[block.address] = block
        self.reserved += total
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block
