"""Names that no file can have, wherever a person may give one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import colqwen_lab as lab
from colqwen_lab.errors import LabError
from colqwen_lab.settings import in_use, writable_folder

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
