"""Sweeps of pages of the tiny network, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.measure import worker
from colqwen_lab.measure.timing import StoppingRule
from colqwen_lab.records import Cell, read_cells
from tests.measure import sweeps


def run(path: Path, model: str = "base", batches: Any = "1", **options: Any) -> list[Cell]:
    pages = {"workload": "pages", "pages": "64x64", "visual_tokens": 64}
    return sweeps.run(path, model, batches, **pages | options)


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


def test_a_cell_of_pages(path: Path) -> None:
    (cell,) = run(path, batches="2")
    work, stages = cell.workload, cell.stages
    assert min(stages.vision_encoder_s, stages.language_model_s, work.preprocess_s) > 0
    assert stages.vision_encoder_s + stages.language_model_s == pytest.approx(
        sorted(cell.step_s)[0], rel=5
    )
    assert work.index_bytes == pytest.approx(work.tokens * 320 * 2, rel=0.01)
    assert (work.kind, work.visual_tokens, work.distinct, work.skipped) == ("pages", 64, 4, 0)


def test_a_folder_goes_on_past_files_that_cannot_be_read(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    lines: list[str] = []
    cells = run(path, "base,awq", "1,2", pages=str(folder), kernel="torch", progress=lines.append)
    assert [cell.status for cell in cells] == ["ok"] * 4
    assert {(cell.workload.distinct, cell.workload.skipped) for cell in cells} == {(3, 2)}
    assert len({cell.workload.pages for cell in cells}) == 1
    assert cells[0].workload.pages.startswith("5 files ")
    skipped = [name for line in lines for name in ("broken.jpg", "gone.png") if name in line]
    assert skipped == ["broken.jpg", "gone.png"], "each is named once"
    assert str(folder) not in path.read_text()
    for file in folder.iterdir():
        file.unlink()
    (folder / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"none of 1 files .*broken\.jpg"):
        run(path, pages=str(folder))


def test_texts_are_of_queries_and_pages_of_pages(path: Path) -> None:
    with pytest.raises(BadInput, match="texts is an option of workload queries"):
        run(path, texts="natural")
    cells = run(path, workload="queries,pages", texts="natural")
    work = [cell.workload for cell in cells]
    assert [(one.kind, one.texts, one.visual_tokens) for one in work] == [
        ("queries", "natural", None),
        ("pages", None, 64),
    ]


def scans(folder: Path, *sizes: tuple[int, int]) -> str:
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number}.png")
    return str(folder)


def test_the_rate_of_unlike_pages_is_their_number_over_their_time(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three small pages and a large one; a step takes a second for each of its patches."""
    calls: list[tuple[str, bool, int]] = []

    def step(
        self: worker.Worker, protocol: str, control: bool, number: int, warm: bool = False
    ) -> float:
        if warm:  # the first step of a model is not
            calls.append((self.configuration.variant, control, number))
        return float(len(self.inputs[number]["pixel_values"]))

    monkeypatch.setattr(worker.Worker, "step", step)
    folder = scans(tmp_path / "scans", (64, 64), (64, 64), (64, 64), (512, 512))
    stopping = StoppingRule(min_steps=2, max_steps=100, min_s=0, max_s=0, max_warmup=0)
    options = {"pages": folder, "visual_tokens": 256, "kernel": "torch", "control": True}
    cells = run(path, "base,awq", stopping=stopping, **options)
    for cell in cells:
        assert cell.workload.shapes == [0, 0, 0, 1]
        assert cell.items_per_s.median == pytest.approx(4 / (3 * 256 + 1024))
    rounds = [calls[first : first + 3] for first in range(0, len(calls), 3)]
    assert [{number for _, _, number in each} for each in rounds] == [{0}, {1}, {2}, {3}] * 3
    timed = {(variant, control) for variant, control, _ in calls}
    assert timed == {("base", False), ("awq", False), ("base", True)}


def test_the_peak_is_that_of_the_costliest_batch_which_is_not_the_longest(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[tuple[int, int]] = []
    measure = worker.measure

    def noted(loaded: Any, batch: Any, *others: Any) -> Any:
        memory = measure(loaded, batch, *others)
        peaks.append((batch["input_ids"].shape[1], memory.peak_bytes))
        return memory

    monkeypatch.setattr(worker, "measure", noted)
    folder = scans(tmp_path / "scans", (512, 512), (64, 64), (448, 448), (448, 448))
    (cell,) = run(path, batches="2", pages=folder, visual_tokens=256)
    (longest, its_peak), (shorter, worst) = peaks
    assert longest > shorter
    assert cell.memory.peak_bytes == worst > its_peak


def test_from_disk_to_disk_may_fail_and_the_cell_keeps_all_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, really = list[str](), worker.Worker.call

    def call(self: worker.Worker, name: str, *arguments: Any) -> Any:
        asked.append(name)
        if name == "end_to_end":  # as where the temporary folder is full
            raise MissingRequirement("cannot write shard-00007.safetensors: no space left")
        return really(self, name, *arguments)

    monkeypatch.setattr(worker.Worker, "call", call)
    lines: list[str] = []
    (cell,) = run(path, batches="1", loaders="1", progress=lines.append)
    assert (cell.status, cell.end_to_end) == ("ok", [])
    assert cell.step_s
    assert cell.stages
    assert cell.loading
    assert any("disk to disk: " in line and "no space left" in line for line in lines)
    assert asked.index("end_to_end") > asked.index("loading"), "a crash would lose the others"
