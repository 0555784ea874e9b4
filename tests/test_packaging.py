"""What the files at the top say agrees: pins, extras, the licence, the README's commands."""

from __future__ import annotations

import json
import re
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_holds_no_pin_of_its_own(project: dict[str, Any]) -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    python, pip, through_pip = environment["dependencies"]
    assert python == f"python{project['requires-python']}"
    assert pip == "pip"
    (editable,) = through_pip["pip"]
    extras = re.fullmatch(r"-e \.\[(.+)\]", editable)[1].split(",")
    assert set(extras) <= project["optional-dependencies"].keys()


@pytest.mark.parametrize(
    "package",
    [
        "torch",
        "transformers",
        "auto-round",
        "auto-round-lib",
        "pandas",
        "matplotlib",
        "papermill",
        "nbval",
    ],
)
def test_what_checked_outputs_depend_on_has_an_upper_bound(
    package: str, project: dict[str, Any]
) -> None:
    everything = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    (pin,) = [line for line in everything if re.match(rf"{package}[<>=]", line)]
    assert "<" in pin


def test_readme_names_real_things(project: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text()
    for extra in re.findall(r'pip install -e "\.\[([\w,]+)\]"', readme):
        assert set(extra.split(",")) <= project["optional-dependencies"].keys()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / target).exists(), target
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks <= set(re.findall(r"\w+\.ipynb", readme))


def test_top_level_and_licence() -> None:
    for name in (
        "pyproject.toml",
        "notebooks",
        "colqwen_lab",
        "outputs",
        "tests",
        "environment.yml",
        "README.md",
    ):
        assert (ROOT / name).exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_reference_run_is_whole() -> None:
    from colqwen_lab import load

    (records,) = (ROOT / "outputs" / "reference").glob("*.jsonl")
    result = json.loads(records.with_suffix(".result.json").read_text())
    cells = load(records)
    assert result["complete"]
    assert result["ok"] == len(cells)
    assert all(cell.origin == "measured" and cell.step_s for cell in cells)
