"""CUDA graphs: capture, replay and timing. One stream captures everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One stream for the process: each new one gets a cuBLAS workspace that is never freed."""
    return torch.cuda.Stream(device)


def capture_stream() -> torch.cuda.Stream:
    """The stream that captures. It waits for the current stream, which does not wait for it."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def captured(work: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`(graph, result)` of `work`; a first run outside the graph compiles and initialises."""
    stream = capture_stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = work()
    return graph, result


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
