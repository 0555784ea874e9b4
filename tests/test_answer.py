"""The README's table and figure are what the committed records say."""

from __future__ import annotations

import runpy
from pathlib import Path

from PIL import Image

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "answer.py"


def test_the_readme_s_answer_is_current() -> None:
    script = runpy.run_path(str(SCRIPT))
    assert script["answer"]() in script["README"].read_text("utf-8")
    with Image.open(script["FIGURE"]) as figure:
        assert figure.info["records"] == script["digest"]()
