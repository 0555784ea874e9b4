"""Records of fidelity travel through a file whole, or are refused with the line named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from colqwen_lab.errors import BadInput
from colqwen_lab.retrieval.record import Fidelity, read, write


def test_there_and_back(record: Callable[..., Fidelity], tmp_path: Path) -> None:
    records = [record("base", [1.0, 0.5]), record("W4A16", [1.0, 0.25], iters=0)]
    assert read(write(tmp_path / "new" / "rows.jsonl", records)) == records
    assert [one.label for one in records] == ["base", "W4A16 plain"]
    rate = records[0].pages_per_s
    assert rate is not None
    assert rate.median == pytest.approx(80)
    assert record("base", [1.0], page_step_s=[]).pages_per_s is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no record"),
        ("{}\n", "line 1 is no fidelity record: variant"),
        ("torn", "line 1 is no fidelity record"),
        (None, "cannot be read as fidelity records"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=says):
        read(path)


def test_a_figure_that_is_none_is_refused(record: Callable[..., Fidelity]) -> None:
    with pytest.raises(ValueError, match="finite"):
        record("base", [float("nan")])
