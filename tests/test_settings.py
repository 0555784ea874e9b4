"""Names that no file can have, wherever a person may give one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import colqwen_lab as lab
from colqwen_lab.errors import BadInput, LabError
from colqwen_lab.settings import cache_folder, in_use, locked, writable_folder

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
    with pytest.raises(OSError, match=r"rows\.lock"), locked(tmp_path / "rows"):
        pass


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    for name in ("COLQWEN_LAB_CACHE", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert cache_folder() == Path(tempfile.gettempdir()) / f"colqwen-lab-{os.getuid()}"
