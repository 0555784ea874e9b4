"""Fault injection. Each function injects one kind of fault and returns its counts.

`lost` counts measured rows that are gone, `unclear` the endings that are not one line; both must
be zero. Everything is seeded; nothing needs a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from colqwen_lab.analysis.compare import compare
from colqwen_lab.analysis.table import Results
from colqwen_lab.errors import LabError
from colqwen_lab.measure import sweep, worker
from colqwen_lab.measure.environment import environment
from colqwen_lab.measure.timing import StoppingRule
from colqwen_lab.model import loading
from colqwen_lab.model.checkpoint import FolderCheckpoint, default_checkpoint
from colqwen_lab.model.config import VARIANTS
from colqwen_lab.options import PlanOptions, SweepOptions
from colqwen_lab.records import Cell, RecordsFile, read_cells
from colqwen_lab.runtime import eager

CPU = torch.device("cpu")
QUICK = StoppingRule(min_steps=2, max_steps=2, min_s=0, max_s=0, max_warmup=1)
BATCHES = (1, 2, 3, 4, 5, 6)


# A busy machine disturbs cells, and a resumed sweep would measure them again.
sweep.interference = lambda before: ([], None)


def run(path: Path, batches: tuple[int, ...] = BATCHES, isolated: bool = False) -> list[Cell]:
    """The cells of base and awq at size tiny, of random weights, measured in moments."""
    options = {"model": "base,awq", "batch_sizes": batches, "size": "tiny", "weights": "random"}
    checked = SweepOptions.of(options | {"kernel": "torch", "output": str(path)})
    return sweep.sweep(checked, str, stopping=QUICK, isolated=isolated)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="colqwen-lab-faults-") as folder:
        yield Path(folder)


def lines(path: Path) -> list[str]:
    """The complete lines of a records file."""
    return path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []


def is_one_line(error: Exception) -> bool:
    return isinstance(error, LabError) and "\n" not in str(error) and len(str(error)) > 10


# ---------------------------------------------------------------- kills


def forked(work: Callable[[], object]) -> int:
    """The id of a child that does `work`, in a process group of its own; torch is imported."""
    pid = os.fork()
    os.setpgid(pid, pid)  # in both: whoever comes first
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def kills(rng: random.Random, group: int, group_isolated: int, parent_only: int) -> dict[str, Any]:
    """SIGKILL of a sweep's process group, or of its parent, at random; the next run resumes."""
    environment(CPU)  # cached here, not in every child
    took_s: dict[bool, float] = {}  # seconds of a sweep: the span of the random moments
    figures = Counter(lost=0, unclear=0, orphans=0, files=0, rows_kept=0, ended_before=0)
    kinds = (
        [(False, True)] * group + [(True, True)] * group_isolated + [(True, False)] * parent_only
    )
    with scratch() as folder:
        for isolated in {isolated for isolated, _ in kinds}:
            began = time.monotonic()
            os.waitpid(
                forked(
                    lambda isolated=isolated: run(folder / f"{isolated}.jsonl", isolated=isolated)
                ),
                0,
            )
            took_s[isolated] = time.monotonic() - began
        path, before = folder / "0.jsonl", set()
        while kinds:
            isolated, whole = kinds.pop()
            began = time.monotonic()
            pid = forked(lambda path=path, isolated=isolated: run(path, isolated=isolated))
            moment = rng.uniform(0, 0.9 * took_s[isolated])
            while (
                ended := os.waitpid(pid, os.WNOHANG)[0]
            ) == 0 and time.monotonic() - began < moment:
                time.sleep(0.002)
            if ended:
                figures["ended_before"] += 1
                kinds.append((isolated, whole))
            else:
                children = psutil.Process(pid).children(recursive=True)
                (os.killpg if whole else os.kill)(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                figures["kills of a whole group" if whole else "kills of the parent alone"] += 1
                _, alive = psutil.wait_procs(children, timeout=60)  # one may be importing torch
                figures["orphans"] += sum(child.is_running() for child in alive)
                for child in alive:
                    child.kill()
            after = set(lines(path))
            figures["lost"] += len(before - after)
            if len(after) == 2 * len(BATCHES):
                figures["unclear"] += not _complete(path)
                figures["files"] += 1
                path, before = folder / f"{figures['files']}.jsonl", set()
            else:
                figures["rows_kept"] += len(after)
                before = after
        run(path)
        figures["lost"] += len(before - set(lines(path)))
        figures["unclear"] += not _complete(path)
    return dict(figures)


def _complete(path: Path) -> bool:
    """Whether every cell is there, and ok; no ok cell was measured twice."""
    cells = read_cells(path)
    wanted = sorted(itertools.product(("awq", "base"), BATCHES))
    ok = [row for row in map(Cell.model_validate_json, lines(path)) if row.status == "ok"]
    return all(
        sorted((cell.variant, cell.batch_size) for cell in rows) == wanted for rows in (cells, ok)
    )


def killed_workers(rng: random.Random, count: int) -> dict[str, Any]:
    """SIGKILL of one model's process at random moments of a sweep that goes on."""
    figures = Counter(tried=0, kills=0, failed_cells=0, lost=0, unclear=0)
    with scratch() as folder, ThreadPoolExecutor(1) as pool:
        while figures["kills"] < count and figures["tried"] < 5 * count:
            figures["tried"] += 1
            path = folder / f"{figures['tried']}.jsonl"
            running = pool.submit(run, path, isolated=True)
            time.sleep(rng.uniform(0.2, 1.5))
            killed = 0
            if not running.done() and (children := multiprocessing.active_children()):
                rng.choice(children).kill()
                killed = 1
            cells = running.result()
            failed = [cell for cell in cells if cell.status != "ok"]
            figures["kills"] += killed
            figures["failed_cells"] += len(failed)
            figures["unclear"] += sum("SIGKILL" not in (cell.reason or "") for cell in failed)
            figures["lost"] += max(0, len(failed) - killed) + (len(cells) - 2 * len(BATCHES))
            if failed:
                run(path)
            figures["unclear"] += not _complete(path)
    return dict(figures)


# ---------------------------------------------------------------- files


def torn_writes(every: int) -> dict[str, Any]:
    """The last line cut at every byte: the rows before it are read, and a run resumes from them."""
    figures = Counter(cuts=0, lost=0, unclear=0, reported=0)
    with scratch() as folder:
        cells = run(folder / "whole.jsonl", (1,))
        whole = (folder / "whole.jsonl").read_bytes()
        start = whole.rstrip(b"\n").rfind(b"\n") + 1
        path = folder / "torn.jsonl"
        for cut in range(start, len(whole), every):
            figures["cuts"] += 1
            path.write_bytes(whole[:cut])
            reports: list[str] = []
            try:
                with RecordsFile(path, Cell, progress=reports.append) as file:
                    kept = list(file.rows)
                    file.append(cells[len(kept) :])
            except Exception:
                figures["unclear"] += 1
                continue
            # Without its newline the last line may be torn as well, or is read and cut off.
            complete = cut == len(whole) - 1
            figures["lost"] += kept != cells[: 2 if complete else 1] or read_cells(path) != cells
            figures["reported"] += bool(reports)
            figures["unclear"] += bool(reports) == (complete or cut == start)
    return dict(figures)


def interleaved_writes(rng: random.Random, count: int) -> dict[str, Any]:
    """A line within another, as two writers without a lock leave it: one error, the file stays."""
    figures = Counter(tried=0, lost=0, unclear=0)
    with scratch() as folder:
        run(folder / "whole.jsonl", (1, 2))
        rows = (folder / "whole.jsonl").read_text().splitlines()
        path = folder / "mixed.jsonl"
        for _ in range(count):
            figures["tried"] += 1
            cut = rng.randrange(1, len(rows[1]) - 1)
            path.write_text(
                "\n".join([rows[0], rows[1][:cut] + rows[2] + rows[1][cut:], rows[3], ""])
            )
            text = path.read_bytes()
            try:
                RecordsFile(path, Cell)
                figures["unclear"] += 1
            except LabError as error:
                named = "line 2 is not a cell record" in str(error)
                figures["unclear"] += not is_one_line(error) or not named
            figures["lost"] += path.read_bytes() != text
    return dict(figures)


def full_disk(every: int) -> dict[str, Any]:
    """The system refuses to write beyond each size; with root also a real full file system."""
    figures = Counter(tried=0, lost=0, unclear=0, full_file_systems=0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with scratch() as folder:
        cells = run(folder / "whole.jsonl", (1, 2))
        sizes = [len(cell.to_line()) for cell in cells]
        path = folder / "full.jsonl"
        for limit in range(0, sum(sizes), every):
            figures["tried"] += 1
            path.unlink(missing_ok=True)
            written = 0
            try:
                with RecordsFile(path, Cell) as file:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                    for cell in cells:
                        file.append([cell])
                        written += 1
            except LabError:
                pass
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            found = [Cell.model_validate_json(line) for line in lines(path)]
            figures["lost"] += found != cells[:written]
            figures["unclear"] += written == len(cells) or not path.read_bytes().endswith(
                (b"\n", b"")
            )
        for limit in (0, sizes[0] + 1, sum(sizes[:3]) + 1):
            figures["tried"] += 1
            path.unlink(missing_ok=True)
            figures.update(_ends_in_a_line(lambda: run(path, (1, 2)), path, limit=(limit, hard)))
        mount = folder / "mount"
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(mount)]
        if (
            shutil.which("mount")
            and subprocess.run(command, capture_output=True, check=False).returncode == 0
        ):
            try:
                figures["full_file_systems"] += 1
                figures.update(
                    _ends_in_a_line(lambda: run(mount / "rows.jsonl"), mount / "rows.jsonl")
                )
            finally:
                subprocess.run(["umount", str(mount)], check=True)
    return dict(figures)


def _ends_in_a_line(
    work: Callable[[], object], path: Path, limit: tuple[int, int] | None = None
) -> Counter[str]:
    soft_hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        work()
        return Counter(unclear=1)
    except LabError as error:
        return Counter(unclear=int(not is_one_line(error) or "cannot write" not in str(error)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
        for line in lines(path):
            Cell.model_validate_json(line)


def out_of_memory(every: int) -> dict[str, Any]:
    """Out of memory at each forward and load of a sweep: one cell says so, the others go on."""
    figures = Counter(positions=0, lost=0, unclear=0, oom_cells=0)
    count = itertools.count()
    position = -1

    def forward(model: Any, inputs: Any, use_cache: bool) -> Any:
        if next(count) == position:
            raise torch.OutOfMemoryError("CUDA out of memory, on purpose")
        return eager.eager(model, inputs, use_cache)

    def load(*arguments: Any) -> Any:
        if next(count) == position:
            raise torch.OutOfMemoryError("CUDA out of memory, on purpose")
        return really(*arguments)

    really, worker.load = worker.load, load
    plain, eager.EXECUTIONS["eager"] = eager.EXECUTIONS["eager"], forward
    try:
        with scratch() as folder:
            run(folder / "whole.jsonl", (1, 2))
            for position in range(0, next(count), every):
                count = itertools.count()
                figures["positions"] += 1
                path = folder / f"{position}.jsonl"
                cells = run(path, (1, 2))
                lost = [cell for cell in cells if cell.status != "ok"]
                figures["oom_cells"] += len(lost)
                figures["unclear"] += sum(cell.status != "oom" for cell in lost)
                # A model that does not load has no cell at all; all else costs one cell, or none.
                figures["lost"] += len(lost) > (2 if position < 2 else 1)
                figures["lost"] += sorted(map(Cell.key, read_cells(path))) != sorted(
                    map(Cell.key, cells)
                )
    finally:
        worker.load, eager.EXECUTIONS["eager"] = really, plain
    return dict(figures)


# ---------------------------------------------------------------- hostile checkpoints


class Bomb:
    """What a pickle or a remote module would do: leave a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def checkpoint(folder: Path) -> Path:
    """The tiny network as a hostile checkpoint: with a pickle, and code in `auto_map`."""
    folder.mkdir()
    model = loading.load(default_checkpoint(VARIANTS["base"], "tiny", "auto", CPU), CPU).model
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
    )
    config = model.config.to_dict() | {"auto_map": {"AutoModel": "modeling_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    mark = folder.parent / "executed"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    (folder / "modeling_evil.py").write_text(
        f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
    )
    return folder


def headers(rng: random.Random, flips: int, every: int) -> dict[str, Any]:
    """Every header entry of a checkpoint corrupted: one error, soon and in little memory.

    `harmless` counts checkpoints that load: the changed byte is not read, such as a version.
    """
    figures = Counter(tried=0, refused=0, harmless=0, unclear=0, lost=0)
    with scratch() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, of empty tensors
        source = checkpoint(folder / "checkpoint")
        slowest, before = 0.0, psutil.Process().memory_info().rss
        grown = 0
        for name, content in itertools.islice(_corruptions(source, rng, flips), 0, None, every):
            figures["tried"] += 1
            original = (source / name).read_bytes() if (source / name).exists() else None
            if isinstance(content, bytes):
                (source / name).write_bytes(content)
            else:
                (source / name).unlink(missing_ok=True)
                (source / name).symlink_to(content)
            began = time.monotonic()
            try:
                loading.load(FolderCheckpoint(source), CPU)
                figures["harmless"] += 1
            except Exception as error:
                figures["refused"] += is_one_line(error)
                if not is_one_line(error):
                    figures["unclear"] += 1
                    print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            slowest = max(slowest, time.monotonic() - began)
            grown = max(grown, psutil.Process().memory_info().rss - before)
            (source / name).unlink()
            if original is not None:
                (source / name).write_bytes(original)
        executed = (folder / "executed").exists()
    figures["unclear"] += slowest > 5
    figures["unclear"] += grown > 2**30
    return dict(figures) | {
        "executed": executed,
        "slowest_s": round(slowest, 2),
        "grown_bytes": grown,
    }


def _corruptions(
    source: Path, rng: random.Random, flips: int
) -> Iterator[tuple[str, bytes | Path]]:
    """(file, its new content or where it links to)."""
    file, data = "model.safetensors", (source / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for claimed in (0, 1, length - 1, length + 1, len(data), 10**9, 10**15, 2**63 - 1, 2**64 - 1):
        yield file, claimed.to_bytes(8, "little") + data[8:]
    header = json.loads(data[8 : 8 + length])
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        for key, bad in (
            ("dtype", "I4"),
            ("dtype", None),
            ("shape", [10**15]),
            ("shape", [10**9, 10**9]),
            ("shape", [-1]),
            ("data_offsets", [0, 10**15]),
            ("data_offsets", [10**15, 0]),
        ):
            changed = json.dumps(header | {tensor: entry | {key: bad}}).encode()
            yield file, len(changed).to_bytes(8, "little") + changed + data[8 + length :]
    for _ in range(flips):
        at = rng.randrange(8 + length)
        yield file, data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    config = json.loads((source / "config.json").read_text())
    for path in _leaves(config):
        for bad in (10**12, -1, 0, "x", None, [], {}, 1e308):
            yield "config.json", json.dumps(_changed(config, path, bad)).encode()
    quantized = [
        {"quant_method": "auto-round", "bits": bits, "group_size": 128}
        for bits in (0, -1, 10**9, "x", None)
    ]
    for bad in (*quantized, [], 3, {"quant_method": "__import__('os').system('true')"}):
        yield "config.json", json.dumps(config | {"quantization_config": bad}).encode()
    for bad in (
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{" * 1000,
        b'{"model_type": "colqwen3"}',
        b" " * (65 << 20),
    ):
        yield "config.json", bad
    outside = (
        "../executed",
        "/etc/passwd",
        "..",
        "",
        ".",
        "a/b.safetensors",
        "..\\x",
        "pytorch_model.bin",
    )
    for target in (*outside, None, 3, ["x"]):
        yield (
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"embedding_proj_layer.bias": target}}).encode(),
        )
    for bad in (b"", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}'):
        yield "model.safetensors.index.json", bad
    for bad in (b"", b"garbage", b"{}", b'{"model": {}}', rng.randbytes(10_000), b" " * (65 << 20)):
        yield "tokenizer.json", bad
    for link in (file, "config.json", "tokenizer.json"):
        yield link, source.parent.parent / "elsewhere" / link
        yield link, Path("/etc/passwd")


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from _leaves(inner, (*path, key))


def _changed(value: Any, path: tuple[str, ...], new: Any) -> Any:
    key, *rest = path
    return value | {key: _changed(value[key], tuple(rest), new) if rest else new}


# ---------------------------------------------------------------- fuzz

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
# Of the right kind, and at its ends.
extremes = st.sampled_from(
    [0, 1, 2**62, 10**400, 1e-300, 1e-8, 1e8, 1e300, "", "$\\frac{", "<b>|", "\x1b[2J\n", "base"]
)


def _fuzzed(strategy: st.SearchStrategy[Any], body: Callable[[Any], None], examples: int) -> None:
    many = settings(
        max_examples=examples,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    many(given(strategy)(body))()


def fuzzed_records(examples: int) -> dict[str, Any]:
    """Records with any value anywhere, and files of any bytes: read and compared, or one error."""
    figures = Counter(tried=0, read=0, compared=0, refused=0, lost=0, unclear=0)
    with scratch() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(folder / "whole.jsonl", (1,))
        row, other = map(json.loads, lines(folder / "whole.jsonl")[:2])
        paths = list(_leaves(row))
        path = folder / "fuzzed.jsonl"

        def take(content: bytes) -> None:
            figures["tried"] += 1
            path.write_bytes(content)
            try:
                results = Results.load(path)
                figures["read"] += 1
                results.table(), repr(results)
                compared = compare(results, results)
                figures["compared"] += 1
                compared.markdown(), json.dumps(compared.to_dict(), allow_nan=False)
            except Exception as error:
                figures["refused" if is_one_line(error) else "unclear"] += 1
                if not is_one_line(error):
                    print(f"{content[:200]!r}: {type(error).__name__}: {error}", file=sys.stderr)

        changed = st.tuples(st.sampled_from(paths), json_values | extremes).map(
            lambda one: f"{json.dumps(_changed(row, *one))}\n{json.dumps(other)}\n".encode()
        )
        schema = st.integers(-5, 5).map(
            lambda number: (json.dumps(row | {"schema": number}) + "\n").encode()
        )
        document = json_values.map(
            lambda value: json.dumps({"results": value, "metadata": value}).encode()
        )
        _fuzzed(changed | schema | document | st.binary(max_size=200), take, examples)
    return dict(figures)


def fuzzed_parameters(examples: int) -> dict[str, Any]:
    """Options of any value: checked options, or one line that names the valid values."""
    figures = Counter(tried=0, taken=0, refused=0, lost=0, unclear=0)
    words = (
        "",
        "auto",
        "base",
        "awq",
        "best",
        "fast",
        "eager/lean",
        "tiny",
        "../..",
        "/",
        "\x00",
        "😀",
    )
    values = st.sampled_from(words) | json_values
    own = set(SweepOptions.model_fields) - {"model", "batch_sizes"}
    options = st.dictionaries(st.sampled_from(sorted(own)), values, max_size=3)

    def take(drawn: tuple[Any, Any, dict[str, Any], Any]) -> None:
        model, batches, more, cards = drawn
        names = {"model": model, "batch_sizes": batches} | more
        for work in (
            lambda: [part.batches for part in SweepOptions.of(names).matrix()],
            lambda: PlanOptions.of({"cards": cards}).memory_budgets,
        ):
            figures["tried"] += 1
            try:
                work()
                figures["taken"] += 1
            except Exception as error:
                figures["refused" if is_one_line(error) else "unclear"] += 1
                if not is_one_line(error):
                    print(f"{drawn!r}: {type(error).__name__}: {error}", file=sys.stderr)

    _fuzzed(st.tuples(values, values, options, values), take, examples)
    return dict(figures)
