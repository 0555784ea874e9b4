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
from typing import Any

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


@dataclass(eq=False)
class Block:
    """A piece of a segment at an address; `before` and `after` are its neighbours there.

    `place` is the number of its pool and whether the block is small.
    """

    address: int
    size: int
    place: tuple[int, bool]
    before: Block | None = None
    after: Block | None = None
    free: bool = True


class Allocator:
    """Bytes handed out and reserved, now and at the peak, as torch.cuda.memory_stats counts them.

    A new segment that would exceed `cap` makes the allocator return every free segment to the GPU;
    if that is not enough, `allocate` raises MemoryError, as a GPU of that memory would.
    """

    def __init__(self, cap: float = math.inf) -> None:
        self.cap = cap
        self.allocated = self.peak_allocated = self.reserved = self.peak_reserved = self._end = 0
        # (size, address, block), sorted; free blocks of one place serve no other.
        self._free: defaultdict[tuple[int, bool], list[Any]] = defaultdict(list)

    def allocate(self, size: int, pool: int = 0) -> Block:
        """A block of at least `size` bytes. A captured graph has a pool of its own."""
        size = rounded(size, ROUND)
        small = size <= MIB
        free = self._free[pool, small]
        at = bisect_left(free, (size,))
        block: Block = free.pop(at)[2] if at < len(free) else self._segment(size, (pool, small))
        block.free = False
        rest = block.size - size
        if rest >= ROUND if small else rest > MIB:
            after = Block(block.address + size, rest, block.place, block, block.after)
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
                first.size, first.after = first.size + second.size, second.after
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

    def _segment(self, size: int, place: tuple[int, bool]) -> Block:
        large = 20 * MIB if size < 10 * MIB else rounded(size, 2 * MIB)
        total = 2 * MIB if place[1] else large
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

    def at(self, more: int, following: Trace) -> Trace | None:
        """The trace of `more` items more, on the line through this one and that of one item more.

        None if the two differ in the order of their births and ends.
        """
        a, b = (([(n, size > 0) for n, size in t.log], t.labels) for t in (self, following))
        pairs = zip(self.log, following.log, strict=False)
        log = [(number, size + more * (other - size)) for (number, size), (_, other) in pairs]
        flops = self.flops + more * (following.flops - self.flops)
        return replace(self, log=log, flops=flops) if a == b else None


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
            allocator.peak_allocated = allocator.allocated
            allocator.peak_reserved = allocator.reserved
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


def memory_on_gpu(trace: Trace, workspace: int) -> dict[str, Any]:
    """The fields of a `Memory` that depend on the allocator; the breakdown adds up to the peak."""
    allocator, _, peak_at = replay(trace, workspace)
    _, live, _ = replay(trace, workspace, stop_at=peak_at)
    parts: Counter[str] = Counter({WORKSPACE: workspace, ROUNDING: 0})
    for number, (block, size) in live.items():
        parts[trace.labels[number]] += size
        parts[ROUNDING] += block.size - size
    peak, reserved = allocator.peak_allocated, allocator.peak_reserved
    return {
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "min_reserved_bytes": _min_reserved(trace, workspace, peak - 1, reserved),
        "breakdown": dict(parts),
    }


def _min_reserved(trace: Trace, workspace: int, low: int, high: int) -> int:
    """The least bytes that torch must be allowed to reserve for the run, to `CAP_STEP`.

    Above the peak, because free memory is fragmented; below what an uncapped run reserves.
    """
    while high - low > CAP_STEP:
        middle = (low + high) // 2
        try:
            replay(trace, workspace, middle)
            high = middle
        except MemoryError:
            low = middle
    return high
