"""nbval for the notebooks, and folders of their own for what a test or a notebook writes."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent
SCRATCH = Path(tempfile.mkdtemp(prefix="colqwen-lab-tests-"))
# Set before anything reads them; the notebooks' kernels inherit them.
os.environ["COLQWEN_LAB_OUTPUTS"] = str(SCRATCH / "outputs")
os.environ.setdefault("COLQWEN_LAB_CACHE", str(SCRATCH / "cache"))
os.environ["COLQWEN_LAB_SIZE"] = "tiny"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite, notebooks included, runs in two to four processes; a file stays together."""
    option = config.option
    # Tests see no GPU, so that they are the same everywhere; `-m gpu` shows it to them.
    if "gpu" not in option.markexpr.replace("not gpu", "").split():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    whole = getattr(option, "nbval", False) and config.args_source is config.ArgsSource.TESTPATHS
    single = getattr(option, "numprocesses", 0) is None and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and single and not option.usepdb:
        option.numprocesses, option.dist = max(2, min(4, os.cpu_count() or 1)), "loadfile"
        option.loadscopereorder = False
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In several processes, files with few tests come first: they are the long ones."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: tests[item.path])


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "nbval"):
        config.option.nbval_sanitize_with = str(ROOT / "tests" / "sanitize.cfg")
        config.option.nbval_cell_timeout = 120
        config.option.nbval_current_env = True


def pytest_collectstart(collector: Any) -> None:
    """Compare text; leave out progress on stderr and HTML, which repeats text/plain."""
    if type(collector).__name__ == "IPyNbFile":
        collector.skip_compare = (*collector.skip_compare, "stderr", "text/html", "image/svg+xml")
