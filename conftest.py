"""nbval for the notebooks, and folders of their own for everything that a test or a notebook writes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent
SCRATCH = Path(tempfile.mkdtemp(prefix="colqwen-lab-tests-"))
# Before anything reads them, and inherited by the notebooks' kernels.
os.environ["COLQWEN_LAB_OUTPUTS"] = str(SCRATCH / "outputs")
os.environ.setdefault("COLQWEN_LAB_CACHE", str(SCRATCH / "cache"))
os.environ["COLQWEN_LAB_SIZE"] = "tiny"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "nbval"):
        config.option.nbval_sanitize_with = str(ROOT / "tests" / "sanitize.cfg")
        config.option.nbval_cell_timeout = 120
        config.option.nbval_current_env = True


def pytest_collectstart(collector: Any) -> None:
    """Compare text: progress on stderr and HTML, which holds what text/plain holds, are left out."""
    if type(collector).__name__ == "IPyNbFile":
        collector.skip_compare = (*collector.skip_compare, "stderr", "text/html", "image/svg+xml")
