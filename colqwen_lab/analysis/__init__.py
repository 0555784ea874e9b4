"""What records say: tables, comparisons and figures, without torch.

`plots`, `fidelity_plots` and `index_plots` load on first use, because they bring matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("plots", "fidelity_plots", "index_plots"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
