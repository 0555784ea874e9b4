"""Names that no file can have, files of other kinds, and words that also name a file."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import colqwen_lab as lab
from colqwen_lab.analysis import plots
from colqwen_lab.analysis.plots import Plot
from colqwen_lab.errors import BadInput, LabError, MissingRequirement
from colqwen_lab.measure.sweep_file import opened
from colqwen_lab.model.config import resolve_variant
from colqwen_lab.options import FidelityOptions, SweepOptions
from colqwen_lab.records import published_cells, read_cells, write_cells
from colqwen_lab.runtime.batches import Pages
from colqwen_lab.settings import (
    cache_folder,
    in_use,
    locked,
    outputs_folder,
    writable_folder,
    write_file,
)
from tests.measure.sweeps import run

ODD = ["x" * 5000, f"/{'x' * 5000}/x", "\0", "\ud800"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    "ask",
    [
        lambda name, at: lab.sweep(name, 1, output=at),
        lambda name, at: lab.sweep("base", 1, weights=name, output=at),
        lambda name, at: lab.sweep("base", 1, workload="pages", pages=name, output=at),
        lambda name, at: lab.fidelity(name, output=at),
        lambda name, at: lab.fidelity("awq", name, output=at),
        lambda name, at: lab.fidelity("awq", weights=name, output=at),
        lambda name, at: lab.plan(name, 1),
        lambda name, at: lab.quantize(output=name),
        lambda name, at: lab.quantize(weights=name, output=at),
        lambda name, at: lab.quantize(texts=name, output=at),
        lambda name, at: lab.load(name),
        lambda name, at: lab.sweep("base", 1, output=name, weights="random"),
        lambda name, at: lab.sweep("base", 1, output=name, weights="random", size="tiny,mid"),
        lambda name, at: lab.fidelity("awq", output=name),
    ],
)
def test_it_is_one_line(
    ask: Callable[[str, str], Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LabError, match=r"^.{10,2000}$"):
        ask(name, str(tmp_path / "made"))
    assert not list(tmp_path.rglob("*"))


def test_a_folder_is_in_use_where_it_holds_something(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    assert not in_use(tmp_path / "new")
    (tmp_path / "file").touch()
    assert in_use(tmp_path)
    assert in_use(tmp_path / "file")
    for name in ODD:
        for ask in (in_use, writable_folder):
            with pytest.raises(LabError, match="cannot create the folder"):
                ask(Path(name))


# ---------------------------------------------------------------- writers


def finish(path: Path, held: int | None = None) -> None:
    """End a sweep of the published cells, of which the file holds some."""
    records = path.with_name(path.name.replace(".result.json", ".jsonl"))
    records.unlink(missing_ok=True)
    write_cells(records, published_cells()[:held])
    with opened(records, SweepOptions(), str, time.perf_counter()) as file:
        file.finish(published_cells(), {}, 1)


REPORT = cache(lab.compare)
WRITERS: dict[str, Callable[[Path], object]] = {
    "report.md": lambda path: REPORT().save(path),
    "rows.csv": lambda path: lab.load("published").to_csv(path),
    "plot.png": lambda path: plots.save(Plot(figsize=(1, 1)), path.stem, path.parent),
    "plot.svg": lambda path: plots.save(Plot(figsize=(1, 1)), path.stem, path.parent),
    "rows.result.json": finish,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_replaces_its_own_files_only(tmp_path: Path, name: str) -> None:
    write, path = WRITERS[name], tmp_path / name
    write(path)
    first = path.read_bytes()
    write(path)
    assert path.read_bytes() == first
    rows = published_cells()[0].to_line()
    for other in (rows, "# My notes\n", '{"my": "settings"}', "a,b\n1,2\n"):
        path.write_text(other)
        with pytest.raises(BadInput, match="holds content of another kind, which stays"):
            write(path)
        assert path.read_text() == other
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BadInput, match="must be a regular file or a new one, got a pipe"):
        write(path)
    path.unlink()
    path.symlink_to("/dev/null")
    with pytest.raises(BadInput, match="got a device"):
        write(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(BadInput, match="got a folder"):
        write(path)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "x.txt", tmp_path / "link"
    link.symlink_to(path)
    assert write_file(link, "old", "o") == link

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MissingRequirement, match=r"cannot write .*No space left.*free some space"):
        write_file(link, "other", "o")
    assert (link.is_symlink(), path.read_text()) == (True, "old")
    assert {each.name for each in tmp_path.iterdir()} == {"x.txt", "link"}


def test_the_mark_of_a_sweep_counts_what_the_file_holds(tmp_path: Path) -> None:
    count = len(published_cells())
    with pytest.raises(MissingRequirement, match=rf"{count - 4} of {count} cells are no"):
        finish(tmp_path / "rows.result.json", 4)
    assert not (tmp_path / "rows.result.json").exists()


def test_a_file_deleted_in_the_middle_of_a_sweep_is_whole_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def delete(line: str) -> None:
        if line.startswith("base eager/lean/auto batch 2: "):
            path.unlink()

    cells = run(path, progress=delete)
    assert read_cells(path) == cells
    assert json.loads((tmp_path / "rows.result.json").read_text())["cells"] == len(cells) == 3
    path.unlink()
    with pytest.raises(MissingRequirement, match="3 of 3 cells are no longer in"):
        run(path, progress=lambda line: delete(line.replace("batch 4", "batch 2")))


# ---------------------------------------------------------------- words and names of files


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLQWEN_LAB_OUTPUTS", "~/x")
    monkeypatch.setenv("COLQWEN_LAB_CACHE", "~/y")
    (tmp_path / "ckpt").mkdir()
    assert (outputs_folder(), cache_folder()) == (tmp_path / "x", tmp_path / "y")
    options = {"output": "~/z.jsonl", "weights": "~/ckpt", "pages": "~/p", "workload": "pages"}
    checked = SweepOptions.of(options)
    for name in ("output", "weights", "pages"):
        assert getattr(checked, name).startswith(f"{tmp_path}/")
    assert resolve_variant("~/ckpt").folder == tmp_path / "ckpt"


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("512x512", Pages),
        ("512 x 512", Pages),
        ("awq", resolve_variant),
        ("w8a16", resolve_variant),
        ("random", lambda name: SweepOptions.of({"weights": name})),
        ("generated", lambda name: FidelityOptions.of({"data": name})),
    ],
)
def test_a_word_that_also_names_a_folder_is_asked_back(
    name: str, use: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    use(name)
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=rf"^'{name}' is .* write \./{name} for it"):
        use(name)


def test_a_mistyped_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made" / "tiny-w4").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"has no folder made/tiny-w5; .* hub:made/tiny-w5 for the"):
        resolve_variant("made/tiny-w5")
    assert resolve_variant("made/tiny-w4").folder == Path("made/tiny-w4")
    for name in ("hub:made/tiny-w5", "owner/tiny-w5"):
        variant = resolve_variant(name)
        assert variant.hub["any"].name == variant.name == name.removeprefix("hub:")


@pytest.mark.parametrize("name", ["base", "AWQ", "W8A16"])
def test_a_folder_named_as_a_variant_is_another_model(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert resolve_variant(str(tmp_path / name)).name == f"./{name}"


def test_without_locks_it_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    says = r"^the file system of .*rows has no locks; run one"
    with pytest.warns(UserWarning, match=says), locked(tmp_path / "rows"):
        pass


def test_a_lock_is_waited_for_and_does_not_stay(tmp_path: Path) -> None:
    def stop() -> None:
        raise BadInput("in use; wait for it")

    with locked(tmp_path / "rows"):
        assert [path.name for path in tmp_path.iterdir()] == ["rows.lock"]
        with pytest.raises(BadInput, match="in use"), locked(tmp_path / "rows", stop):
            pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_opened_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.lock").mkdir()
    says = r"rows\.lock must be a regular file"
    with pytest.raises(BadInput, match=says), locked(tmp_path / "rows"):
        pass


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    for name in ("COLQWEN_LAB_CACHE", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert cache_folder() == Path(tempfile.gettempdir()) / f"colqwen-lab-{os.getuid()}"
