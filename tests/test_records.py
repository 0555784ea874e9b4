from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.records import (
    MIB,
    Backend,
    Cell,
    Environment,
    Memory,
    Rate,
    RecordsFile,
    Workload,
    alike,
    newest,
    published_cells,
    rate_of,
    read_cells,
    write_cells,
)

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*the last line is torn")


def measured(
    batch: int = 8, variant: str = "awq", status: str = "ok", reason: str | None = None
) -> Cell:
    steps = [0.010, 0.011, 0.012, 0.010, 0.011, 0.013, 0.010] if status == "ok" else []
    return Cell(
        origin="measured",
        variant=variant,
        size="tiny",
        weights="tiny default",
        workload=Workload(kind="queries", batch_size=batch, tokens=18, texts="report"),
        execution="eager",
        protocol="lean",
        backend=Backend(requested="auto", engaged={"QuantLinear": 28}),
        status=status,  # type: ignore[arg-type]
        reason=reason,
        step_s=steps,
        items_per_s=rate_of(steps, batch) if steps else None,
        memory=Memory(peak_bytes=30 * MIB, resident_bytes=10 * MIB, method="tracked")
        if steps
        else None,
        environment=Environment(cpu="a CPU", threads=2),
    )


def file_of(folder: Path, *cells: Cell, tail: str = "") -> Path:
    path = folder / "cells.jsonl"
    path.write_text("".join(cell.to_line() for cell in cells) + tail, encoding="utf-8")
    return path


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize(("samples", "rank"), [(6, 1), (10, 2), (20, 6), (50, 18), (100, 40)])
def test_interval_takes_the_tabled_ranks(samples: int, rank: int) -> None:
    # Tables of the sign test: P(at most rank - 1 of the samples below the median) <= 2.5 %.
    times = [float(n) for n in range(1, samples + 1)]
    rate = rate_of(times, 1)
    assert rate.high == pytest.approx(1 / rank)
    assert rate.low == pytest.approx(1 / (samples + 1 - rank))


def test_five_samples_give_no_interval() -> None:
    rate = rate_of([1, 2, 3, 4, 5], 6)
    assert (rate.median, rate.low, rate.high) == (2, None, None)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60), st.integers(1, 512))
def test_median_lies_in_its_interval(times: list[float], items: int) -> None:
    rate = rate_of(times, items)
    assert (rate.low is None) == (rate.high is None) == (len(times) < 6)
    assert (rate.low or 0) <= rate.median * (1 + 1e-12)
    assert rate.median <= (rate.high or math.inf) * (1 + 1e-12)


def test_the_rate_of_unlike_batches_is_their_items_over_their_time() -> None:
    small_and_large = [1.0, 1.1, 10.0, 0.9, 1.0, 10.1, 1.0, 1.0, 9.9]
    rate = rate_of(small_and_large, 4, [0, 0, 1])
    assert rate.median == pytest.approx(3 * 4 / (1 + 1 + 10))
    assert rate_of([1.0, 2.0, 9.0], 4, [0, 1, 2]) == Rate(median=1.0), "one round has no interval"
    assert alike([3.0, 1.0, 2.0], [0, 0, 0]) == [3.0, 1.0, 2.0]


def test_an_outlier_moves_the_rate_of_unlike_batches_little() -> None:
    times = [1.0, 1.0, 4.0, 1.0, 90.0, 4.1, 1.0, 1.0, 3.9]
    assert rate_of(times, 1, [0, 0, 1]).median == pytest.approx(3 / 6, rel=0.01)


def test_a_batch_that_takes_most_of_the_time_decides_the_interval() -> None:
    """Nine quick batches add no certainty about the tenth."""
    draw = random.Random(0)
    shapes, times = [*range(10)], [draw.gauss(1, 0.05) * (1, 1000)[n % 10 == 9] for n in range(200)]
    alone, whole = rate_of(times[9::10], 1), rate_of(times, 1, shapes)
    assert len(alike(times, shapes)) == 20
    widths = [(rate.high - rate.low) / rate.median for rate in (alone, whole)]
    assert widths[1] == pytest.approx(widths[0], rel=0.5)


def test_the_interval_of_unlike_batches_holds_the_true_rate() -> None:
    draw, shapes, held = random.Random(1), [0, 1, 2, 3, 3], 0
    true_s = [1.0, 2.0, 4.0, 3.0, 3.0]
    for _ in range(300):
        times = [seconds * draw.lognormvariate(0, 0.05) for seconds in true_s * 3]
        rate = rate_of(times, 1, shapes)
        held += rate.low <= 5 / sum(true_s) <= rate.high
    assert held >= 0.93 * 300


# ---------------------------------------------------------------- reading


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    cells = [
        *published_cells(),
        measured(),
        measured(16, status="oom", reason="asked for 2 GiB, näher"),
    ]
    assert read_cells(file_of(tmp_path, *cells)) == cells


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cut_anywhere_in_the_last_line_loses_that_line_only(data: st.DataObject) -> None:
    first, second = measured(8), measured(16, status="failed", reason="größer als möglich")
    line = second.to_line().encode()
    cut = data.draw(st.integers(0, len(line) - 2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cells.jsonl")
        path.write_bytes(first.to_line().encode() + line[:cut])
        assert read_cells(path) == [first]


def test_last_line_is_kept_without_its_newline(tmp_path: Path) -> None:
    path = file_of(tmp_path, measured(8), tail=measured(16).to_line().rstrip("\n"))
    assert [cell.batch_size for cell in read_cells(path)] == [8, 16]


def test_corrupt_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = file_of(tmp_path, measured(8), measured(16), measured(32))
    path.write_text(path.read_text().replace('"batch_size":16', '"batch_size":0'))
    with pytest.raises(BadInput, match=r"line 2 is not a cell record: workload\.batch_size"):
        read_cells(path)


@pytest.mark.parametrize(
    "change", ['"execution":3', '"extra":1,"execution":"eager"', '"execution":NaN']
)
def test_wrong_type_unknown_field_and_nan_are_refused(tmp_path: Path, change: str) -> None:
    path = file_of(tmp_path, measured())
    path.write_text(path.read_text().replace('"execution":"eager"', change))
    with pytest.raises(BadInput, match="line 1 is not a cell record"):
        read_cells(path)


@pytest.mark.parametrize(
    "text", ["", "hello", "batch,items\n8,94\n", '{"a": 1}\n', "[1, 2]", "\x00\xff"]
)
def test_not_a_records_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match="colqwen-lab sweep") as caught:
        read_cells(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no records file .* or the word published"):
        read_cells(tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match="must be a regular file or a new one, got a folder"):
        read_cells(tmp_path)


def test_published_rows_are_the_reports() -> None:
    cells = read_cells("published")
    assert [cell.batch_size for cell in cells if cell.variant == "awq"] == [
        8,
        16,
        32,
        64,
        128,
        256,
        512,
    ]
    first = cells[0]
    assert (first.variant, first.origin, first.environment.device) == (
        "base",
        "published",
        "NVIDIA A100-SXM4-40GB",
    )
    assert first.memory is not None
    assert first.memory.peak_bytes == 8527 * MIB
    assert all(cell.step_s == [] for cell in cells)


# ---------------------------------------------------------------- the store


def test_file_appends_what_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells.jsonl"
    with RecordsFile(path, Cell) as file:
        file.append([measured(8)])
        assert read_cells(path) == file.rows == [measured(8)]
        file.append([measured(16), measured(32)])
        assert [cell.batch_size for cell in read_cells(path)] == [8, 16, 32]


def test_file_resumes_a_torn_file_whole(tmp_path: Path) -> None:
    path = file_of(tmp_path, measured(8), tail=measured(16).to_line()[:100])
    with pytest.warns(UserWarning, match="the last line is torn and skipped"):
        assert read_cells(path) == [measured(8)]
    lines: list[str] = []
    with RecordsFile(path, Cell, progress=lines.append) as file:
        assert lines == [
            f"{path}: the last line is torn and skipped; a run was killed while writing"
        ]
        assert [cell.batch_size for cell in file.rows] == [8]
        file.append([measured(16)])
    assert [cell.batch_size for cell in read_cells(path)] == [8, 16]


@pytest.mark.parametrize("written", [0, 4, 40])
def test_file_resumes_a_sweep_killed_in_its_first_line(tmp_path: Path, written: int) -> None:
    path = file_of(tmp_path, tail=measured().to_line()[:written])
    with RecordsFile(path, Cell) as file:
        file.append([measured()])
    assert read_cells(path) == [measured()]


@pytest.mark.parametrize("room", [0, 1, 700])
def test_a_full_disk_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """The system takes a part of a line, then no more."""

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if len(data) > room:
                super().write(data[:room])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    path = file_of(tmp_path, measured(8))
    with RecordsFile(path, Cell) as file:
        monkeypatch.setattr(Path, "open", lambda path, mode, buffering: Full(path, "ab"))
        with pytest.raises(
            MissingRequirement,
            match=r"cannot write .*: No space left on device; finished rows are on file",
        ):
            file.append([measured(16)])
        monkeypatch.undo()
        assert read_cells(path) == [measured(8)] == file.rows
        file.append([measured(16)])
    assert read_cells(path) == [measured(8), measured(16)]


@pytest.mark.parametrize(
    ("schema", "says"), [(2, "schema: Input should be 1"), (0, "schema"), ("1", "schema")]
)
def test_another_schema_is_refused_in_one_line(tmp_path: Path, schema: object, says: str) -> None:
    row = json.loads(measured().to_line()) | {"schema": schema}
    path = file_of(tmp_path, measured(), tail=json.dumps(row) + "\n")
    for read in (read_cells, lambda path: RecordsFile(path, Cell)):
        with pytest.raises(BadInput, match=f"line 2 is not a cell record: {says}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_row_from_the_future_is_a_row(tmp_path: Path) -> None:
    cell = measured()
    skewed = cell.model_copy(
        update={
            "environment": cell.environment.model_copy(
                update={"started_at": "2999-01-01T00:00:00+00:00"}
            )
        }
    )
    assert skewed.environment.identity() == cell.environment.identity()
    assert read_cells(file_of(tmp_path, skewed)) == [skewed]


def test_the_newest_row_of_a_key_and_environment_counts(tmp_path: Path) -> None:
    path = file_of(tmp_path, measured(8, status="failed", reason="a driver"), measured(16))
    elsewhere = measured(8).model_copy(update={"environment": Environment(gpu="A100")})
    with RecordsFile(path, Cell) as file:
        before = path.read_bytes()
        file.append([measured(8), elsewhere])
        assert file.rows == read_cells(path) == [measured(8), measured(16), elsewhere]
    assert path.read_bytes().startswith(before)


def test_rows_on_file_twice_with_other_figures_are_said(tmp_path: Path) -> None:
    """A row that failed or was disturbed is measured again by design."""
    slower = measured(8).model_copy(update={"step_s": [], "items_per_s": Rate(median=1.0)})
    disturbed = slower.model_copy(update={"interference": ["other processes took 23% of the CPU"]})
    failed = measured(8, status="failed", reason="a driver")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for first in (failed, disturbed, measured(8)):
            assert read_cells(file_of(tmp_path, first, measured(8))) == [measured(8)]
    path = file_of(tmp_path, slower, measured(16), measured(8))
    text = r"cells\.jsonl: rows on file again with other figures: 1; the last ones count"
    with pytest.warns(UserWarning, match=text):
        assert read_cells(path) == [measured(8), measured(16)]


def test_appending_costs_the_same_in_a_long_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities: list[int] = []
    identity = Cell.identity
    monkeypatch.setattr(Cell, "identity", lambda cell: identities.append(1) or identity(cell))
    with RecordsFile(tmp_path / "cells.jsonl", Cell) as file:
        for batch in range(1, 31):
            file.append([measured(batch)])
    assert len(identities) == 30


def test_saving_over_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    write_cells(path, [measured(8)])
    with pytest.raises(BadInput, match="holds 1 rows already; name a new file"):
        write_cells(path, [measured(16)])
    assert read_cells(path) == [measured(8)]


def test_keys_of_earlier_records_are_read() -> None:
    row = json.loads(measured().to_line())
    row["memory"]["ledger"] = row["memory"].pop("breakdown") or {"activations": 3}
    row["memory"]["least_reserved_bytes"] = 7
    del row["memory"]["min_reserved_bytes"]
    row["towers"] = {"vision_s": 1.0, "decoder_s": 2.0}
    row["notes"] = ["busy"]
    row["workload"]["refused"] = 3
    row["backend"]["schedules"] = {"qkv x 18": "a"}
    for name, part in (("stages", row), ("interference", row), ("skipped", row["workload"])):
        del part[name]
    del row["backend"]["kernel_configs"]
    cell = Cell.model_validate_json(json.dumps(row))
    assert cell.memory is not None
    assert cell.stages is not None
    assert (cell.memory.breakdown, cell.memory.min_reserved_bytes) == ({"activations": 3}, 7)
    assert (cell.stages.vision_encoder_s, cell.stages.language_model_s) == (1.0, 2.0)
    assert (cell.interference, cell.workload.skipped) == (["busy"], 3)
    assert cell.backend.kernel_configs == {"qkv x 18": "a"}
    assert Cell.model_validate_json(cell.to_line()) == cell


def test_file_is_held_by_one_sweep_and_released_after(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    with RecordsFile(path, Cell), pytest.raises(BadInput, match="another run writes"):
        RecordsFile(path, Cell)
    with RecordsFile(path, Cell) as file:
        assert file.rows == []


def test_a_link_to_a_file_is_held_as_the_file(tmp_path: Path) -> None:
    path, link = tmp_path / "cells.jsonl", tmp_path / "deep" / "link.jsonl"
    link.parent.mkdir()
    link.symlink_to(path)
    with RecordsFile(path, Cell) as file:
        file.append([measured(8)])
        with pytest.raises(BadInput, match="another run writes"):
            RecordsFile(link, Cell)
        with pytest.raises(BadInput, match="another run writes"):
            write_cells(link, [])
    with RecordsFile(link, Cell) as file:
        file.append([measured(16)])
    assert link.is_symlink()
    assert read_cells(path) == [measured(8), measured(16)]


@pytest.mark.parametrize("kind", ["result.json", "jsonl.lock", "jsonl.tmp"])
def test_what_lies_beside_a_records_file_is_no_records_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    for write in (lambda: RecordsFile(path, Cell), lambda: write_cells(path, [])):
        with pytest.raises(
            BadInput, match=r"is the name of a side file; name a file such as rows\.jsonl"
        ):
            write()
    assert not list(tmp_path.iterdir())


def test_refused_file_is_untouched_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    with pytest.raises(BadInput, match="line 1 is not a cell record") as caught:
        RecordsFile(path, Cell)
    assert path.read_text() == "my notes\n"
    # The traceback is still alive here, as a notebook's last one is.
    assert caught.value.__traceback__ is not None
    with FileLock(f"{path}.lock").acquire(timeout=0):
        pass


def test_folder_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="name a file in a folder you can write"):
        RecordsFile(tmp_path / "file" / "cells.jsonl", Cell)
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput):
        RecordsFile(tmp_path / "folder", Cell)


# ---------------------------------------------------------------- files of other kinds and habits


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder"])
def test_only_a_regular_file_is_read_or_written(tmp_path: Path, kind: str) -> None:
    path = {"device": Path("/dev/null"), "folder": tmp_path}.get(kind, tmp_path / kind)
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    before = os.stat(path)
    for use in (read_cells, lambda path: RecordsFile(path, Cell), lambda p: write_cells(p, [])):
        got = {"fifo": "pipe"}.get(kind, kind)
        with pytest.raises(BadInput, match=f"must be a regular file or a new one, got a {got}"):
            use(path)
    assert os.stat(path).st_rdev == before.st_rdev
    assert not Path(f"{path}.lock").exists()


def test_a_lock_empties_no_file(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl.lock").write_text("mine\n")
    with pytest.raises(BadInput, match=r"cells\.jsonl\.lock holds content of another kind"):
        RecordsFile(tmp_path / "cells.jsonl", Cell)
    assert (tmp_path / "cells.jsonl.lock").read_text() == "mine\n"


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_an_edited_file_is_read_and_resumed(tmp_path: Path, ending: str) -> None:
    """A byte-order mark, blank lines and the line ends of Windows."""
    path = tmp_path / "cells.jsonl"
    lines = [cell.to_line().strip() for cell in (measured(8), measured(16))]
    between = "\r\n\r\n \n" if "\r" in ending else "\n\n"
    path.write_bytes(f"\ufeff{between.join(lines)}{ending}".encode())
    assert [cell.batch_size for cell in read_cells(path)] == [8, 16]
    with RecordsFile(path, Cell) as file:
        file.append([measured(32)])
    assert [cell.batch_size for cell in read_cells(path)] == [8, 16, 32]
    path.write_text(f"\n\n{measured().to_line()}oops\n")
    with pytest.raises(BadInput, match="line 4 is not a cell record"):
        read_cells(path)


def test_a_file_of_one_row_with_a_mark_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_bytes(f"\ufeff{measured(8).to_line().strip()}".encode())
    with RecordsFile(path, Cell) as file:
        file.append([measured(16)])
    assert [cell.batch_size for cell in read_cells(path)] == [8, 16]


def test_a_row_of_another_kind_is_not_torn(tmp_path: Path) -> None:
    """A whole line without its newline is no trace of a killed run, so it is never cut."""
    path = tmp_path / "cells.jsonl"
    path.write_text('{"schema":1,"environment":{},"kind":"fidelity"}')
    before = path.read_bytes()
    with pytest.raises(BadInput, match="line 1 is not a cell record"):
        RecordsFile(path, Cell)
    assert path.read_bytes() == before


def test_a_file_deleted_under_way_is_whole_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    with RecordsFile(path, Cell) as file:
        file.append([measured(8)])
        path.unlink()
        file.append([measured(16)])
        assert [cell.batch_size for cell in read_cells(path)] == [8, 16]
        path.write_text("# my notes\n")
        with pytest.raises(BadInput, match="holds content of another kind"):
            file.append([measured(32)])
    assert path.read_text() == "# my notes\n"


def test_the_word_published_is_asked_back_beside_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file_of(tmp_path, measured()).rename("published")
    with pytest.raises(BadInput, match=r"'published' is the report.*write \./published for it"):
        read_cells("published")
    assert read_cells("./published") == [measured()]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_cells("~/published") == [measured()]
    with pytest.raises(BadInput, match="must be named by a text, got 7"):
        read_cells(7)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what a row may say


def changed(folder: Path, **changes: Any) -> Path:
    row = json.loads(measured().to_line()) | changes
    (folder / "row.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "row.jsonl"


def test_a_median_against_its_samples_is_noticed(tmp_path: Path) -> None:
    samples = json.loads(measured().to_line())["step_s"]
    tripled = rate_of([step / 3 for step in samples], 8).model_dump()
    with pytest.raises(BadInput, match=r"line 1 .* items_per_s must have the median of step_s"):
        read_cells(changed(tmp_path, items_per_s=tripled))
    with pytest.raises(BadInput, match=r"must have the median of step_s, 727\.273, got 720"):
        read_cells(changed(tmp_path, items_per_s={"median": 720.0}))
    with pytest.raises(BadInput, match="median 9 must lie within its interval"):
        read_cells(changed(tmp_path, items_per_s={"median": 9, "low": 10, "high": 11}))


def test_quantised_weights_in_a_folder_named_base_are_not_base(tmp_path: Path) -> None:
    bits = {"bits": 4, "group_size": 128, "sym": True}
    (cell,) = read_cells(changed(tmp_path, variant="base", quantization=bits))
    assert cell.variant == "./base"
    assert read_cells(changed(tmp_path, variant="base"))[0].variant == "base"


def test_text_of_a_row_has_no_control_characters_and_an_end(tmp_path: Path) -> None:
    odd = "a\x1b[2Jb\u202ec\u2028d\u200be\u061cf\ud800"
    (cell,) = read_cells(changed(tmp_path, variant=odd[:-1], interference=["\x9bx" + "y" * 10**6]))
    assert cell.variant == "a[2Jbc def"
    assert cell.interference == ["x" + "y" * 9998]
    assert cell.environment.cpu == "a CPU"


def test_a_million_samples_and_their_rate() -> None:
    steps = [0.01 + 1e-8 * (n % 1000) for n in range(10**6)]
    cell = measured().model_copy(update={"step_s": steps, "items_per_s": rate_of(steps, 8)})
    again = Cell.model_validate_json(cell.to_line())
    assert again == cell
    assert again.items_per_s is not None
    assert again.items_per_s.median == pytest.approx(8 / 0.010004995)


def test_ranks_are_those_of_whole_numbers() -> None:
    for n in (*range(1, 60), 500, 999):
        rank, tail = 0, 0.0
        while rank < n and tail + math.comb(n, rank) / 2**n <= 0.025:
            tail += math.comb(n, rank) / 2**n
            rank += 1
        rate = rate_of([float(k) for k in range(1, n + 1)], 1)
        assert rate.high == (pytest.approx(1 / rank) if rank else None)


def test_a_line_without_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colqwen_lab.records.MOST_LINE_BYTES", 10**4)
    path = tmp_path / "sparse.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadInput, match="has a line of more than 10000 bytes"):
        read_cells(path)


# ---------------------------------------------------------------- identity


def test_key_tells_cells_apart_and_identity_forgets_the_hour() -> None:
    assert measured(8).key() == measured(8, status="oom").key()
    assert len({measured(8).key(), measured(16).key(), measured(8, "base").key()}) == 3
    early, late = (
        Environment(gpu="A", started_at="1", commit="a"),
        Environment(gpu="A", started_at="2", commit="b"),
    )
    assert early.identity() == late.identity()
    assert early.identity() != Environment(gpu="B").identity()


def test_a_torn_line_s_warning_names_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.warns(UserWarning, match=r"^~/cells\.jsonl: the last line is torn"):
        read_cells(file_of(tmp_path, measured(), tail='{"schema":1,'))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"results": ' + "[" * 100_000, '{"schema":1,' + '"a":[' * 50_000]
)
def test_deep_nesting_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "deep.jsonl").write_text(text + "\n")
    with pytest.raises(BadInput, match="line 1 is not a cell record"):
        read_cells(tmp_path / "deep.jsonl")


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "\ud800"])
def test_a_name_that_no_file_can_have_is_bad_input(name: str) -> None:
    with pytest.raises(BadInput, match=r"^.{,2000}$"):
        read_cells(name)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("memory", "peak_bytes", 10**400),
        ("memory", "resident_bytes", -1),
        ("workload", "tokens", 2**63),
        ("workload", "batch_size", 10**400),
        ("workload", "index_bytes", 10**400),
        ("items_per_s", "median", 5e-324),
        ("items_per_s", "high", 1e308),
        ("environment", "threads", 10**30),
    ],
)
def test_figures_out_of_bounds_are_refused(
    tmp_path: Path, part: str, field: str, value: float
) -> None:
    row = json.loads(measured().to_line())
    row[part][field] = value
    (tmp_path / "row.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInput, match=f"line 1 is not a cell record: {part}.{field}"):
        read_cells(tmp_path / "row.jsonl")


def test_every_committed_record_is_within_the_bounds() -> None:
    committed = [
        path
        for path in (ROOT / "outputs").rglob("*.jsonl")
        if '"workload":' in path.read_text()[:2000]
    ]
    assert len(committed) > 5
    for path in committed:
        assert read_cells(path)


def test_a_row_that_failed_later_hides_none_that_is_ok() -> None:
    ok = measured(8)
    lost = ok.model_copy(update={"status": "failed", "reason": "the process was killed"})
    for rows, seen in ([ok, lost], ok), ([lost, ok], ok), ([lost, lost], lost):
        assert list(newest(rows).values()) == [seen]


def test_a_throttled_clock_disturbs_and_a_display_does_not() -> None:
    lines = ["a display is attached to the GPU", "held down by the power limit"]
    throttled = "the clock was held down by the display's clock"
    assert measured(8).model_copy(update={"interference": [*lines, throttled]}).disturbed == [
        throttled
    ]


def test_earlier_records_call_synthetic_pages_drawn() -> None:
    work = {"kind": "pages", "batch_size": 1, "pages": "drawn, 64 x 64 pixels"}
    assert Workload(**work).pages == "synthetic, 64 x 64 pixels"
    texts = {"kind": "queries", "batch_size": 1, "texts": "drawn at the report's lengths"}
    assert Workload(**texts).texts == "random ids at the report's lengths"


@pytest.mark.parametrize("field", ["weights_bytes", "resident_bytes"])
def test_a_peak_below_what_always_lives_is_refused(tmp_path: Path, field: str) -> None:
    row = json.loads(measured().to_line())
    row["memory"] |= {field: row["memory"]["peak_bytes"] + 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInput, match="peak and reserved bytes must not fall"):
        read_cells(tmp_path / "rows.jsonl")
