"""How long a MaxSim search takes: all pages of a synthetic index are scored, the best are kept.

The time of a search depends on the shape of an index, not on its values: vectors are random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import normalize

from colqwen_lab.errors import BadInput, MissingRequirement, one_of
from colqwen_lab.measure.environment import environment, interference, pick_device, watch
from colqwen_lab.measure.timing import (
    Failure,
    Samples,
    StoppingRule,
    TimedStep,
    measured_limits,
    synchronise,
    time_interleaved,
)
from colqwen_lab.options import SearchOptions, listed
from colqwen_lab.records import GIB, RecordsFile
from colqwen_lab.retrieval.index import Format, Index, kernels_of
from colqwen_lab.retrieval.record import SearchTime
from colqwen_lab.settings import outputs_folder

TOP_PAGES = 10  # that a search returns
# Pages, and vectors a page, by device: an A4 page of the model, and a page of size tiny.
SHAPES = {"cuda": ((1000, 10_000, 50_000), 1260), "cpu": ((30, 100, 300), 88)}
# What a search needs beside the index: vectors while they are generated, products, scores.
ROOM_BYTES = {"cuda": 3 * GIB, "cpu": GIB}
ROWS = 2**18  # vectors that are generated at once


def search_times(options: SearchOptions, progress: Callable[[str], None]) -> list[SearchTime]:
    """The records of each format, number of pages, number of queries, and kernel.

    Each is appended to the records file as soon as it is complete; an index that does not fit the
    memory is skipped. Raises BadInput for options that do not fit, MissingRequirement if no index
    fits.
    """
    device = pick_device()
    formats = [Format.parse(name) for name in listed(options.formats)]
    if wide := [form.name for form in formats if form.dims > options.dims]:
        raise BadInput(f"dims of a format must be at most {options.dims}, got {wide[0]}")
    valid = kernels_of(device)
    names = valid[:1] if options.kernel == "auto" else listed(options.kernel)
    kernels = [one_of("kernel", name, valid) for name in names]
    usual, own_vectors = SHAPES[device.type]
    counts, vectors = options.pages or usual, options.vectors or own_vectors
    limits = measured_limits(device) if device.type == "cuda" else None
    path = Path(options.output or outputs_folder() / "search-times.jsonl")
    records: list[SearchTime] = []
    with RecordsFile(path, SearchTime, "search-times", progress) as file:
        for form in formats:
            index: Index | None = None
            one = synthetic(form, 1, vectors, options.dims, device).stored_bytes
            for pages in sorted(counts, reverse=True):
                what = f"{form.name}, {pages:,} pages"
                if index is None and pages * one > _room(device):
                    size = f"{pages * one / GIB:.1f} GiB"
                    progress(f"{what}: skipped, an index of {size} does not fit the memory")
                    continue
                if index is None:
                    index = synthetic(form, pages, vectors, options.dims, device)
                index = index.first(pages)
                for count in options.queries:
                    samples, lines = _timed(index, count, options, kernels)
                    shape: dict[str, Any] = {
                        **{"pages": pages, "vectors": vectors, "dims": options.dims},
                        **{"queries": count, "query_tokens": options.query_tokens},
                    }
                    for kernel, own in samples.items():
                        label = f"{what}, queries {count}, {kernel}"
                        if own.failure:
                            progress(f"{label}: {own.failure.reason}")
                            continue
                        record = SearchTime(
                            index_format=form.name,
                            **shape,
                            kernel=kernel,
                            page_bytes=index.page_bytes,
                            bytes_read=index.stored_bytes,
                            step_s=own.step_s,
                            limits=limits,
                            interference=lines,
                            environment=environment(device),
                        )
                        file.append([record])
                        records.append(record)
                        progress(f"{label}: {1000 / record.rate.median:.3g} ms")
    if not records:
        raise MissingRequirement("no index fits the memory; name fewer pages or vectors")
    return records


def _timed(
    index: Index, count: int, options: SearchOptions, kernels: Sequence[str]
) -> tuple[dict[str, Samples], list[str]]:
    """Samples of each kernel, and what may have disturbed them."""
    device = index.vectors.device
    queries = [
        unit(options.query_tokens, options.dims, device, seed) for seed in range(1, count + 1)
    ]
    steps = {kernel: _step(index, queries, kernel) for kernel in kernels}
    seen = watch(device, [])
    stopping = StoppingRule(max_warmup=8, min_s=0.1, max_s=options.max_s)
    samples = time_interleaved(steps, stopping)
    return samples, interference(seen)[0]


def unit(count: int, dims: int, device: torch.device, seed: int) -> Tensor:
    """Random unit vectors [count, dims]."""
    generator = torch.Generator(device).manual_seed(seed)
    return normalize(torch.randn(count, dims, generator=generator, device=device), dim=-1)


def synthetic(form: Format, pages: int, vectors: int, dims: int, device: torch.device) -> Index:
    """An index of pages of `vectors` random unit vectors, which pooling makes fewer."""
    length = -(-vectors // form.pool)
    stored: dict[str, Tensor] = {}
    for start in range(0, pages * length, ROWS):
        count = min(ROWS, pages * length - start)
        for name, values in form.encode(unit(count, dims, device, start)).items():
            if not start:
                stored[name] = values.new_empty(pages * length, values.shape[1])
            stored[name][start : start + count] = values
    ids = tuple(f"p{number}" for number in range(pages))
    lengths = torch.full((pages,), length)
    return Index(form, form.dims or dims, ids, lengths, stored["vectors"], stored.get("scales"), {})


def _step(index: Index, queries: Sequence[Tensor], kernel: str) -> TimedStep:
    """Seconds from query vectors on the device to the best pages."""
    device = index.vectors.device

    def step(_: int, preceded: bool) -> float | Failure:
        try:
            for _ in range(1 + preceded):
                synchronise(device)
                started_s = time.perf_counter()
                scores = index.scores(queries, kernel)
                scores.topk(min(TOP_PAGES, len(index.page_ids)))
                synchronise(device)
            return time.perf_counter() - started_s
        except torch.OutOfMemoryError:
            return Failure("oom", "out of memory")

    return step


def _room(device: torch.device) -> int:
    """The bytes that an index may take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] - ROOM_BYTES["cuda"]
    return psutil.virtual_memory().available - ROOM_BYTES["cpu"]
