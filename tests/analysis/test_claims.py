from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from colqwen_lab.analysis.claims import claims
from colqwen_lab.analysis.compare import Comparison, compare
from colqwen_lab.analysis.table import Results
from colqwen_lab.records import Rate, published_cells


def comparison(*, batch: int = 0, rate: float = 0) -> Comparison:
    """The published figures, the quantised rate at one batch perhaps changed."""
    cells = [
        cell.model_copy(update={"items_per_s": Rate(median=rate)})
        if (cell.variant, cell.batch_size) == ("awq", batch)
        else cell
        for cell in published_cells()
    ]
    return compare(Results(tuple(cells)), Results(tuple(cells)))


@pytest.fixture(scope="module")
def checked() -> dict[str, Any]:
    return of(comparison().claims_table())


def of(table: pd.DataFrame) -> dict[str, Any]:
    return {row.claim: row for row in table.itertuples(index=False)}


def decided(comparison: Comparison) -> dict[str, Any]:
    return of(claims(comparison.pair, comparison.rows, comparison.budgets))


@pytest.mark.parametrize(
    ("claim", "follows", "rows_say"),
    [
        (
            "about 60 % less memory",
            False,
            "57.1 % at batch 64, 54.6 % at batch 128, 50.0 % at batch 256",
        ),
        ("overhead -51 % at batch 8", True, "-50.8 %"),
        ("overhead -27 % at batch 64", True, "-27.1 %"),
        ("overhead -4 % at batch 128", True, "-4.0 %"),
        ("overhead +0.3 % at batch 256", True, "+0.3 %"),
        (
            "the same batch is compared at 8, 64, 128, 256",
            False,
            "batch 16 (-59.4 %), batch 32 (-52.8 %)",
        ),
        ("8 GB: base at batch 8 does not fit", True, "batch 8: 8,527 MiB"),
        (
            "8 GB: awq at most at batch 128, 909 items/s",
            False,
            "fits up to batch 512: 951 items/s, peak 6,963 MiB",
        ),
        (
            "8 GB: 4.7x higher throughput",
            False,
            "no ratio, base does not fit; the claim divides 909 by 191",
        ),
        (
            "12 GB: base at most at batch 32, 712 items/s",
            False,
            "fits up to batch 256: 966 items/s, peak 10,220 MiB",
        ),
        ("12 GB: awq at most at batch 512, 951 items/s", True, "fits up to batch 512"),
        (
            "12 GB: 34 % higher throughput",
            False,
            "0.984 at the largest batches that fit; the claim divides 951 by 712",
        ),
        (
            "use the quantised model when GPU memory is limited (4-16 GB)",
            False,
            "No significant difference with 9.79 GiB or more free, each at its largest batch (-1.6",
        ),
        (
            "use BASE when the GPU has ample memory (24 GB and more)",
            False,
            "awq is 1.1 to 5.0 times as fast as base with 8.98 to 9.79 GiB free",
        ),
        ("use BASE when batches are small", True, "-50.8 % at batch 8"),
        ("use BASE when the latency of a sample is critical", True, "-50.8 % at batch 8"),
    ],
)
def test_each_claim_against_its_rows(
    checked: dict[str, Any], claim: str, follows: bool, rows_say: str
) -> None:
    assert rows_say in checked[claim].rows_say
    assert checked[claim].follows is follows


def test_every_claim_is_held(checked: dict[str, Any]) -> None:
    assert len(checked) == 16
    table = comparison().claims_table()
    assert list(table.columns) == ["claim", "rows_say", "follows"]
    assert list(table["follows"]) == [claim.follows for claim in checked.values()]


def test_other_figures_make_no_claims() -> None:
    other = comparison(batch=256, rate=970)
    assert other.claims_table().empty
    assert other.to_dict()["places"][0]["claims"] == []


def test_claims_follow_the_rows_not_the_text() -> None:
    """With other rows the same claims come out otherwise: nothing is typed in."""
    changed = decided(comparison(batch=512, rate=966 * 1.34))
    assert changed["12 GB: 34 % higher throughput"].follows
    assert not changed["12 GB: awq at most at batch 512, 951 items/s"].rows_say.startswith(
        "fits up to batch 512: 951"
    )
    slower = decided(comparison(batch=512, rate=900))
    assert slower["use BASE when the GPU has ample memory (24 GB and more)"].follows
    quicker = decided(comparison(batch=8, rate=96))
    assert quicker["overhead -51 % at batch 8"].rows_say == "-49.7 %"
    assert not quicker["overhead -51 % at batch 8"].follows
