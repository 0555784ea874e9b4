"""CUDA graphs: capture, replay, and interleaved timing. One stream captures everything."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def side_stream(device: int, priority: int = -1) -> torch.cuda.Stream:
    """One stream for the process: each new one gets a cuBLAS workspace that is never freed."""
    return torch.cuda.Stream(device, priority=priority)


def capture_stream() -> torch.cuda.Stream:
    """The stream that captures. It waits for the current stream, which does not wait for it."""
    stream = side_stream(torch.cuda.current_device())
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


def replays_ms(works: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Milliseconds of each round of each work: captured once, then replayed interleaved."""
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: captured(work, pool)[0] for name, work in works.items()}
    times = [{name: _replay_ms(graph) for name, graph in graphs.items()} for _ in range(rounds)]
    return {name: [each[name] for each in times] for name in graphs}


def medians_ms(works: dict[Any, Callable[[], Any]], rounds: int = 5) -> dict[Any, float]:
    """The median of `replays_ms` of each work."""
    return {name: statistics.median(times) for name, times in replays_ms(works, rounds).items()}


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Graph:
    """A captured forward at one batch size and length, with its input and output tensors."""

    def __init__(
        self, embed: Callable[..., Tensor], batch: int, length: int, device: torch.device, pool: Any
    ) -> None:
        self.ids = torch.zeros((batch, length), dtype=torch.int64, device=device)
        self.mask = torch.ones_like(self.ids)
        self.graph, self.result = captured(lambda: embed(self.ids, self.mask), pool)

    def replay(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The embeddings of ids and mask [batch, tokens], tokens at most the length."""
        tokens = ids.shape[1]
        self.ids[:, :tokens].copy_(ids)
        self.mask[:, tokens:].zero_()
        self.mask[:, :tokens].copy_(mask)
        self.graph.replay()
        return self.result[:, :tokens].clone()
