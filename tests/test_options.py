"""Options are declared once: the Python functions, the command line and the notebooks agree."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import colqwen_lab as lab
from colqwen_lab.errors import BadInput
from colqwen_lab.options import (
    CompareOptions,
    FidelityOptions,
    Options,
    PlanOptions,
    QuantizeOptions,
    SearchOptions,
    SweepOptions,
    batch_sizes_of,
)

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FUNCTIONS: dict[Callable[..., Any], type[Options]] = {
    lab.sweep: SweepOptions,
    lab.plan: PlanOptions,
    lab.compare: CompareOptions,
    lab.quantize: QuantizeOptions,
    lab.fidelity: FidelityOptions,
    lab.search_times: SearchOptions,
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_function_has_the_names_defaults_and_help_of_its_options(
    function: Callable[..., Any],
) -> None:
    options = FUNCTIONS[function]
    signature = inspect.signature(function)
    assert list(signature.parameters) == list(options.model_fields)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    assert options.of(defaults) == options()
    for name, field in options.model_fields.items():
        assert f"{name}: {field.description}" in (function.__doc__ or "")


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_parameters_cell_has_the_defaults_of_the_options(notebook: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    (source,) = [
        "".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])
    ]
    names: dict[str, Any] = {}
    exec(source, names)
    options = FUNCTIONS[getattr(lab, {"index": "fidelity"}.get(notebook.stem, notebook.stem))]
    values = {name: names[name] for name in options.model_fields if name in names}
    assert len(values) > 2
    assert options.of(values)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ({"control": "false"}, {"control": False}),
        ({"control": "True"}, {"control": True}),
        ({"batch_sizes": "8,16"}, {"batch_sizes": (8, 16)}),
        ({"batch_sizes": "[1, 2]"}, {"batch_sizes": (1, 2)}),
        ({"batch_sizes": 8}, {"batch_sizes": (8,)}),
        ({"model": ["base", "awq"]}, {"model": "base,awq"}),
        ({"max_s": "0.5"}, {"max_s": 0.5}),
        ({"min_steps": "12"}, {"min_steps": 12}),
        ({"card": 8}, {"card": "8"}),
        ({"batch_sizes": [" 8", 16]}, {"batch_sizes": (8, 16)}),
    ],
)
def test_what_papermill_passes_is_understood(text: dict[str, Any], value: dict[str, Any]) -> None:
    options = SweepOptions.of(text)
    assert {name: getattr(options, name) for name in value} == value


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"batch_size": 4},
            "unknown option 'batch_size' (did you mean batch_sizes?); valid: model",
        ),
        ({"batch_sizes": "a"}, "batch_sizes must be different whole numbers of 1 or more"),
        ({"batch_sizes": "8,8"}, "batch_sizes must be different whole numbers of 1 or more"),
        ({"batch_sizes": [0]}, "batch_sizes must be different whole numbers of 1 or more"),
        ({"batch_sizes": {"a": 8}}, "batch_sizes must be different whole numbers"),
        ({"control": "maybe"}, "control must be True or False, such as False, got 'maybe'"),
        ({"size": "5b"}, "unknown size '5b'"),
        ({"size": "tiny,5b"}, "unknown size '5b'"),
        ({"execution": "fst"}, "unknown execution 'fst' (did you mean fast?); valid: eager, fast"),
        ({"min_steps": "x"}, "min_steps must be a whole number, such as 0, got 'x'"),
        ({"max_s": -1}, "max_s must be above 0"),
        ({"model": "base,base"}, "model must be one or more different models, got 'base,base'"),
        ({"model": {"base": 1}}, "model must be a text such as 'a,b' or a list of texts"),
        ({"pages": "512x512"}, "pages, loaders and visual_tokens are options of workload pages"),
        (
            {"pages": 7, "workload": "pages"},
            "pages must be a text, such as '', got 7; papermill -r passes a text as it is",
        ),
        ({"model": 7}, "model must be a text such as 'a,b' or a list of texts, got 7; papermill"),
        ({"model": ["base", 7]}, "got ['base', 7]"),
        ({"batch_sizes": "8_16"}, "batch_sizes must be different whole numbers"),
        ({"batch_sizes": [True]}, "batch_sizes must be different whole numbers"),
        ({"batch_sizes": [8.0]}, "batch_sizes must be different whole numbers"),
        ({"workload": "pages", "texts": "natural"}, "texts is an option of workload queries"),
        (
            {"weights": "nowhere"},
            "weights must be auto, hub, random or a checkpoint folder, got 'nowhere'",
        ),
        ({"execution": "fast", "protocol": "published"}, "execution fast keeps no KV cache"),
        ({"kernel": "fp8"}, "kernel fp8 runs in execution fast only"),
        ({"configuration": "a/b/c/d"}, "configuration must be report, best or EXECUTION"),
        ({"configuration": "best", "protocol": "published"}, "give configuration, or execution"),
        ({"accelerator": "A100"}, "accelerator and address are options of a Ray cluster"),
        ({"card": "RTX 9999"}, "RTX 9999"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_valid_ones(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        lab.sweep(**wrong)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cards", [8, 8.0, "8", ["8"], {8}, (8,)])
def test_cards_are_texts_or_numbers(cards: Any) -> None:
    assert [card.name for card in PlanOptions.of({"cards": cards}).memory_budgets] == ["8 GB"]


@pytest.mark.parametrize("cards", [{"a": 8}, [[8, 12]], None, True, [{"a": 8}], object()])
@pytest.mark.parametrize("options", [PlanOptions, CompareOptions])
def test_a_mapping_where_a_list_is_wanted_is_refused(options: type[Options], cards: Any) -> None:
    with pytest.raises(BadInput, match="cards must be a text such as 'a,b' or a list of texts"):
        options.of({"cards": cards})


def test_options_beyond_the_second_go_by_name() -> None:
    with pytest.raises(BadInput, match="sweep takes its options by name: model, batch_sizes"):
        lab.sweep("base", 1, "tiny")
    with pytest.raises(BadInput, match="takes its options by name"):
        lab.sweep("base", model="awq")


def test_a_matrix_is_every_size_workload_and_execution() -> None:
    options = SweepOptions.of({"size": "tiny,mid", "workload": "queries,pages", "pages": "64x64"})
    parts = [(part.size, part.workload, part.pages) for part in options.matrix()]
    assert parts == [
        ("tiny", "queries", ""),
        ("tiny", "pages", "64x64"),
        ("mid", "queries", ""),
        ("mid", "pages", "64x64"),
    ]


def test_configurations_are_every_model_in_every_configuration() -> None:
    options = SweepOptions.of({"model": "base,awq", "configuration": "report,best,fast/lean/fp8"})
    assert [str(one) for one in options.configurations("cuda")] == [
        "base eager/published/tritonv2",
        "awq eager/published/tritonv2",
        "base fast/lean/auto",
        "awq fast/lean/auto",
        "base fast/lean/fp8",
        "awq fast/lean/fp8",
    ]
    assert options.configurations("cpu")[0].kernel == "torch"


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8, unique=True))
def test_batch_sizes_read_the_same_in_every_form(sizes: list[int]) -> None:
    text = ",".join(map(str, sizes))
    for form in (sizes, tuple(sizes), text, f"[{text}]", text.replace(",", ", ")):
        assert batch_sizes_of(form) == tuple(sizes)
