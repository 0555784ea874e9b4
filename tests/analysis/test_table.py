from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from colqwen_lab.analysis.results import Results, conditions, mib, pick, repeated, rounded, short
from colqwen_lab.errors import BadInput
from colqwen_lab.records import (
    MIB,
    Backend,
    Cell,
    Environment,
    Memory,
    Rate,
    Store,
    Workload,
    published_cells,
    rate_of,
)

FIRST = published_cells()[0]


def cell(batch: int = 8, **changes: Any) -> Cell:
    return FIRST.model_copy(
        update={"workload": Workload(kind="queries", batch_size=batch, texts="report"), **changes}
    )


def lost(batch: int, status: str = "oom", **changes: Any) -> Cell:
    return cell(
        batch, status=status, reason="asked for 2 GiB", items_per_s=None, memory=None, **changes
    )


@pytest.fixture
def published() -> Results:
    return Results.load("published")


def test_load_save_round_trip(published: Results, tmp_path: Path) -> None:
    path = published.save(tmp_path / "made" / "cells.jsonl")
    assert Results.load(path) == published
    assert len(published) == 13
    assert published.variants == ("base", "awq")


def test_save_where_it_cannot_is_bad_input(published: Results, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "cells.jsonl", tmp_path):
        with pytest.raises(BadInput, match="can be written"):
            published.save(path)


def test_saving_onto_a_file_leaves_it_whole_when_the_disk_fills(
    published: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = published.save(tmp_path / "cells.jsonl")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="No space left on device; name a file that can be written"):
        published.select(variant="awq").save(path)
    assert Results.load(path) == published
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cells.jsonl", "cells.jsonl.lock"]


def test_a_file_that_a_sweep_holds_is_not_saved_over(published: Results, tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    with Store(path, lambda cell: True) as store:
        store.add(published)
        with pytest.raises(
            BadInput, match=r"a sweep writes to .*; wait for it or name another file"
        ):
            published.select(variant="awq").save(path)
    assert Results.load(path) == published


def test_select_narrows_by_every_criterion(published: Results) -> None:
    both = Results((*published.cells, lost(1024, variant="awq", protocol="lean")))
    assert [c.batch_size for c in both.select(variant="awq", protocol="lean")] == [1024]
    assert both.select(status="oom").variants == ("awq",)
    assert len(both.select(status="failed")) == 0
    assert len(both.select(size="4b", workload="queries", execution="eager")) == 14


@pytest.mark.parametrize(
    ("criteria", "named"),
    [
        ({"variant": "awk"}, "did you mean awq.*valid: base, awq"),
        ({"workload": "pages"}, "valid: queries"),
        ({"status": "lost"}, "valid: ok, oom, failed"),
        ({"batch": "8"}, "unknown criterion 'batch'.*variant, size"),
    ],
)
def test_select_names_what_there_is(
    published: Results, criteria: dict[str, str], named: str
) -> None:
    with pytest.raises(BadInput, match=named):
        published.select(**criteria)


def test_table_has_a_row_a_cell_and_a_reason_for_every_gap() -> None:
    steps = [0.1] * 7
    timed = cell(
        16,
        step_s=steps,
        items_per_s=rate_of(steps, 16),
        backend=Backend(requested="auto", engaged={"K": 28}),
    )
    table = Results(
        (cell(8), timed, lost(32), cell(64, items_per_s=None), cell(128, memory=None))
    ).table()
    assert list(table["batch"]) == [8, 16, 32, 64, 128]
    assert list(table["reason"]) == [
        "no interval: no samples kept",
        "",
        "asked for 2 GiB",
        "no rate",
        "no interval: no samples kept; no peak",
    ]
    assert list(table["status"]) == ["ok", "ok", "oom", "ok", "ok"]
    assert table.loc[1, ["items/s", "low", "high", "peak MiB", "kernel"]].tolist() == [
        160,
        160,
        160,
        8527,
        "K x 28",
    ]
    gaps = table[["items/s", "low", "high", "peak MiB"]].isna().any(axis=1)
    assert all(table["reason"][gaps] != "")


def test_table_shows_what_varies() -> None:
    assert "protocol" not in Results((cell(8),)).table()
    assert "protocol" in Results((cell(8), cell(8, protocol="lean"))).table()


def test_short_of_samples_is_said() -> None:
    few = cell(8, step_s=[0.1] * 3, items_per_s=rate_of([0.1] * 3, 8))
    assert Results((few,)).table()["reason"][0] == "no interval: fewer than 6 samples"


def test_repr_is_a_line_a_cell() -> None:
    rate = Rate(median=191.4, low=190.0, high=192.0)
    lines = repr(Results((cell(8, items_per_s=rate), lost(16)))).splitlines()
    assert lines[0] == "2 cells, base"
    assert (
        lines[1]
        == "base 4b queries batch 8 (published): 191 queries/s [190 to 192], peak 8,527 MiB"
    )
    assert lines[2] == "base 4b queries batch 16 (published): oom: asked for 2 GiB"


def test_html_is_escaped() -> None:
    html = Results((lost(8, variant="<script>", weights="random (seed 0)"),))._repr_html_()
    assert "<script>" not in html
    assert "untrained weights" in html
    assert "<table" in html


def test_series_are_cut_where_anything_but_the_batch_differs() -> None:
    cells = (
        cell(16),
        cell(8),
        cell(8, protocol="lean"),
        cell(8, variant="awq"),
        cell(8, weights="random (seed 0)"),
    )
    found = Results(cells).series()
    assert [series.label for series in found] == [
        "base (published, hub:TomoroAI/tomoro-colqwen3-embed-4b)",
        "base (lean, hub:TomoroAI/tomoro-colqwen3-embed-4b)",
        "awq",
        "base (published, random (seed 0))",
    ]
    assert [c.batch_size for c in found[0].cells] == [8, 16]


def test_cell_lost_before_its_batch_was_made_stays_in_its_series() -> None:
    drawn = Workload(kind="queries", batch_size=8, texts="drawn at the report's lengths")
    assert len(Results((cell(workload=drawn), lost(16))).series()) == 1


def test_ok_cells_only_carry_figures_and_the_last_counts() -> None:
    slow, fast = cell(8, items_per_s=Rate(median=1.0)), cell(8, items_per_s=Rate(median=2.0))
    failed = cell(16, status="failed", reason="broken")
    (series,) = Results((slow, fast, failed)).series()
    assert series.rated == {8: fast}
    assert series.sized.keys() == {8}
    assert series.lost == [failed]
    assert repeated(series) == [8]
    assert series.describe()["not_ok"] == [
        {"batch_size": 16, "status": "failed", "reason": "broken"}
    ]


def test_pick_names_what_there_is(published: Results) -> None:
    assert pick(published, "awq", "it").variant == "awq"
    with pytest.raises(BadInput, match="it must hold one series, and holds: base; awq"):
        pick(published, None, "it")
    with pytest.raises(BadInput, match="holds: no cell"):
        pick(Results(()), None, "it")


def test_title_names_the_machine() -> None:
    assert (
        conditions([FIRST])
        == "published · NVIDIA A100-SXM4-40GB · 4b · queries · eager · protocol published"
    )
    on_cpu = cell(environment=Environment(cpu="Xeon"), origin="measured")
    assert conditions([on_cpu]).startswith("measured · CPU Xeon")
    assert "NVIDIA A100-SXM4-40GB and CPU Xeon" in conditions([FIRST, on_cpu])


@pytest.mark.parametrize(
    ("value", "sentence", "cell"),
    [
        (0.012344, "0.0123", 0.01234),
        (94.04, "94", 94.04),
        (99.97, "100", 99.97),
        (10220.26, "10,220", 10220.3),
    ],
)
def test_figures_for_the_screen(value: float, sentence: str, cell: float) -> None:
    assert short(value) == sentence
    assert rounded(value) == cell
    assert mib(value * MIB) == f"{sentence} MiB"


def test_memory_without_a_rate_is_still_a_line() -> None:
    predicted = cell(
        8, origin="predicted", items_per_s=None, memory=Memory(peak_bytes=MIB, method="tracked")
    )
    assert "no rate, peak 1 MiB" in repr(Results((predicted,)))
