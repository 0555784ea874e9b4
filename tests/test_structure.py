"""The shape of the package: no import cycle, few imports inside functions, plain words."""

from __future__ import annotations

import ast
import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from typer.main import get_command

from colqwen_lab.cli import app

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "colqwen_lab").rglob("*.py"))
}
# Heavy or optional packages that one leaf needs, and the lab's kernels built on them.
INNER_IMPORTS = 10
# Words that the field does not use, or that once had a meaning of their own here.
OLD_WORDS = re.compile(
    r"(?<!\.)\b(ways?|in turn|led in|lead-in|patience|towers?|schedules?|few_rows|"
    r"dequantised ahead|"
    r"ledgers?|told apart|cannot tell|engaged|drawn|refused|left out|noticing|noticed|habits?|"
    r"unmet|predict_like|on_card)\b",
    re.IGNORECASE,
)


def imports_of(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("colqwen_lab"):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= whole & MODULES.keys() or {node.module or ""}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & MODULES.keys()


def test_imports_have_no_cycle() -> None:
    graph = {
        name: imports_of(ast.parse(path.read_text())) - {name, "colqwen_lab"}
        for name, path in MODULES.items()
    }
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_imports_inside_functions_are_few() -> None:
    places = set()
    for path in MODULES.values():
        if path.name in ("__init__.py", "__main__.py", "cli.py"):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = [
                    n for n in ast.walk(function) if isinstance(n, (ast.Import, ast.ImportFrom))
                ]
                places |= {f"{path.name}:{node.lineno}" for node in inner}
    assert len(places) <= INNER_IMPORTS, sorted(places)


def test_analysis_never_needs_torch() -> None:
    reached, todo = set(), [name for name in MODULES if name.startswith("colqwen_lab.analysis")]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            tree = ast.parse(MODULES[name].read_text())
            # Imports for annotations alone do not run.
            tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
            todo += imports_of(tree) - {"colqwen_lab"}
            whole = {
                alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
            }
            assert not whole & {"torch", "transformers"}, name


def texts() -> dict[str, str]:
    """Everything that a person reads, by its name; stored outputs of notebooks included."""
    found = {path.name: path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        outputs = [
            text
            for cell in cells
            for output in cell.get("outputs", [])
            for text in (output.get("text"), *output.get("data", {}).values())
            if isinstance(text, list)
        ]
        found[path.name] = "\n".join(
            "".join(part) for part in [*(c["source"] for c in cells), *outputs]
        )
    group = get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        options = [getattr(option, "help", "") or "" for option in command.params]
        found[f"{name} --help"] = "\n".join([command.help or "", command.epilog or "", *options])
    return found


# Paths of committed files that keep their names.
FILES = re.compile(r"[\w./-]+\.(jsonl|ipynb|json|png)")


@pytest.mark.parametrize("name", sorted(texts()))
def test_people_read_plain_words(name: str) -> None:
    text = FILES.sub("", texts()[name])
    words = [f"{text[max(0, m.start() - 30) : m.end() + 20]!r}" for m in OLD_WORDS.finditer(text)]
    assert not words


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_contributing_lists_the_files_with_gpu_tests() -> None:
    """Every test that needs a GPU carries the marker, so that `-m gpu` runs it."""
    marked, using = set[str](), set[str]()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        marked |= {str(path.relative_to(ROOT))} if "pytest.mark.gpu\n" in text else set()
        using |= (
            {str(path.relative_to(ROOT))} if re.search(r"\bcuda: torch\.device", text) else set()
        )
    marked.discard("tests/test_structure.py")
    listed = (ROOT / "CONTRIBUTING.md").read_text().split("**On a GPU**")[1].split("\n- ")[0]
    assert set(re.findall(r"`(tests/\S+\.py)`", listed)) == marked
    assert using <= marked
