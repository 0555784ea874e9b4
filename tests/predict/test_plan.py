"""Plans, card searches, and predictions of recorded cells."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.hardware import find_card, need_bytes
from colqwen_lab.options import PlanOptions
from colqwen_lab.predict.plan import largest, largest_on, plan, predictions
from colqwen_lab.predict.predictor import Setup, predict
from colqwen_lab.records import Cell, Memory, Quantization, read_cells

AWQ = Setup("tiny", Quantization(bits=4, group_size=128, sym=True))


def options(**fields: Any) -> PlanOptions:
    return PlanOptions.of({"model": "awq", "batch_sizes": 2, "size": "tiny", "cards": ""} | fields)


def peak(cell: Cell | None) -> int:
    assert cell is not None
    assert cell.memory is not None
    return cell.memory.peak_bytes


# ---------------------------------------------------------------- cards


@given(st.integers(1, 500), st.integers(1, 4096), st.integers(0, 10**6), st.integers(0, 10**6))
def test_search_finds_the_edge(limit: int, slope: int, base: int, budget: int) -> None:
    calls: list[int] = []

    def headroom(size: int) -> int:
        calls.append(size)
        return budget - base - slope * size - (size * size) // 7

    if headroom(1) < 0:
        return
    edge = largest(headroom, limit)
    assert headroom(edge) >= 0
    assert edge == limit or headroom(edge + 1) < 0
    assert len({*calls}) <= 30


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    card = find_card(0.75)
    found = largest_on(card, Setup("tiny"), "base")
    assert found.verdict == "fits"
    assert found.batch_size is not None
    assert 1 < found.batch_size < 4096
    fitting, following = (predict(Setup("tiny"), found.batch_size + n).memory for n in (0, 1))
    assert fitting is not None
    assert following is not None
    assert need_bytes(fitting)[1] <= card.usable_bytes < need_bytes(following)[1]
    assert found.headroom_bytes == card.usable_bytes - need_bytes(fitting)[1] >= 0
    assert found.safe_batch_size == int(0.95 * found.batch_size)
    assert found.min_reserved_bytes == fitting.min_reserved_bytes
    assert fitting.peak_bytes < (found.min_reserved_bytes or 0) <= (fitting.reserved_bytes or 0)
    assert found.limited_by == "limited by memory"


def test_a_card_that_holds_nothing_and_one_that_holds_all() -> None:
    small = largest_on(find_card("RTX 3070"), Setup("4b"), "base")
    assert (small.verdict, small.batch_size, small.safe_batch_size) == ("does not fit", None, None)
    short = -(small.headroom_bytes // 2**20)
    assert small.limited_by == f"weights and one query do not fit: short by {short:,} MiB"
    page = largest_on(find_card(0.1), Setup("tiny", workload="pages"), "base")
    assert page.limited_by.startswith("weights and one page do not fit: short by")
    tight = largest_on(find_card(0.5), Setup("tiny"), "base")
    assert (tight.verdict, tight.batch_size, tight.safe_batch_size) == ("tight", 1, None)
    assert tight.limited_by.startswith("weights and one query may not fit: at worst short by")
    every = largest_on(find_card("H200"), AWQ, "awq")
    assert (every.verdict, every.batch_size) == ("fits", 4096)
    assert every.limited_by == "no limit up to batch 4096"


# ---------------------------------------------------------------- plan


def test_plan_predicts_every_model_and_says_so() -> None:
    lines: list[str] = []
    cells, cards = plan(
        options(model="base,awq", batch_sizes="2,4", cards="8,RTX 4070"), lines.append
    )
    assert [(c.variant, c.batch_size) for c in cells] == [
        *(("base", 2), ("base", 4)),
        *(("awq", 2), ("awq", 4)),
    ]
    assert {(c.origin, c.environment.gpu) for c in cells} == {
        ("predicted", "NVIDIA A100-SXM4-40GB")
    }
    assert [c.backend.requested for c in cells] == ["auto", "auto", "tritonv2", "tritonv2"]
    assert [(c.card, c.variant) for c in cards][2:] == [("8 GB", "awq"), ("RTX 4070", "awq")]
    assert {"min_reserved_bytes", "limited_by"} <= asdict(cards[0]).keys()
    assert lines == [
        "predicting base, size tiny: queries, eager",
        "predicting awq, size tiny: queries, eager",
    ]


def test_plan_prints_nothing_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    plan(options())
    assert capfd.readouterr() == ("", "")


def test_a_folder_is_predicted_as_its_configuration_says(
    base_folder: Path, packed: Callable[[str], Path], tmp_path: Path
) -> None:
    """Size and quantisation of a folder come from its config.json."""
    for folder, variant in ((base_folder, "base"), (packed("auto_round"), "awq")):
        (cell,), _ = plan(options(model=str(folder), size="auto"))
        (named,), _ = plan(options(model=variant))
        assert (cell.variant, cell.size) == (folder.name, "tiny")
        assert (cell.memory, cell.work, cell.quantization) == (
            named.memory,
            named.work,
            named.quantization,
        )
        with pytest.raises(BadInput, match=f"^{folder.name} is of size tiny, not 4b; use auto or"):
            plan(options(model=str(folder), size="4b"))
    for format in ("auto_gptq", "auto_awq"):
        (cell,), _ = plan(options(model=str(packed(format))))
        assert cell.quantization == AWQ.quantization


@pytest.mark.parametrize("format", ["base", "auto_round", "auto_awq"])
def test_a_folder_whose_tensors_contradict_its_configuration(
    format: str, base_folder: Path, packed: Callable[[str], Path], edited: Callable[..., Path]
) -> None:
    def narrower(tensors: dict[str, Any]) -> None:
        name = "vlm.model.language_model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name][:, :64].contiguous()

    def wider(config: dict[str, Any]) -> None:
        config["quantization_config"] |= {"group_size": 64} if format == "auto_awq" else {"bits": 8}

    if format == "base":
        folder = edited(base_folder, tensors=narrower)
    else:
        folder = edited(packed(format), config=wider)
    with pytest.raises(MissingRequirement, match=r"does not fit the network: .* must have shape"):
        plan(options(model=str(folder)))


def test_a_folder_that_is_not_modelled(
    packed: Callable[[str], Path], edited: Callable[..., Path], tmp_path: Path
) -> None:
    def unquantised(config: dict[str, Any]) -> None:
        del config["quantization_config"]["bits"]

    folder = edited(packed("auto_round"), config=unquantised)
    with pytest.raises(MissingRequirement, match=r"quantization_config.bits must be 2, 3, 4 or 8"):
        plan(options(model=str(folder)))
    shutil.rmtree(folder)

    def mixed(tensors: dict[str, Any]) -> None:
        name = "vlm.model.language_model.layers.0.mlp.up_proj"
        tensors[f"{name}.weight"] = tensors.pop(f"{name}.qweight")

    folder = edited(packed("auto_round"), tensors=mixed)
    with pytest.raises(BadInput, match="keeps some text linears at 16 bits"):
        plan(options(model=str(folder)))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"kernel": "x"},
            "unknown kernel of 4-bit weights in execution eager 'x'; valid: tritonv2",
        ),
        ({"model": "W9A16"}, "W9A16"),
        ({"model": "owner/name"}, "owner/name is on the hub"),
        ({"visual_tokens": 256}, "visual_tokens is an option of workload pages"),
        ({"tokens": 4097}, "tokens must be 1 to 4096"),
    ],
)
def test_bad_request(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        plan(options(**fields))


# ---------------------------------------------------------------- predictions of recorded cells


def measured(engaged: str = "tritonv2", **fields: Any) -> Cell:
    """A cell of awq as a GPU might have recorded it."""
    cell = predict(AWQ, 8)
    backend = cell.backend.model_copy(update={"engaged": {engaged: 28}})
    changes = {"origin": "measured", "variant": "awq", "backend": backend, "quantization": None}
    environment = cell.environment.model_copy(
        update={"gpu": "NVIDIA A100", "compute_capability": "8.0"}
    )
    return cell.model_copy(update=changes | {"environment": environment} | fields)


def test_predictions_go_by_the_length_and_kernel_of_the_record() -> None:
    workload = predict(AWQ, 8).workload
    natural = workload.model_copy(update={"texts": "natural", "tokens": 40})
    rows = [measured(), measured("marlin"), measured(workload=natural)]
    triton, marlin, longer = map(peak, predictions(rows))
    assert marlin < triton < longer
    assert triton == peak(predict(AWQ, 8))
    twin = predictions(rows)[0]
    assert twin is not None
    assert (twin.variant, twin.environment.gpu) == ("awq", "NVIDIA A100")
    assert twin.settings() == rows[0].settings()


def test_predictions_go_by_quantisation_and_not_by_name() -> None:
    """A folder, a hub id and an older row of a scheme are predicted like awq."""
    expected = peak(predict(AWQ, 8))
    known = AWQ.quantization
    rows = [
        measured(),
        measured(variant="W4A16"),
        measured(variant="my-folder", quantization=known),
        measured(variant="owner/name", quantization=known),
    ]
    assert [peak(twin) for twin in predictions(rows)] == [expected] * 4
    dense = measured("torch.nn.Linear", variant="my-16-bit-folder")
    assert peak(predictions([dense])[0]) == peak(predict(Setup("tiny"), 8))
    w8 = Quantization(bits=8, group_size=64, sym=True)
    eight = measured(variant="my-folder", quantization=w8)
    assert peak(predictions([eight])[0]) == peak(predict(replace(AWQ, quantization=w8), 8))


def test_what_is_not_modelled_has_no_prediction() -> None:
    rows = [
        measured("auto_round_kernel_zp"),
        measured(variant="my-folder"),
        measured(variant="owner/name"),
        measured(size="custom"),
        measured(memory=None),
        measured(execution="fast", protocol="published"),
        measured(quantization=Quantization(bits=5, group_size=128, sym=True)),
    ]
    assert predictions(rows) == [None] * len(rows)


def test_a_measured_cell_of_pages_beside_its_prediction() -> None:
    pages = Setup("tiny", kernel="torch", workload="pages", tokens=81, capability=None)
    cell = predict(pages, 2)
    workload = cell.workload.model_copy(update={"pages": "synthetic, 64 x 64 pixels"})
    seen = cell.model_copy(
        update={
            "origin": "measured",
            "backend": cell.backend.model_copy(update={"engaged": {"torch.nn.Linear": 28}}),
            "memory": Memory(peak_bytes=peak(cell), method="tracked"),
            "workload": workload,
        }
    )
    (twin,) = predictions([seen])
    assert twin is not None
    assert peak(twin) == peak(cell)
    assert twin.settings() == seen.settings()
    several = workload.model_copy(update={"padded_share": 0.2})
    assert predictions([seen.model_copy(update={"workload": several})]) == [None]


def test_published_rows_are_predicted() -> None:
    rows = [cell for cell in read_cells("published") if cell.variant == "base"][:1]
    assert peak(predictions(rows)[0]) == pytest.approx(peak(rows[0]), rel=0.006)
