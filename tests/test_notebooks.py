"""The notebooks as files and as programs: stored from a run, checked, run headless anywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from colqwen_lab import compare, fidelity, parameters, plan, quantize, sweep
from colqwen_lab.analysis.plan import Predictions
from colqwen_lab.errors import BadInput
from colqwen_lab.records import Backend, published_cells, read_cells

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FUNCTIONS = {
    "sweep": sweep,
    "compare": compare,
    "quantize": quantize,
    "plan": plan,
    "fidelity": fidelity,
    "index": fidelity,
}
MACHINE_PATH = re.compile(
    r"/(work|home|root|tmp|Users|usr|opt|venv)/|[A-Z]:\\\\|site-packages|0x[0-9a-f]{8}"
)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def compared(path: Path) -> int:
    """Outputs that nbval compares."""
    cells = [
        cell
        for cell in code_cells(path)
        if "nbval-ignore-output" not in cell.metadata.get("tags", [])
    ]
    outputs = [output for cell in cells for output in cell.outputs]
    return sum(
        output.output_type == "execute_result" or output.get("name") == "stdout"
        for output in outputs
    )


def test_at_least_fifteen_outputs_are_compared() -> None:
    assert len(NOTEBOOKS) >= 3
    assert sum(map(compared, NOTEBOOKS)) >= 15
    assert all(compared(path) >= 3 for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_as_it_ran(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert path.stat().st_size < 200_000
    assert book.metadata.kernelspec.name == "python3"
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert not MACHINE_PATH.search(path.read_text())
    assert "papermill" not in book.metadata


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tells_and_does_not_define(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    assert re.match(r"# .*\?\n", book.cells[0].source)
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    assert "## The answer" in text[: text.index("## ") + 20]
    assert re.search(r"## What this (run )?does not show", text)
    source = "\n".join(cell.source for cell in code_cells(path))
    # An assertion would hold of the committed rows, and say nothing of a reader's own.
    assert not re.search(r"^\s*(def|class|import torch|assert)\b|lambda", source, re.MULTILINE)
    assert source.count("\n") < 150
    for before, cell in zip(book.cells[1:], book.cells[2:], strict=False):
        drawn = before.cell_type == "code" and any(
            "image/png" in output.get("data", {}) for output in before.outputs
        )
        assert not drawn or cell.cell_type == "markdown", "a sentence under each figure"


#: What a notebook asks for beside the arguments of its function.
OWN = {
    "sweep": ("price",),
    "plan": ("measured",),
    "compare": ("configurations", "fidelity"),
    "fidelity": ("schemes",),
    "index": ("price", "searched"),
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_the_function_s(path: Path) -> None:
    cell = code_cells(path)[0]
    assert cell.metadata.tags == ["parameters"]
    lines = cell.source.splitlines()
    assert all(re.fullmatch(r"\w+: \w+ = .+  # .+", line) for line in lines), (
        "each with its type and its help"
    )
    values: dict[str, Any] = {}
    exec(cell.source, values)
    values.pop("__builtins__"), values.pop("__annotations__")
    own = OWN.get(path.stem, ())
    expected = {name: values[name] for name in values if name[0] != "_" and name not in own}
    assert parameters(values, FUNCTIONS[path.stem], *own) == expected


def test_unknown_parameter_is_an_error_once() -> None:
    names: dict[str, Any] = {
        "model": "awq",
        "modle": "base",
        "In": ["x"],
        "Out": {},
        "_": 3,
        "lab": sys,
    }
    with pytest.raises(
        BadInput, match="unknown parameter 'modle'; valid: model, batch_sizes, size"
    ):
        parameters(names, sweep)
    del names["modle"]
    assert parameters(names, sweep) == {"model": "awq"}
    names["later"] = [1]
    assert parameters(names, sweep) == {"model": "awq"}


@pytest.mark.parametrize("cards", [{"a": 8}, {8, 12}, None])
def test_a_parameter_of_any_type_reaches_its_function(cards: Any) -> None:
    assert parameters({"cards": cards, "measured": "x"}, plan, "measured") == {"cards": cards}
    with pytest.raises(BadInput, match=r"measured must be a text, got 7; papermill -r passes"):
        parameters({"cards": "8", "measured": 7}, plan, "measured")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"fresh": "maybe"}, "fresh must be True or False, such as False, got 'maybe'"),
        ({"min_steps": "x"}, "min_steps must be a whole number"),
        ({"max_s": "x"}, "max_s must be a number"),
        ({"weights": 3}, "weights must be a text"),
        ({"model": 5}, "model must be a text such as 'a,b' or a list of texts, got 5"),
        ({"batch_sizes": None}, "batch_sizes must be different whole numbers"),
    ],
)
def test_values_of_another_type(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        sweep(**given)
    with pytest.raises(BadInput, match="must be Results, a records file or published, got 5"):
        compare(5)  # type: ignore[arg-type]


def test_papermill_s_false_is_false(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine would have its cells measured again.
    monkeypatch.setattr("colqwen_lab.measure.sweep.interference", lambda before: ([], None))
    asked: dict[str, Any] = {
        "output": str(tmp_path / "rows.jsonl"),
        "weights": "random",
        "max_s": "0.1",
        "min_steps": "2",
    }
    first = sweep("base", "1", **asked)
    assert sweep("base", "1", fresh="false", **asked).cells == first.cells  # type: ignore[arg-type]
    assert sweep("base", "1", fresh="true", **asked).cells != first.cells  # type: ignore[arg-type]


def started(
    notebook: str, output: Path, *options: str, cwd: Path = ROOT, **variables: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "papermill", notebook, str(output), "-k", "python3", *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=os.environ | variables, **pipes)


def test_two_sweeps_at_once_from_a_cold_cache_from_their_own_folder(tmp_path: Path) -> None:
    records, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    options = [
        "-p",
        "model",
        "awq",
        "-p",
        "output",
        str(records),
        "-y",
        "{batch_sizes: [2, 4]}",
        "-p",
        "max_s",
        "0.3",
    ]
    outputs = [tmp_path / f"{number}.ipynb" for number in range(2)]
    where = {"cwd": ROOT / "notebooks", "COLQWEN_LAB_CACHE": str(cache)}
    both = [started("sweep.ipynb", output, *options, **where) for output in outputs]  # type: ignore[arg-type]
    for process in both:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr[-2000:]
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    # Two sweeps on one machine may disturb each other; a disturbed cell is measured again.
    cells = [(cell.variant, cell.workload.batch_size) for cell in read_cells(records)]
    assert sorted(cells) == [("awq", 2), ("awq", 4)]
    assert all(sum(row["backend"]["engaged"].values()) == 28 for row in rows)
    assert json.loads(records.with_suffix(".result.json").read_text())["complete"] is True
    (made,) = (
        folder for folder in cache.iterdir() if folder.is_dir() and folder.name.startswith("tiny-")
    )
    assert rows[0]["weights"] == f"made here from the tiny default ({made.name})"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["-p", "modle", "awq"],
            "BadInput: unknown parameter 'modle'; valid: model, batch_sizes, size",
        ),
    ],
)
def test_bad_parameter_is_one_line_in_the_error_cell(
    tmp_path: Path, options: list[str], says: str
) -> None:
    output = tmp_path / "out.ipynb"
    process = started("notebooks/sweep.ipynb", output, *options)
    process.communicate(timeout=240)
    assert process.returncode == 1
    errors = [o for cell in code_cells(output) for o in cell.outputs if o.output_type == "error"]
    (error,) = errors
    assert error.traceback == [f"{error.ename}: {error.evalue}"]
    assert says in error.traceback[0]
    assert "\n" not in error.evalue


def test_plan_reads_rows_that_no_prediction_fits() -> None:
    """The rows of README's first command, of a kernel whose buffers are not modelled."""
    (cell,) = (
        c.source
        for c in code_cells(ROOT / "notebooks" / "plan.ipynb")
        if "largest" in c.source and "compared" in c.source
    )
    setting, shown = cell.split("\n")
    kernels = Backend(requested="auto", engaged={"auto_round_kernel_zp": 28})
    rows = [cell.model_copy(update={"backend": kernels}) for cell in published_cells()[:2]]
    for predicted, says in (
        ([None, None], "no row could be predicted"),
        ([rows[0], None], "largest error 0.00 % over 1 rows"),
    ):
        names: dict[str, Any] = {"pd": pd, "compared": Predictions(rows, predicted).table()}
        exec(setting, names)
        assert eval(shown, names) == says


def test_nbval_bites(tmp_path: Path) -> None:
    """A changed number in the library makes it fail; without the change it passes."""
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "sanitize.cfg").write_text((ROOT / "tests" / "sanitize.cfg").read_text())
    book = tmp_path / "compare.ipynb"
    short = nbformat.read(ROOT / "notebooks" / "compare.ipynb", as_version=4)
    short.cells = [
        cell for cell in short.cells if "Results(ends)" not in cell.source
    ]  # the prediction takes its time
    nbformat.write(short, book)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", str(book)]
    alike = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert alike.returncode == 0, alike.stdout[-2000:]
    # The kernel starts in the notebook's folder, so this stands in for the library's own module.
    (tmp_path / "sitecustomize.py").write_text(
        "import colqwen_lab.hardware as c\nc.OUTSIDE_TORCH_BYTES = (200 * 10**6, 701 * 10**6)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    changed = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert changed.returncode == 1
    assert "crossover" in changed.stdout or "card_table" in changed.stdout
