"""The report: the JSON of its own `benchmark.py`, written and read, and its figures as data.

Its MB are MiB. A cell is a dict of the fields of `records.Cell`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from colqwen_lab.errors import BadInput
from colqwen_lab.settings import DATA

MIB = 2**20
# A document has a few kB; a parser takes seventy times a document's bytes.
MOST_BYTES = 4 * MIB
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


def document_in(path: Path) -> dict[str, Any] | None:
    """The script's document that a file holds; None for another file."""
    with suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= MOST_BYTES:
            document = json.loads(path.read_bytes())
            return document if isinstance(document, dict) and "results" in document else None
    return None


def cells(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of each cell in a document; it keeps the mean rate only, so there is no interval.

    Raises BadInput if it is not a document of the report's script.
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


def published_report() -> dict[str, Any]:
    """The report's figures and claims as data (`data/a100_4b.json`)."""
    return json.loads((DATA / "a100_4b.json").read_text(encoding="utf-8"))


def published() -> Iterator[dict[str, Any]]:
    """The fields of each cell of the report's sweep: no samples, so no intervals."""
    report = published_report()
    environment = {name: report["environment"][name] for name in ("gpu", "cuda", "attention")}
    for variant, rows in report["sweep"].items():
        for row in rows:
            yield AS_REPORTED | {
                "origin": "published",
                "source": report["source"],
                "variant": variant,
                "size": "4b",
                "weights": f"hub:{report['models'][variant]['checkpoint']}",
                "workload": {"kind": "queries", "batch_size": row["batch_size"], "texts": "report"},
                "backend": {"requested": "auto", "dtype": "float16"},
                "items_per_s": {"median": row["items_per_s"]},
                "memory": {"peak_bytes": row["peak_mib"] * MIB, "method": "published"},
                "environment": environment,
            }
