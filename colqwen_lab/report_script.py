"""The JSON document of the report's own `benchmark.py`, written and read. Its MB are MiB."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from colqwen_lab.errors import BadInput

MIB = 2**20
LABELS = {"base": "BASE", "awq": "AWQ"}
AS_REPORTED: Any = {"execution": "eager", "protocol": "published", "status": "ok"}


def document(cells: Iterable[tuple[str, Any]], metadata: dict[str, Any]) -> dict[str, Any]:
    """The report script's JSON document from named cells; cells without samples are skipped."""
    results = {}
    for name, cell in cells:
        memory, times = cell.memory, cell.step_s
        if memory is None or not times:
            continue
        results[name] = {
            "scenario": name,
            "total_items": cell.batch_size * len(times),
            "total_time_s": sum(times),
            "throughput_items_per_s": cell.batch_size * len(times) / sum(times),
            "latency_mean_ms_per_batch": 1000 * statistics.fmean(times),
            "latency_std_ms_per_batch": 1000 * statistics.pstdev(times),
            "cuda_memory_allocated_MB": (memory.resident_bytes or 0) / MIB,
            "cuda_max_memory_allocated_MB": memory.peak_bytes / MIB,
            "cuda_max_memory_reserved_MB": (memory.reserved_bytes or 0) / MIB,
        }
    return {"metadata": metadata, "results": results}


def cells(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of each cell in a document; it keeps the mean rate only, so there is no interval.

    Raises:
        BadInput: not a document of the report's script.
    """
    try:
        return list(_cells(document))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise BadInput(f"not a document of the report's script: {reason}") from None


def _cells(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    variants = {label: variant for variant, label in LABELS.items()}
    metadata = document.get("metadata", {})
    for name, row in document["results"].items():
        head, _, batch = name.rpartition("_bs")
        prefix = name.split("_", 1)[0]
        variant = variants.get(prefix, prefix.lower())
        kind = "image" if "image" in name else "text"
        weights = metadata.get("weights", "hub")
        yield AS_REPORTED | {
            "origin": "measured",
            "source": "the report's script",
            "variant": variant,
            "size": str(metadata.get("size", "4b")),
            "weights": weights[variant] if isinstance(weights, dict) else str(weights),
            "workload": {
                "kind": "pages" if kind == "image" else "queries",
                "batch_size": int(batch) if head else int(metadata[f"{kind}_batch_size"]),
                "texts": "report",
            },
            "backend": {"requested": "auto"},
            "items_per_s": {"median": float(row["throughput_items_per_s"])},
            "memory": {
                "peak_bytes": round(float(row["cuda_max_memory_allocated_MB"]) * MIB),
                "method": metadata.get("memory_method") or "cuda",
            },
            "environment": {
                "gpu": metadata.get("gpu"),
                "cuda": metadata.get("cuda_version"),
                "cpu": metadata.get("cpu"),
            },
        }
