"""nbval for the notebooks, and folders of their own for everything that a test or a notebook writes."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
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


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All of it, notebooks included, runs in two to four processes where there is xdist; a file stays together."""
    option = config.option
    whole = getattr(option, "nbval", False) and config.args_source is config.ArgsSource.TESTPATHS
    apart = getattr(option, "numprocesses", 0) is None and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and apart and not option.usepdb:
        option.numprocesses, option.dist = max(2, min(4, os.cpu_count() or 1)), "loadfile"
        option.loadscopereorder = False
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In several processes files of few tests come first: they are the long ones, and one at the end holds all up."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: tests[item.path])


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "nbval"):
        config.option.nbval_sanitize_with = str(ROOT / "tests" / "sanitize.cfg")
        config.option.nbval_cell_timeout = 120
        config.option.nbval_current_env = True


def pytest_collectstart(collector: Any) -> None:
    """Compare text: progress on stderr and HTML, which holds what text/plain holds, are left out."""
    if type(collector).__name__ == "IPyNbFile":
        collector.skip_compare = (*collector.skip_compare, "stderr", "text/html", "image/svg+xml")
