from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from colqwen_lab.analysis.table import COLUMNS, PATHS, Results, conditions, disturbed, pick
from colqwen_lab.errors import BadInput, LabError
from colqwen_lab.records import (
    MIB,
    Backend,
    Cell,
    EndToEnd,
    Energy,
    Environment,
    Loading,
    Rate,
    RecordsFile,
    Workload,
    published_cells,
    rate_of,
)

FIRST = published_cells()[0]


def cell(batch: int = 8, **changes: Any) -> Cell:
    return FIRST.model_copy(
        update={"workload": Workload(kind="queries", batch_size=batch, texts="report"), **changes}
    )


def failed(batch: int, status: str = "oom", **changes: Any) -> Cell:
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
        with pytest.raises(BadInput, match=r"cannot write|cannot use|got a folder"):
            published.save(path)


def test_saving_never_replaces_a_file(published: Results, tmp_path: Path) -> None:
    path = published.save(tmp_path / "cells.jsonl")
    with pytest.raises(BadInput, match="holds 13 rows already; name a new file"):
        published["awq"].save(path)
    assert Results.load(path) == published


def test_a_full_disk_leaves_no_half_file(
    published: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LabError, match="No space left on device"):
        published.save(tmp_path / "cells.jsonl")
    assert (tmp_path / "cells.jsonl").read_bytes() == b""


def test_a_file_that_a_sweep_holds_is_not_written(published: Results, tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    with (
        RecordsFile(path, Cell),
        pytest.raises(BadInput, match="another run writes to"),
    ):
        published.save(path)


def test_indexing(published: Results) -> None:
    assert published[0] is published.cells[0]
    assert published["awq"] == published.select(variant="awq")
    assert published[:2].cells == published.cells[:2]
    with pytest.raises(BadInput, match="valid: base, awq"):
        published["W8A16"]


def test_frame_is_tidy_and_raw(published: Results, tmp_path: Path) -> None:
    raw = published.to_frame()
    assert len(raw) == 13
    first = raw.iloc[0]
    assert (first["batch_size"], first["items_per_s"]) == (8, 191)
    assert first["peak_bytes"] == 8527 * MIB
    assert {*raw} == {*PATHS, "tokens_per_s"}
    assert COLUMNS["meaning"].notna().all()
    path = published.to_csv(tmp_path / "cells.csv")
    assert list(pd.read_csv(path)["items_per_s"]) == list(raw["items_per_s"])
    assert Results(()).to_frame().empty
    with pytest.raises(BadInput, match="name a file in a folder you can write"):
        published.to_csv(tmp_path / "none" / "cells.csv")


def test_frame_of_cells_without_rates() -> None:
    raw = Results((cell(8, items_per_s=None),)).to_frame()
    assert raw[["items_per_s", "tokens_per_s"]].isna().all(axis=None)


def test_disturbed_cells_are_counted() -> None:
    cells = (cell(8), cell(16, interference=["the clock was held down"]))
    assert disturbed(cells) == 1
    table = Results(cells).table()
    assert list(table["disturbed by"]) == ["-", "the clock was held down"]


def test_tables_need_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from colqwen_lab.analysis.table import Results;"
        "Results.load('published').table();"
        "sys.exit(' '.join({'torch', 'matplotlib', 'transformers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_select_narrows_by_every_criterion(published: Results) -> None:
    both = Results((*published.cells, failed(1024, variant="awq", protocol="lean")))
    assert [c.batch_size for c in both.select(variant="awq", protocol="lean")] == [1024]
    assert both.select(status="oom").variants == ("awq",)
    assert len(both.select(status="failed")) == 0
    assert len(both.select(size="4b", workload="queries", execution="eager")) == 14


@pytest.mark.parametrize(
    ("criteria", "named"),
    [
        ({"variant": "awk"}, "did you mean awq.*valid: base, awq"),
        ({"workload": "pages"}, "valid: queries"),
        ({"status": "killed"}, "valid: ok, oom, failed"),
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
        (cell(8), timed, failed(32), cell(64, items_per_s=None), cell(128, memory=None))
    ).table()
    assert list(table["batch"]) == [8, 16, 32, 64, 128]
    assert list(table["reason"]) == [
        "no interval: under 6 samples",
        "-",
        "asked for 2 GiB",
        "no rate",
        "no interval: under 6 samples; no peak",
    ]
    assert list(table["status"]) == ["ok", "ok", "oom", "ok", "ok"]
    assert table.loc[1, ["items/s", "low", "high", "peak MiB", "kernel"]].tolist() == [
        160,
        160,
        160,
        8527,
        "K x 28",
    ]
    gaps = table[["items/s", "low", "high", "peak MiB"]].eq("-").any(axis=1)
    assert all(table["reason"][gaps] != "-")


def test_table_shows_what_varies() -> None:
    assert "protocol" not in Results((cell(8),)).table()
    assert "protocol" in Results((cell(8), cell(8, protocol="lean"))).table()


def test_repr_is_the_table() -> None:
    rate = Rate(median=191.4, low=190.0, high=192.0)
    lines = repr(Results((cell(8, items_per_s=rate), failed(16)))).splitlines()
    assert lines[0] == conditions([FIRST])
    assert "origin: published" in lines[1]
    assert lines[-2].split() == ["8", "191.4", "190", "192", "8,527", "ok", "-"]
    assert lines[-1].split()[:6] == ["16", "-", "-", "-", "-", "oom"]


def test_html_is_escaped() -> None:
    html = Results((failed(8, variant="<script>", weights="random (seed 0)"),))._repr_html_()
    assert "<script>" not in html
    assert "random weights" in html
    assert "<table" in html


def test_series_are_cut_where_anything_but_the_batch_differs() -> None:
    cells = (
        cell(16),
        cell(8),
        cell(8, protocol="lean"),
        cell(8, variant="awq"),
        cell(8, weights="random (seed 0)"),
    )
    checked = Results(cells).series()
    assert [series.label for series in checked] == [
        "base (published, hub:TomoroAI/tomoro-colqwen3-embed-4b)",
        "base (lean, hub:TomoroAI/tomoro-colqwen3-embed-4b)",
        "awq",
        "base (published, random (seed 0))",
    ]
    assert [c.batch_size for c in checked[0].cells] == [8, 16]


def test_cell_lost_before_its_batch_was_made_stays_in_its_series() -> None:
    drawn = Workload(kind="queries", batch_size=8, texts="drawn at the report's lengths")
    assert len(Results((cell(workload=drawn), failed(16))).series()) == 1


def test_ok_cells_only_carry_figures_and_the_last_counts() -> None:
    slow, fast = cell(8, items_per_s=Rate(median=1.0)), cell(8, items_per_s=Rate(median=2.0))
    broken = cell(16, status="failed", reason="broken")
    (series,) = Results((slow, fast, broken)).series()
    assert series.rated == {8: fast}
    assert series.sized.keys() == {8}
    assert series.failed == [broken]
    assert series.to_dict()["not_ok"] == [
        {"batch_size": 16, "status": "failed", "reason": "broken"}
    ]


def test_pick_names_what_there_is(published: Results) -> None:
    assert pick(published, "awq", "it").variant == "awq"
    with pytest.raises(BadInput, match="it must hold one series, got base; awq"):
        pick(published, "W8A16", "it")
    with pytest.raises(BadInput, match="got no cell"):
        pick(Results(()), (), "it")


def test_title_names_the_machine() -> None:
    assert (
        conditions([FIRST])
        == "published · NVIDIA A100-SXM4-40GB · 4b · queries · eager · protocol published"
    )
    on_cpu = cell(environment=Environment(cpu="Xeon"), origin="measured")
    assert conditions([on_cpu]).startswith("measured · CPU Xeon")
    assert "NVIDIA A100-SXM4-40GB and CPU Xeon" in conditions([FIRST, on_cpu])


def test_what_items_cost() -> None:
    steps = [0.1] * 198 + [0.2, 0.3]
    fields = {"step_s": steps, "items_per_s": rate_of(steps, 1)}
    fields |= {"energy": Energy(joules_per_item=20.5, seconds=1.5, idle_w=70)}
    fields |= {"loading": Loading(load_s=12, first_step_s=3)}
    results = Results((cell(1, **fields), cell(8, items_per_s=Rate(median=40)), failed(16)))
    table = results.costs(price=3)
    assert table["batch"].tolist() == [1, 8]
    assert table["items/hour"].tolist() == [36000, 144000]
    assert table["cost of a million"].tolist() == [83.33, 20.83]
    assert table["J/item"].tolist() == [20.5, "-"]
    assert table["p50 ms"].tolist() == [100, "-"]
    assert table["p99 ms"].tolist() == [101, "-"], (
        "a hundredth of the way from the 198th to the next"
    )
    assert "cost of a million" not in results.costs()


def test_percentiles_need_200_samples_of_one_item() -> None:
    steps = [0.1] * 200
    assert cell(1, step_s=steps).latency == (0.1, 0.1, 0.1)
    assert cell(1, step_s=steps[1:]).latency is None
    assert cell(2, step_s=steps).latency is None


def end_to_end(loaders: int, seconds: float) -> EndToEnd:
    """256 pages: 0.08 s in a loader, 0.03 s in the model, 0.001 s to store."""
    times = {"read_s": 0.08, "prepare_s": 0, "preprocess_s": 0.001, "embed_s": 0.029}
    about = {"loaders": loaders, "pages": 256, "seconds": seconds, "on_device": True}
    return EndToEnd(**about, **times, store_s=0.001)


def test_pages_from_disk_to_disk() -> None:
    runs = [end_to_end(1, 25.6), end_to_end(8, 8)]
    results = Results((cell(8, end_to_end=runs, items_per_s=Rate(median=33.3)), cell(16)))
    table = results.end_to_end()
    assert table["pages/s"].tolist() == [10, 32]
    assert table["% of the model's rate"].tolist() == [30.03, 96.1]
    assert table["bottleneck"].tolist() == ["reading", "model"]
    assert table["loaders needed"].tolist() == [3, 3], "0.08 s of reading a 0.03 s of the model"
    assert len(Results((cell(8),)).end_to_end()) == 0


def test_costs_of_several_origins_name_them() -> None:
    table = Results((cell(origin="measured"), cell())).costs()
    assert table["origin"].tolist() == ["measured", "published"]
    assert "origin" not in Results((cell(),)).costs()
