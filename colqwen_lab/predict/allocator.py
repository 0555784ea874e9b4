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
from dataclasses import dataclass, field, replace

MIB = 2**20
ROUND = 512
SMALL = MIB
SMALL_SEGMENT = SEGMENT_ROUND = 2 * MIB
LARGE_BELOW = 10 * MIB
LARGE_SEGMENT = 20 * MIB
# The resolution of the search for the least memory of a run.
CAP_STEP = 4 * MIB
GRAPH_POOL = -1
ROUNDING, WORKSPACE = "allocator rounding", "cuBLAS workspace"

# A pool's number, and whether its blocks are small: free blocks of one place serve no other.
Place = tuple[int, bool]


def rounded(size: int, to: int = ROUND) -> int:
    """`size` rounded up to a multiple of `to`, at least one."""
    return max(to, -(-size // to) * to)


def workspace_bytes(capability: int) -> int:
    """PyTorch's default cuBLAS workspace: 32 MiB from compute capability 9 on, else 8.125 MiB.

    Source: CublasHandlePool.cpp and pytorch#175344.
    """
    return 32 * MIB if capability >= 9 else 8 * MIB + MIB // 8


@dataclass(eq=False)
class Block:
    """A piece of a segment at an address; `before` and `after` are its neighbours there."""

    address: int
    size: int
    place: Place
    before: Block | None = None
    after: Block | None = None
    free: bool = True


@dataclass
class Allocator:
    """Bytes handed out and reserved, now and at the peak, as torch.cuda.memory_stats counts them.

    A new segment that would exceed `cap` makes the allocator return every free segment to the GPU;
    if that is not enough, `allocate` raises MemoryError, as a GPU of that memory would.
    """

    cap: float = math.inf
    allocated: int = 0
    peak_allocated: int = 0
    reserved: int = 0
    peak_reserved: int = 0
    # Sorted by size, then address.
    _free: defaultdict[Place, list[tuple[int, int, Block]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _end: int = 0

    def allocate(self, size: int, pool: int = 0) -> Block:
        """A block of at least `size` bytes. A captured graph has a pool of its own."""
        size = rounded(size)
        place = pool, size <= SMALL
        free = self._free[place]
        at = bisect_left(free, (size,))
        block = free.pop(at)[2] if at < len(free) else self._segment(size, place)
        block.free = False
        rest = block.size - size
        if rest >= ROUND if place[1] else rest > SMALL:
            after = Block(block.address + size, rest, place, block, block.after)
            if block.after:
                block.after.before = after
            block.after, block.size = after, size
            insort(free, (rest, after.address, after))
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Free `block`, merged with its free neighbours."""
        self.allocated -= block.size
        free = self._free[block.place]
        for other in (block.before, block.after):
            if other and other.free:
                del free[bisect_left(free, (other.size, other.address))]
                first, second = (other, block) if other is block.before else (block, other)
                first.size += second.size
                first.after = second.after
                if second.after:
                    second.after.before = first
                block = first
        block.free = True
        insort(free, (block.size, block.address, block))

    def return_segments(self) -> None:
        """Give every wholly free segment back to the GPU."""
        for free in self._free.values():
            kept = [entry for entry in free if entry[2].before or entry[2].after]
            self.reserved -= sum(entry[0] for entry in free) - sum(entry[0] for entry in kept)
            free[:] = kept

    def reset_peaks(self) -> None:
        """Count peaks from now on, as after `torch.cuda.reset_peak_memory_stats`."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _segment(self, size: int, place: Place) -> Block:
        large = LARGE_SEGMENT if size < LARGE_BELOW else rounded(size, SEGMENT_ROUND)
        total = SMALL_SEGMENT if place[1] else large
        if self.reserved + total > self.cap:
            self.return_segments()
        if self.reserved + total > self.cap:
            raise MemoryError
        block = Block(self._end, total, place)
        self._end += total
        self.reserved += total
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block


@dataclass(frozen=True)
class Trace:
    """Births (number, bytes) and ends (number, 0) of two steps, the label of each number, the work.

    The first `loaded` events are the births of the weights. Up to `before`, execution fast makes its
    own weights of them, and the inputs come. Births `captured[0]` to `captured[1]` are a graph's.
    """

    batch_size: int
    log: list[tuple[int, int]]
    labels: list[str]
    loaded: int
    before: int
    flops: int
    captured: tuple[int, int] = (0, 0)

    def same_shape(self, other: Trace) -> bool:
        """Whether both have the same births and ends in the same order, of whatever size."""
        shapes = [[(number, size > 0) for number, size in trace.log] for trace in (self, other)]
        return shapes[0] == shapes[1] and self.labels == other.labels

    def at(self, batch_size: int, following: Trace) -> Trace:
        """The trace of any batch, on the line through this one and that of one item more."""
        more = batch_size - self.batch_size
        pairs = zip(self.log, following.log, strict=True)
        log = [(number, size + more * (other - size)) for (number, size), (_, other) in pairs]
        flops = self.flops + more * (following.flops - self.flops)
        return replace(self, batch_size=batch_size, log=log, flops=flops)

    def settled(self) -> list[tuple[int, int]]:
        """The log without tensors that loading made and freed again."""
        loading, run = self.log[: self.before], self.log[self.before :]
        ended = {number for number, size in loading if not size}
        return [event for event in loading if event[0] not in ended] + run


def replay(
    trace: Trace, workspace: int, cap: float = math.inf, stop_at: int | None = None
) -> tuple[Allocator, dict[int, tuple[Block, int]], int]:
    """`(allocator, live blocks with their bytes by number, index of the event at the peak)`.

    Loading warms the allocator with one block of all weights, as transformers and this lab do. Free
    segments go back to the GPU before the first step, and peaks count from there.

    Raises:
        MemoryError: more than `cap` bytes would be reserved.
    """
    allocator = Allocator(cap)
    allocator.release(allocator.allocate(sum(size for _, size in trace.log[: trace.loaded])))
    live: dict[int, tuple[Block, int]] = {}
    peak_at = 0
    for index, (number, size) in enumerate(trace.log):
        if index == trace.before:
            allocator.allocate(workspace)
            allocator.return_segments()
            allocator.reset_peaks()
        if size:
            peak = allocator.peak_allocated if index > trace.before else 0
            pool = GRAPH_POOL if trace.captured[0] <= number < trace.captured[1] else 0
            live[number] = allocator.allocate(size, pool), size
            peak_at = index if allocator.peak_allocated > peak else peak_at
        elif number in live:
            allocator.release(live.pop(number)[0])
        if index == stop_at:
            break
    return allocator, live, peak_at


def peak_breakdown(trace: Trace, workspace: int) -> tuple[Allocator, dict[str, int]]:
    """`(allocator after the run, bytes by label at its peak)`; the parts add up to the peak."""
    allocator, _, peak_at = replay(trace, workspace)
    _, live, _ = replay(trace, workspace, stop_at=peak_at)
    parts: Counter[str] = Counter({WORKSPACE: workspace, ROUNDING: 0})
    for number, (block, size) in live.items():
        parts[trace.labels[number]] += size
        parts[ROUNDING] += block.size - size
    return allocator, dict(parts)


def min_reserved(trace: Trace, workspace: int, uncapped: Allocator) -> int:
    """The least bytes that torch must be allowed to reserve for the run, to `CAP_STEP`.

    Above the peak, because free memory is fragmented; below what an uncapped run reserves.
    """
    low, high = uncapped.peak_allocated - 1, uncapped.peak_reserved
    while high - low > CAP_STEP:
        middle = (low + high) // 2
        try:
            replay(trace, workspace, middle)
            high = middle
        except MemoryError:
            low = middle
    return high
