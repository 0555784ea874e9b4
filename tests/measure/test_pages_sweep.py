"""Sweeps of pages of the tiny network: what their rows say, what keeps them apart, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import colqwen_lab as lab
from colqwen_lab.analysis.results import PAGE_COLUMNS, Results
from colqwen_lab.errors import BadInput
from colqwen_lab.measure.cluster import matrix
from colqwen_lab.measure.sweep import request, sweep
from colqwen_lab.measure.timing import StoppingRule
from colqwen_lab.records import Cell, read_cells

QUICK = StoppingRule(min_steps=2, max_steps=2, min_s=0, max_s=0, max_warmup=1)


def run(
    path: Path,
    model: str = "base",
    batches: Any = "1",
    said: list[str] | None = None,
    **options: Any,
) -> list[Cell]:
    given = {
        "workload": "pages",
        "pages": "64x64",
        "visual_tokens": 64,
        "size": "tiny",
        "weights": "random",
    }
    asked = request(
        model, batches, output=path, **given | {"patience": QUICK, "isolated": False} | options
    )
    return sweep(asked, progress=(said if said is not None else []).append)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pages.jsonl"


@pytest.mark.parametrize("other", [{"visual_tokens": 96}, {"pages": "64x96"}])
def test_other_pages_and_budgets_are_other_cells(path: Path, other: dict[str, Any]) -> None:
    first, second = run(path), run(path, **other)
    assert read_cells(path) == [*first, *second]
    assert first[0].key() != second[0].key()
    assert run(path) == first
    assert run(path, **other) == second
    assert read_cells(path) == [*first, *second]
    with pytest.raises(
        BadInput,
        match=r"not comparable: .* is tiny pages of 64 visual tokens \(drawn, 64 x 64 pixels\)",
    ):
        lab.compare(Results(tuple(first)), Results(tuple(second)))


def test_a_table_of_pages(path: Path) -> None:
    (cell,) = run(path, batches="2")
    (row,) = lab.load(path).table()[[*PAGE_COLUMNS]].to_dict("records")
    work, towers = cell.workload, cell.stages
    seconds = (towers.vision_encoder_s, towers.language_model_s, work.preprocess_s)
    assert min(seconds) > 0
    wanted = [
        cell.items_per_s.median * work.tokens,
        *(1e3 * one for one in seconds),
        work.tokens * 320 * 2 / 1e3,
    ]
    assert [*row.values()] == pytest.approx(wanted, rel=0.01)
    assert (work.kind, work.visual_tokens, work.distinct, work.refused) == ("pages", 64, 4, 0)


def test_a_folder_goes_on_past_files_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    said: list[str] = []
    cells = run(path, "base,awq", "1,2", said, pages=str(folder), backend="torch")
    assert [cell.status for cell in cells] == ["ok"] * 4
    assert {(cell.workload.distinct, cell.workload.refused) for cell in cells} == {(3, 2)}
    assert len({cell.workload.pages for cell in cells}) == 1
    assert cells[0].workload.pages.startswith("5 files ")
    left_out = [line.split(" is left out: ")[0] for line in said if "left out" in line]
    assert left_out == ["broken.jpg", "gone.png"]
    assert str(folder) not in path.read_text()
    for file in folder.iterdir():
        file.unlink()
    (folder / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"none of 1 files gives a page; broken\.jpg is left out"):
        run(path, pages=str(folder))


def test_texts_are_of_queries_alone() -> None:
    with pytest.raises(
        BadInput, match="texts are of workload queries, not pages; valid: workload queries"
    ):
        request("base", "1", workload="pages", texts="natural")
    queries, pages = matrix(
        "base", "1", workload="queries,pages", texts="natural", visual_tokens=64
    )
    assert (queries.texts, pages.texts, pages.visual_tokens) == ("natural", "report", 64)
