from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from colqwen_lab.analysis import plots
from colqwen_lab.analysis.plan import Plan, Predictions, breakdown_table
from colqwen_lab.analysis.table import Results
from colqwen_lab.errors import BadInput
from colqwen_lab.hardware import GPUS, OUTSIDE_TORCH_BYTES
from colqwen_lab.predict.plan import predictions
from colqwen_lab.records import GIB, MIB, Cell, Environment, Memory, Work, published_cells

FIRST = published_cells()[0]
PARTS = {"text linears": 900 * MIB, "vision encoder": 60 * MIB, "KV cache": 40 * MIB}


@dataclass(frozen=True)
class CardPlan:
    """The fields of `predict.plan.CardPlan`."""

    card: str
    nominal_bytes: int = 8 * GIB
    usable_bytes: int = 7 * GIB
    variant: str = "base"
    verdict: str = "does not fit"
    batch_size: int | None = None
    safe_batch_size: int | None = None
    peak_bytes: int = 8 * GIB
    min_reserved_bytes: int | None = None
    headroom_bytes: int = -1238 * MIB
    limited_by: str = "limited by memory"


def predicted(variant: str = "base", batch: int = 8, **changes: Any) -> Cell:
    memory = Memory(
        weights_bytes=900 * MIB,
        peak_bytes=1000 * MIB,
        reserved_bytes=1100 * MIB,
        breakdown=PARTS,
        method="predicted",
    )
    update = {
        "origin": "predicted",
        "variant": variant,
        "workload": FIRST.workload.model_copy(update={"batch_size": batch, "tokens": 16}),
        "items_per_s": None,
        "memory": memory,
        "work": Work(flops=10**12, min_bytes=7 * 10**9),
    }
    return FIRST.model_copy(update=update | changes)


def plan(*cards: str) -> Plan:
    cells = tuple(predicted(variant, batch) for variant in ("base", "awq") for batch in (2, 64))
    return Plan(Results(cells), tuple(CardPlan(card) for card in cards))  # type: ignore[misc]


def test_to_dict_is_the_contract() -> None:
    document = plan("8 GB", "RTX 4070").to_dict()
    assert [one["variant"] for one in document["plans"]] == ["base", "awq"]
    base = document["plans"][0]
    assert (base["size"], base["protocol"]) == ("4b", "published")
    keys = {"batch_size", "tokens", "weights_bytes", "peak_bytes", "flops", "breakdown"}
    assert keys <= base["cells"][0].keys()
    assert [card["card"] for card in base["cards"]] == ["8 GB", "RTX 4070"]
    assert json.loads(json.dumps(document)) == document
    single = Plan(Results((predicted(),)), ()).to_dict()
    assert {"variant", "size", "protocol", "cells", "cards"} <= single.keys()
    assert single["cells"][0]["flops"] == 10**12


def test_tables_on_the_screen() -> None:
    made = plan("8 GB")
    assert made.table().iloc[0].to_dict() == {
        "variant": "base",
        "batch": 2,
        "tokens": 16,
        "weights MiB": 900,
        "peak MiB": 1000,
        "reserved MiB": 1100,
        "GFLOP a step": 1000,
    }
    card = made.card_table().iloc[0]
    assert (card["headroom MiB"], card["largest batch"]) == (-1238, "-")
    assert card["limited by"] == "memory"
    for text in (repr(made), made._repr_html_()):
        assert "-1,238" in text
        assert "nan" not in text.lower()
    assert plan().card_table().empty


def test_rates_are_of_the_plan_s_own_gpus_or_of_names() -> None:
    made = plan("8 GB", "RTX 4070", "H200")
    assert list(made.rates().columns) == [
        "variant",
        "batch",
        "RTX 4070, queries/s at most",
        "H200, queries/s at most",
    ]
    assert list(made.rates("rtx 4090").columns) == [
        "variant",
        "batch",
        "RTX 4090, queries/s at most",
    ]
    assert plan("8 GB").rates().empty
    assert "RTX 4070" in repr(made)
    with pytest.raises(BadInput, match="card must be memory in GB"):
        made.rates("RTX 9999")


def test_a_rate_is_limited_by_bandwidth_and_then_by_compute() -> None:
    a100 = GPUS["A100 40GB"]
    flops, least = round(a100.flops() * 1e-3), round(a100.bandwidth_gb_s * 1e9 * 1e-2)
    by_bandwidth = predicted(batch=1, work=Work(flops=flops, min_bytes=least))
    by_compute = predicted(batch=1, work=Work(flops=100 * flops, min_bytes=least))
    rates = Plan(Results((by_bandwidth, by_compute)), ()).rates("A100 40GB")
    assert list(rates["A100 40GB, queries/s at most"]) == pytest.approx([100, 10])


def test_breakdown_adds_up_to_the_peak() -> None:
    cells = [predicted(), predicted("awq")]
    table = breakdown_table(cells)
    assert list(table.index) == [
        *("text linears", "vision encoder", "KV cache", "peak"),
        *("outside torch, assumed", "on the card"),
    ]
    assert (table.iloc[:3].sum() == table.loc["peak"]).all()
    assert (table.iloc[-3:-1].sum() - table.loc["on the card"]).abs().max() < 0.1
    assert breakdown_table([*cells, *cells]).shape == (6, 4)
    assert len(plots.breakdown([*cells, *cells]).axes[0].get_xticks()) == 4
    older = predicted(memory=Memory(peak_bytes=1, method="cuda", breakdown={"vision tower": 1}))
    assert list(breakdown_table([older]).index[:2]) == ["vision tower", "peak"]
    bars = plots.breakdown(cells).axes[0].patches
    tops = {round(bar.get_y() + bar.get_height(), 2) for bar in bars}  # type: ignore[attr-defined]
    assert {1000, round(1000 + OUTSIDE_TORCH_BYTES[1] / MIB, 2)} <= tops


def test_a_peak_without_explanation_is_a_part_of_its_own() -> None:
    seen: dict[str, Any] = {"peak_bytes": 1003 * MIB, "breakdown": None, "method": "cuda"}
    memory = Memory(**seen, reserved_bytes=GIB, device_bytes=GIB + 500 * MIB)
    measured = predicted(origin="measured", memory=memory, work=None)
    results = Predictions([measured], [predicted()]).results
    assert results[0].memory is not None
    assert results[0].memory.breakdown == PARTS | {"unexplained": 3 * MIB}
    assert results[0].work == predicted().work
    column = breakdown_table(results)["base 8 (eager, published)"]
    assert column["unexplained"] == 3
    assert column["outside torch, measured"] == 500
    assert column["on the card"] == pytest.approx(column["peak"] + 500, abs=0.02)
    on_cpu = measured.model_copy(update={"environment": Environment(cpu="Xeon")})
    assert list(breakdown_table([on_cpu]).index)[-1] == "peak"


def test_published_beside_predicted() -> None:
    cells = published_cells()[:1]
    made = Predictions(cells, predictions(cells))
    table = made.table()
    assert table["error %"].abs().max() < 0.6
    assert len(table) == 1
    # 191 items/s; an A100 reads the weights once in 1/214 s, so 8 x 214 items/s at most.
    assert table["limit items/s"].item() == pytest.approx(8 * 214, rel=0.01)
    assert table["share of limit %"].item() == pytest.approx(100 * 191 / (8 * 214), rel=0.02)
    assert table["limit from"].item() == "data sheet"


def test_an_unmodelled_kernel_is_noted() -> None:
    made = Predictions(published_cells()[:2], [None, predicted(batch=16)])
    assert made.table()["note"][0] == "this kernel's buffers are not modelled"
    assert list(made.table()["predicted MiB"]) == ["-", 1000]
    assert made.results[0].work is None
    assert "<table" in made._repr_html_()
    assert Predictions([], []).table().empty
