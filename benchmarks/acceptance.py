"""Everything the program does, run once on this machine: one row a step, with what held.

    benchmarks/acceptance.sh OUT [--size tiny|mid|4b]

A step runs the program as a user does, in processes of its own and with a time limit. A step that
fails is a row of the table, and the next one runs. On a GPU, steps whose times do not count run
beside the making of the checkpoints; nothing runs beside a sweep of these.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
LAB = [sys.executable, "-m", "colqwen_lab"]
# All steps end within this many seconds; one that cannot start any more is a row that says so. A
# CPU gets so many times as long, and each step too.
BUDGET_S = 520
CPU_TIMES = 4
# A cell that no device here can hold: its batch size, and the virtual memory of a CPU's process.
TOO_LARGE = 32768
CPU_BYTES = 2600 * 2**20
LARGEST_ERROR_PERCENT = 1.0


@dataclass
class Row:
    """A line of the table."""

    step: str
    held: str
    seconds: float
    verdict: str  # held or failed


class Run:
    """The run's folders, its time and its rows; `verify` notes what a step found."""

    def __init__(self, out: Path, scratch: Path, size: str, cuda: bool) -> None:
        self.out, self.scratch, self.size, self.cuda = out, scratch, size, cuda
        self.start, self.rows, self.lock = time.monotonic(), dict[str, Row](), threading.Lock()
        self.about: dict[str, Any] = {}
        self.slower = 1 if cuda else CPU_TIMES
        self.base, self.awq = scratch / "base", scratch / "awq"
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return BUDGET_S * self.slower - (time.monotonic() - self.start)

    def step(self, name: str, limit_s: float, work: Callable[[Command], str]) -> None:
        """Run `work` within `limit_s`; its row says what held, or why it failed."""
        began, limit_s = time.monotonic(), min(limit_s * self.slower, self.left())
        command = Command(self, name, began + limit_s)
        try:
            if limit_s < 10:
                raise TimeoutError("not run: the time of all steps is over")
            held, verdict = work(command), "held"
        except Exception as error:
            held, verdict = f"{type(error).__name__}: {error}", "failed"
        with self.lock:
            seconds = round(time.monotonic() - began, 1)
            self.rows[name] = Row(name, " ".join(held.split()), seconds, verdict)
            print(f"[{verdict}] {name}, {seconds} s: {held}", file=sys.stderr, flush=True)
            self.write()

    def write(self) -> None:
        """The table so far, as Markdown and JSON."""
        total_s = round(time.monotonic() - self.start, 1)
        count = sum(row.verdict == "held" for row in self.rows.values())
        result = f"{count} of {len(self.rows)} steps held, in {total_s} s"
        document = self.about | {"size": self.size, "total_s": total_s, "result": result}
        rows = [asdict(row) for row in self.rows.values()]
        text = json.dumps(document | {"steps": rows}, indent=1)
        (self.out / "acceptance.json").write_text(f"{text}\n")
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        lines = ["# Acceptance", "", f"{result}. {about}, size {self.size}.", ""]
        lines += ["| step | what held | seconds | verdict |", "|---|---|---|---|"]
        for row in self.rows.values():
            cells = (row.step, row.held, row.seconds, row.verdict)
            escaped = (str(cell).replace("|", r"\|") for cell in cells)
            lines.append(f"| {' | '.join(escaped)} |")
        (self.out / "acceptance.md").write_text("\n".join([*lines, ""]))


class Command:
    """Runs the commands of a step: each in a session of its own, until the step's time is over."""

    def __init__(self, run: Run, step: str, end: float) -> None:
        self.run, self.end, self.step = run, end, step
        self.log = run.out / "logs" / f"{step.replace(' ', '-')}.txt"

    def start(self, *arguments: Any, **environment: str) -> subprocess.Popen[str]:
        words = [str(argument) for argument in arguments]
        with self.log.open("a") as log:
            print("$", *words, file=log, flush=True)
            return subprocess.Popen(
                words,
                env=os.environ | {"COLQWEN_LAB_OUTPUTS": str(self.run.scratch)} | environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=self.capped if "OMP_NUM_THREADS" in environment else None,
            )

    def capped(self) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (CPU_BYTES, CPU_BYTES))

    def wait(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """`(exit code, stdout)`; the whole session ends when the time is over."""
        try:
            stdout, _ = process.communicate(timeout=max(1.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise TimeoutError(f"time limit; last line: {self.last_line()}") from None
        with self.log.open("a") as log:
            print(stdout, file=log)
        return process.returncode, stdout

    def __call__(self, *arguments: Any, code: int = 0, **environment: str) -> str:
        """The stdout of a command that must end with `code`."""
        returned, stdout = self.wait(self.start(*arguments, **environment))
        if returned != code:
            raise RuntimeError(f"exit code {returned}; last line: {self.last_line()}")
        return stdout

    def answer(self, *arguments: Any) -> Any:
        """What this script prints last in a process of its own, read as JSON."""
        return json.loads(self(sys.executable, __file__, *arguments).strip().splitlines()[-1])

    def last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "none"


def verify(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def newest(path: Path) -> list[dict[str, Any]]:
    """The rows of a records file; of a cell that was measured again, the last one."""
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        work = row["workload"]
        key = (row["variant"], row["execution"], row["protocol"], row["backend"]["requested"])
        rows[(*key, work["kind"], work["batch_size"])] = row
    return list(rows.values())


def all_ok(rows: list[dict[str, Any]], count: int) -> None:
    bad = [row for row in rows if row["status"] != "ok"]
    verify(not bad, f"{len(bad)} of {len(rows)} cells: {bad and bad[0]['reason']}")
    verify(len(rows) == count, f"{len(rows)} cells, expected {count}")


def kernels(rows: list[dict[str, Any]]) -> str:
    """The kernels of packed weights that the rows name."""
    names = {name for row in rows for name in row["backend"]["engaged"]}
    return ", ".join(sorted(names - {"torch.nn.Linear"}))


# ---------------------------------------------------------------- the steps


def make_folder(run: Run, command: Command) -> str:
    facts = command.answer("--make", run.base, "--size", run.size)
    return "{tensors} tensors, {gib} GiB in {shards} shards, an index, {special}".format(**facts)


def quantise(run: Run, command: Command) -> str:
    needs(run.base, "folder")
    recipe = ["--iters", 0, "--samples", 8, "--seqlen", 16]
    command(*LAB, "quantize", "--weights", run.base, "--size", run.size, *recipe, "-o", run.awq)
    record = json.loads((run.awq / "colqwen_lab.json").read_text())
    errors = record["relative_error"].values()
    verify(0.05 < min(errors) <= max(errors) < 0.2, f"weight errors to {max(errors)}")
    smaller = record["source_bytes"] / record["result_bytes"]
    share = f"{len(errors)} linears, {smaller:.2f} times smaller"
    return f"W4A16, rounded: {share}, weight errors {min(errors):.3f} to {max(errors):.3f}"


def load_strictly(run: Run, command: Command) -> str:
    needs(run.base, "folder")
    facts = command.answer("--load", run.base, run.awq)
    half = run.scratch / "half"
    half.mkdir()
    for path in run.base.iterdir():
        if not path.name.endswith("00001-of-00002.safetensors"):
            os.link(path, half / path.name)
    command(*LAB, "sweep", "-m", half, "-b", 1, "-o", run.scratch / "half.jsonl", code=1)
    verify(command.last_line().startswith("colqwen-lab: "), command.last_line())
    return f"{facts}; without its first shard it is refused in one line"


def sweep(run: Run, workload: str, command: Command) -> str:
    """The executed notebook of both folders; queries in the report's and the best configuration."""
    needs(run.awq, "quantise")
    records = run.out / f"{workload}.jsonl"
    queries = workload == "queries"
    batches = {"queries": "8,64", "pages": "1,4"}[workload] if run.cuda else "1,2"
    values = {"model": f"{run.base},{run.awq}", "workload": workload, "batch_sizes": batches}
    values |= {"output": records}
    if queries:
        values["configuration"] = "report,best"
    elif not run.cuda:  # AutoRound's own choice on a CPU is not modelled
        values |= {"kernel": "torch", "visual_tokens": 128}
    parameters = [part for name, value in values.items() for part in ("-p", name, value)]
    book = run.out / f"sweep-{workload}.ipynb"
    papermill = [sys.executable, "-m", "papermill", "notebooks/sweep.ipynb", book]
    command(*papermill, "--cwd", "notebooks", "--no-progress-bar", *parameters)
    rows = newest(records)
    all_ok(rows, 2 * len(batches.split(",")) * (2 if queries else 1))
    best = max(row["items_per_s"]["median"] for row in rows)
    return f"{len(rows)} cells ok, up to {best:,.1f} {workload}/s; kernels {kernels(rows)}"


def latency(run: Run, command: Command) -> str:
    """Percentiles of the time of one query, energy and load time, of both folders."""
    needs(run.awq, "quantise")
    records, options = run.out / "latency.jsonl", ["-c", "best", "-b", 1, "--min-steps", 200]
    models = f"{run.base},{run.awq}"
    command(*LAB, "sweep", "-m", models, *options, "--max-s", 0.5, "-o", records)
    rows = newest(records)
    all_ok(rows, 2)
    parts = []
    for row in rows:
        times_ms = sorted(1000 * seconds for seconds in row["step_s"])
        verify(len(times_ms) >= 200, f"{len(times_ms)} samples")
        verify(bool(row["energy"]) == run.cuda, f"energy {row['energy']}")
        median, high = times_ms[len(times_ms) // 2], times_ms[len(times_ms) * 99 // 100]
        loading = row["loading"]["load_s"]
        parts.append(
            f"{row['variant']} p50 {median:.2f}, p99 {high:.2f} ms, loaded in {loading:.1f} s"
        )
    return "; ".join(parts)


def fidelity(run: Run, command: Command) -> str:
    needs(run.awq, "quantise")
    options = ["--size", run.size, "--weights", run.base, "--queries", 20, "--pages", 24]
    output = run.out / "fidelity.jsonl"
    command(*LAB, "fidelity", "-m", run.awq, *options, "--json", "-o", output)
    base, awq = (json.loads(line) for line in output.read_text().splitlines())
    cosine = awq["page_cosine"]["median"]
    verify(len(base["values"]["nDCG@5"]) == 20, f"{len(base['values']['nDCG@5'])} queries")
    verify(0 < cosine < 0.99999, f"median cosine {cosine} of quantised pages")
    return f"20 queries, {base['pages']} pages; median cosine of pages {cosine:.4f}"


def predicted(run: Run, command: Command) -> str:
    """Peaks of all measured rows beside their prediction."""
    files = [path for name in ("queries", "pages") if (path := run.out / f"{name}.jsonl").exists()]
    verify(bool(files), "no measured rows")
    facts = command.answer("--predict", *files)
    (run.out / "predicted.json").write_text(json.dumps(facts, indent=1) + "\n")
    missing = [row["cell"] for row in facts if row["error_percent"] is None]
    verify(not missing, f"{len(missing)} of {len(facts)} rows have no prediction: {missing[:2]}")
    worst = max(facts, key=lambda row: abs(row["error_percent"]))
    error = f"{worst['error_percent']:+.2f} % ({worst['cell']})"
    verify(abs(worst["error_percent"]) <= LARGEST_ERROR_PERCENT, f"peak error {error}")
    reserved = [row["reserved_percent"] for row in facts if row["reserved_percent"] is not None]
    more = f"; reserved {min(reserved):+.1f} to {max(reserved):+.1f} %" if reserved else ""
    return f"{len(facts)} rows, largest error of a peak {error}{more}"


def plan(run: Run, command: Command) -> str:
    options = ["-m", "base,awq", "--size", run.size, "-b", "8,64", "--card", "8,RTX 4090"]
    document = json.loads(command(*LAB, "plan", *options, "--json"))
    plans = document if isinstance(document, list) else document.get("plans", [document])
    peaks = [cell["peak_bytes"] for each in plans for cell in each["cells"]]
    verify(bool(peaks) and min(peaks) > 0, "no peaks")
    return f"{len(peaks)} peaks, {min(peaks) / 2**20:,.0f} to {max(peaks) / 2**20:,.0f} MiB"


def compile_kernels(run: Run, command: Command) -> str:
    """AutoRound's own choice for random weights; later steps find its compiled code on disk."""
    return command.answer("--load", f"random:{run.size}")


def tiny(run: Run, command: Command) -> str:
    """Size tiny from a cold cache: quantised by itself, and as a sweep's first use."""
    cold = {"COLQWEN_LAB_CACHE": str(run.scratch / "cold")}
    command(*LAB, "quantize", "--size", "tiny", "--iters", 1, "-o", run.scratch / "tiny", **cold)
    records, options = run.out / "tiny.jsonl", ["-b", "1,8", "-c", "eager/lean/auto", "-c", "best"]
    command(*LAB, "sweep", "-m", "awq", "--size", "tiny", *options, "-o", records, **cold)
    rows = newest(records)
    all_ok(rows, 4)
    return f"quantised twice, {len(rows)} cells ok; kernels {kernels(rows)}"


def out_of_memory(run: Run, command: Command) -> str:
    records, batches = run.out / "out-of-memory.jsonl", f"1,{TOO_LARGE},2"
    weights = ["--weights", "random"] if run.cuda else []
    options = ["-m", "base", "--size", run.size, *weights, "--protocol", "published"]
    cap = {} if run.cuda else {"OMP_NUM_THREADS": "1"}
    command(*LAB, "sweep", *options, "-b", batches, "--max-s", 0.5, "-o", records, **cap)
    rows = {row["workload"]["batch_size"]: row["status"] for row in newest(records)}
    verify(rows == {1: "ok", TOO_LARGE: "oom", 2: "ok"}, f"status by batch size: {rows}")
    return f"batch {TOO_LARGE:,} is oom on file, the batch after it is ok"


def killed_worker(run: Run, command: Command) -> str:
    """SIGKILL of a model's process after the first row; the sweep goes on, the next one resumes."""
    records = run.out / "killed.jsonl"
    sizes = [1, 2, 3, 4, 5, 6]
    options = ["-m", "base", "--size", "tiny", "-b", ",".join(map(str, sizes)), "--max-s", 0.5]
    options += ["--min-steps", 20, "-o", records]
    process = command.start(*LAB, "sweep", *options)
    while process.poll() is None and not (records.exists() and records.stat().st_size):
        verify(time.monotonic() < command.end, "no row in time")
        time.sleep(0.05)
    parent = psutil.Process(process.pid)
    workers = [one for child in parent.children() for one in child.children()]
    verify(bool(workers), f"no worker among {len(parent.children(recursive=True))} processes")
    for worker in workers:
        worker.kill()
    code, _ = command.wait(process)
    lines = records.read_text().splitlines()
    reasons = [row["reason"] for row in map(json.loads, lines) if row["status"] == "failed"]
    verify(code == 0 and len(lines) == len(sizes), f"exit code {code}, {len(lines)} rows")
    verify(len(reasons) == 1 and "SIGKILL" in reasons[0], f"failed cells: {reasons}")
    command(*LAB, "sweep", *options)
    verify(records.read_text().splitlines()[: len(lines)] == lines, "rows on file changed")
    all_ok(newest(records), len(sizes))
    return f"one cell failed ({reasons[0]}), {len(sizes) - 1} went on, the next run measured it"


def needs(path: Path, step: str) -> None:
    if not (path / "config.json").exists():
        raise RuntimeError(f"needs the folder of step {step}")


# ---------------------------------------------------------------- in processes of their own


def made_folder(folder: Path, size: str) -> dict[str, Any]:
    """A checkpoint in the published layout with random values: facts about what was written."""
    import torch
    from safetensors.torch import save_file

    from colqwen_lab.measure.environment import pick_device
    from colqwen_lab.model.checkpoint import RandomCheckpoint
    from colqwen_lab.model.inputs import PAD, read_tokenizer
    from colqwen_lab.model.network import empty_network

    folder.mkdir(parents=True)
    checkpoint = RandomCheckpoint(size, None, pick_device(), 0)
    expected = empty_network(checkpoint.config, torch.bfloat16).state_dict()
    half, shards, written = sum(one.nbytes for one in expected.values()) / 2, [{}, {}], 0
    for name, like in expected.items():
        shards[written > half][name] = like
        written += like.nbytes
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        values = {
            name: checkpoint.read(name, like, torch.device("cpu")) for name, like in shard.items()
        }
        save_file(values, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(values, file)
        del values
    document = {"metadata": {"total_size": written}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=1))
    config = checkpoint.config.to_dict()
    config |= {"auto_map": {"AutoModel": "modeling_colqwen3.ColQwen3"}, "dtype": "bfloat16"}
    config |= {"architectures": ["ColQwen3"]}
    rotary = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rotary.pop("rope_theta")
    config["text_config"]["rope_scaling"] = rotary
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder / "tokenizer.json", checkpoint)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    return {
        "tensors": len(index),
        "gib": round(written / 2**30, 2),
        "shards": len(shards),
        "special": f"the pad token at {tokenizer.token_to_id(PAD)}",
    }


def write_tokenizer(path: Path, checkpoint: Any) -> None:
    """Qwen's special tokens at their ids, after a small BPE of the lab's texts and unused tokens.

    Size tiny has a tokenizer of its own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from colqwen_lab.model.inputs import (
        CALIBRATION_TEXTS,
        NATURAL_QUERIES,
        QWEN_PAD_ID,
        TINY_TOKENIZER,
        queries,
        read_tokenizer,
    )

    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(str(path))
        return
    special = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end "
    special += "quad_start quad_end vision_start vision_end vision_pad image_pad video_pad"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = read_tokenizer(TINY_TOKENIZER).pre_tokenizer  # Qwen's
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    texts = [*CALIBRATION_TEXTS, *NATURAL_QUERIES, *queries("report", 10), "Describe the image."]
    tokenizer.train_from_iterator(texts, trainer)
    document = json.loads(tokenizer.to_str())
    words = document["model"]["vocab"]
    words |= {f"<unused {number}>": number for number in range(len(words), QWEN_PAD_ID)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"] = [
        {"id": QWEN_PAD_ID + place, "content": f"<|{name}|>", "special": True} | flags
        for place, name in enumerate(special.split())
    ]
    path.write_text(json.dumps(document, ensure_ascii=False))


def loaded(sources: list[str]) -> str:
    """What a strict load of each checkpoint says: kernels, linears at 16 bits, bytes."""
    from colqwen_lab.measure.environment import pick_device
    from colqwen_lab.model.checkpoint import FolderCheckpoint, RandomCheckpoint
    from colqwen_lab.model.loading import load

    device, parts = pick_device(), []
    for source in sources:
        kind, _, size = source.partition(":")
        random = kind == "random"
        checkpoint = (
            RandomCheckpoint(size, "W4A16", device, 0) if random else FolderCheckpoint(Path(source))
        )
        model = load(checkpoint, device)
        used = ", ".join(f"{count} linears on {kernel}" for kernel, count in model.engaged.items())
        parts.append(f"{Path(source).name}: {used}, {model.weights_bytes / 2**20:,.1f} MiB")
        del model
    return "; ".join(parts)


def errors_of(files: list[str]) -> list[dict[str, Any]]:
    """Each measured row beside its prediction: errors of the peak and of the reserved memory."""
    from colqwen_lab.analysis.table import Results
    from colqwen_lab.predict.plan import predictions

    cells = [cell for file in files for cell in Results.load(file) if cell.status == "ok"]
    rows = []
    for cell, twin in zip(cells, predictions(cells), strict=True):
        own, other = cell.memory, twin and twin.memory
        row: dict[str, Any] = {"cell": f"{cell.configuration} batch {cell.batch_size}"}
        row |= {"peak_bytes": own.peak_bytes, "predicted_bytes": other and other.peak_bytes}
        row["error_percent"] = other and round(100 * (other.peak_bytes / own.peak_bytes - 1), 3)
        reserved = other and own.reserved_bytes and other.reserved_bytes
        row["reserved_percent"] = reserved and round(100 * (reserved / own.reserved_bytes - 1), 2)
        rows.append(row)
    return rows


# ---------------------------------------------------------------- the run


def accept(out: Path, size: str) -> int:
    """Run every step and print the table; 0 if all held."""
    # In a process of its own: this one stays off the GPU.
    printed = subprocess.check_output([sys.executable, __file__, "--about"], text=True)
    facts = json.loads(printed.strip().splitlines()[-1])
    cuda, size = facts.pop("cuda"), size or facts.pop("size")
    with tempfile.TemporaryDirectory(prefix="acceptance-") as scratch:
        run = Run(out, Path(scratch), size, cuda)
        facts.pop("size", None)
        run.about = facts
        beside = {
            "compile": (200, compile_kernels),
            "tiny": (200, tiny),
            "killed worker": (150, killed_worker),
            "plan": (150, plan),
        }
        try:
            # A CPU runs one step at a time.
            with ThreadPoolExecutor(len(beside) if cuda else 1) as pool:
                for name, (limit_s, work) in beside.items():
                    pool.submit(run.step, name, limit_s, partial(work, run))
                if not cuda:
                    pool.shutdown()
                run.step("folder", 90, partial(make_folder, run))
                run.step("quantise", 240, partial(quantise, run))
            run.step("sweep queries", 200, partial(sweep, run, "queries"))
            run.step("sweep pages", 150, partial(sweep, run, "pages"))
            run.step("out of memory", 90, partial(out_of_memory, run))
            run.step("latency", 60, partial(latency, run))
            with ThreadPoolExecutor(3 if cuda else 1) as pool:
                pool.submit(run.step, "load", 120, partial(load_strictly, run))
                pool.submit(run.step, "predicted", 150, partial(predicted, run))
                pool.submit(run.step, "fidelity", 90, partial(fidelity, run))
        finally:
            for lock in out.glob("*.lock"):
                lock.unlink()
            run.write()
            shutil.copyfileobj((out / "acceptance.md").open(), sys.stdout)
            sys.stdout.flush()
    return int(any(row.verdict == "failed" for row in run.rows.values()))


def about() -> dict[str, Any]:
    """The device and the size for it, the versions, and the state of the code."""
    from importlib.metadata import PackageNotFoundError, version

    from colqwen_lab.measure.environment import environment, pick_device

    here = environment(pick_device())
    facts: dict[str, Any] = {"cuda": bool(here.gpu), "size": "4b" if here.gpu else "tiny"}
    facts |= {"device": here.device, "Python": here.python}
    for package in ("torch", "transformers", "auto-round", "humming-kernels"):
        with contextlib.suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts | {"code": here.code or "unknown"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", nargs="*", type=Path)
    parser.add_argument("--size", default="")
    for name in ("--make", "--load", "--predict"):
        parser.add_argument(name, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--about", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        print(json.dumps(made_folder(Path(options.make[0]), options.size)))
    elif options.load:
        print(json.dumps(loaded(options.load)))
    elif options.predict:
        print(json.dumps(errors_of(options.predict)))
    elif options.about:
        print(json.dumps(about()))
    else:
        sys.exit(accept(options.out[0], options.size))


if __name__ == "__main__":
    main()
