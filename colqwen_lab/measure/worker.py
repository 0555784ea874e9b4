"""One model on a device: in a child process (`Remote`), or in this one (`Worker`).

A sweep calls either by `call(name, *arguments)`. What ends a child, such as a signal or a crashed
CUDA context, is a Failure like any other. A child ends with its parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch

from colqwen_lab.errors import LabError, plain, scrubbed
from colqwen_lab.hardware import Card
from colqwen_lab.measure.environment import energy_j
from colqwen_lab.measure.memory import free, measure, set_cap
from colqwen_lab.measure.timing import Failure, measured_limits, synchronise
from colqwen_lab.model.checkpoint import Checkpoint
from colqwen_lab.model.loading import hold_unused_head, load
from colqwen_lab.records import (
    Backend,
    Configuration,
    EndToEnd,
    Energy,
    Limits,
    Loading,
    Memory,
    Stages,
)
from colqwen_lab.retrieval.index import Format, Index, write_shard
from colqwen_lab.runtime.batches import Batches
from colqwen_lab.runtime.eager import PROTOCOLS, Steps
from colqwen_lab.runtime.fast import bucket, capture_stream, load_fast, page_shapes
from colqwen_lab.runtime.pipeline import Pipeline
from colqwen_lab.signals import STOPPING, listen

# The longest wait for an answer: a large model loads from a slow disk, or a forward compiles.
DEADLINE_S = 1800
# Seconds of the energy pass, and the most batches that it repeats. The driver updates its counter
# ten times a second.
ENERGY_S, ENERGY_BATCHES = 1.5, 8
STAGE_STEPS = 3
# The path of a socket has 107 bytes at most; its own name takes the rest.
LONGEST_PLACE = 64


def failure_of(error: Exception) -> Failure:
    """The failure of an exception: oom if the device or the host ran out of memory, else failed."""
    text = scrubbed(" ".join(str(error).split()))[:300]
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    status = "oom" if out_of_memory or "can't allocate memory" in text else "failed"
    return Failure(status, f"{type(error).__name__}: {text}")


@dataclass
class Worker:
    """One model on a device, and the measurements of it.

    `make_batches` makes Batches of config, tokenizer, batch_size and device.
    """

    checkpoint: Checkpoint
    device: torch.device
    configuration: Configuration
    make_batches: Callable[..., Batches]
    loaded: Any = None
    inputs: list[Any] = field(default_factory=list)
    steps: dict[tuple[str, bool], Steps] = field(default_factory=dict)
    load_s: float = 0.0
    first_step_s: float = 0.0
    asked: tuple[Any, ...] = ()
    alive: bool = True
    pid: int | None = None  # this process

    def call(self, name: str, *arguments: Any) -> Any:
        """The answer of the method `name`, or a Failure; a LabError passes."""
        try:
            return getattr(self, name)(*arguments)
        except LabError:
            raise
        except Exception as error:
            failure = failure_of(error)
        free(self.device)  # after the exception has released its frames and their tensors
        return failure

    def ask(self, name: str, *arguments: Any) -> None:
        """Keep a question; `answer` runs it."""
        self.asked = name, *arguments

    def answer(self) -> Any:
        """The answer to what was asked, as `call` gives it."""
        return self.call(*self.asked)

    def end(self) -> None:
        """Release the model and everything it computed."""
        self.loaded, self.inputs, self.steps = None, [], {}
        free(self.device)

    def load(self, card: Card | None, batch_sizes: Sequence[int]) -> tuple[Any, Backend, Any]:
        """Load the model: `((cap, outside) bytes under card, its kernels, its unused tensors)`.

        What `fast` needs for these batch sizes is compiled: here, because models load at the same
        time and are measured one after the other.
        """
        start = time.perf_counter()
        cap, c = set_cap(card, self.device) if card else (0, 0), self.configuration
        loader = load_fast if c.execution == "fast" else load
        self.loaded = loader(self.checkpoint, self.device, c.kernel, c.dtype or "bfloat16")
        if (fast := getattr(self.loaded.model, "fast", None)) and not card:
            rows, first = set[int](), dict[str, Any]()
            for size in sorted(batch_sizes):
                batches = self.call("_batches", size)
                if isinstance(batches, Failure):  # `measure` gives its cell the reason
                    break
                rows |= _rows(batches.inputs)
                first = first or batches.inputs[0]
                del batches  # those of the next size come
            fast.compile(rows)
            if first and self.device.type == "cuda":
                with contextlib.suppress(torch.OutOfMemoryError):  # other models load beside it
                    fast.warm_up(self._placed(first))
                free(self.device)
        self.load_s = time.perf_counter() - start
        return cap, self.rest(), self.loaded.unused

    def measure(self, batch_size: int, protocol: str, alone: bool) -> tuple[Memory, Batches]:
        """`(memory, batches without tensors)`: bytes of the worst batch; tensors stay here.

        A batch of each shape is measured: long rows, large pages or padding may make it the worst.
        """
        self.inputs, self.steps = [], {}
        batches = self._batches(batch_size)
        self.inputs = batches.inputs
        head = PROTOCOLS[protocol].unused_head
        head_bytes = hold_unused_head(self.loaded, self.checkpoint, head)
        if not self.first_step_s:
            self.first_step_s = self.step(protocol, False, 0)
            self.steps = {}
            free(self.device)
        figures = []
        for batch in dict(zip(batches.workload.shapes, self.inputs, strict=True)).values():
            steps = self._steps(protocol)
            figures.append(measure(self.loaded, self._placed(batch), steps, alone))
        worst = max(figures, key=lambda memory: memory.peak_bytes)
        worst = worst.model_copy(update={"unused_head_bytes": head_bytes})
        return worst, replace(batches, inputs=[])

    def step(self, protocol: str, control: bool, number: int, warm: bool = False) -> float:
        """Seconds of a step of batch `number` and its sync; if `warm`, after an untimed one."""
        if (protocol, control) not in self.steps:
            self.steps[protocol, control] = self._steps(protocol)
        step, batch = self.steps[protocol, control], self._placed(self.inputs[number])
        if warm:
            step(batch)
        synchronise(self.device)
        start = time.perf_counter()
        step(batch)
        synchronise(self.device)
        return time.perf_counter() - start

    def loading(self) -> Loading:
        """Seconds from weights to the first result."""
        return Loading(load_s=self.load_s, first_step_s=self.first_step_s)

    def stages(self, protocol: str) -> Stages:
        """Seconds of a step in the vision encoder and in the rest, as a mean over the batches.

        Of each batch the median of three steps counts. A device sync before and after the encoder
        separates them; timed steps of a cell have none.
        """
        times: list[float] = []

        def note(*_: Any) -> None:
            synchronise(self.device)
            times.append(time.perf_counter())

        step, model = self._steps(protocol), self.loaded.model
        encoder = model.fast.vision if hasattr(model, "fast") else model.vlm.model.visual
        with encoder.register_forward_pre_hook(note), encoder.register_forward_hook(note):
            medians = []
            for batch in map(self._placed, self.inputs):
                steps = []
                for _ in range(STAGE_STEPS):
                    times.clear()
                    note()
                    step(batch)
                    note()
                    start, *encoding, end = times  # `fast` encodes images of unlike grids apart
                    encoder_s = sum(encoding[1::2]) - sum(encoding[::2])
                    steps.append((encoder_s, end - start - encoder_s))
                medians.append(np.median(steps, axis=0))
        vision_s, rest_s = np.mean(medians, axis=0).tolist()
        return Stages(vision_encoder_s=vision_s, language_model_s=rest_s)

    def end_to_end(
        self, files: Sequence[Path], visual_tokens: int, protocol: str, loaders: Sequence[int]
    ) -> list[EndToEnd]:
        """Every page of the files embedded and stored, once for each number of loaders."""
        batch_size, steps = len(self.inputs[0]["input_ids"]), self._steps(protocol)
        pipeline = Pipeline(self.loaded, steps, self.device, batch_size, visual_tokens)
        with stored() as store:
            stages = pipeline.stages(files, store)
        runs = []
        for number in loaders:
            with stored() as store:
                pages, seconds = pipeline.run(files, number, store)
            about: dict[str, Any] = {"on_device": self.device.type == "cuda", **stages}
            runs.append(EndToEnd(loaders=number, pages=pages, seconds=seconds, **about))
        return runs

    def energy(self, protocol: str, idle_w: float) -> Energy | None:
        """Joules an item over a second of steps; None where the driver has no counter."""
        if energy_j(self.device) is None:
            return None
        self.steps, step = {}, self._steps(protocol)
        batches = [self._placed(batch) for batch in self.inputs[:ENERGY_BATCHES]]
        synchronise(self.device)
        start_j, start, items = energy_j(self.device) or 0.0, time.perf_counter(), 0
        while time.perf_counter() - start < ENERGY_S:
            for batch in batches:
                step(batch)
                items += len(batch["input_ids"])
            synchronise(self.device)
        seconds, joules = time.perf_counter() - start, (energy_j(self.device) or 0.0) - start_j
        return Energy(joules_per_item=joules / items, seconds=seconds, idle_w=idle_w)

    def embeddings(self, protocol: str) -> np.ndarray:
        """The token embeddings of the first batch, [real tokens, 320], in float32."""
        batch, step = self._placed(self.inputs[0]), self._steps(protocol)
        step(batch)
        return step.output.embeddings[batch["attention_mask"].bool()].float().cpu().numpy()

    def rest(self) -> Backend:
        """Release steps and outputs; the Backend: text linears on each kernel at the longest batch.

        Shorter batches have fewer rows (M), at which another kernel may be faster; the kernel
        configs are of all batches.
        """
        self.steps = {}
        free(self.device)
        loaded, c, configs = self.loaded, self.configuration, {}
        engaged, rows = loaded.engaged, _rows(self.inputs)
        if (fast := getattr(loaded.model, "fast", None)) and rows:
            ends = tuple(f" x {m}" for m in rows)
            configs = {name: value for name, value in fast.chosen.items() if name.endswith(ends)}
            engaged = fast.engaged(max(rows))
        return Backend(
            requested=c.kernel,
            engaged=engaged,
            dtype=loaded.dtype,
            requested_dtype=c.dtype,
            kept_16bit=loaded.kept_16bit,
            kernel_configs=configs,
        )

    def limits(self) -> Limits:
        """What this GPU reaches now: a large GEMM and a copy."""
        # On the stream of the model's own GEMMs: cuBLAS keeps a workspace for each stream, and a
        # new one would count in later peaks.
        fast = self.configuration.execution == "fast"
        with torch.cuda.stream(capture_stream() if fast else torch.cuda.current_stream()):
            limits = measured_limits(self.device)
        free(self.device)
        return limits

    def _batches(self, batch_size: int) -> Batches:
        values = {"config": self.loaded.model.config, "tokenizer": self.loaded.tokenizer}
        return self.make_batches(**values, batch_size=batch_size, device=torch.device("cpu"))

    def _placed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`batch` on the device, where batches that wait would count in the peak."""
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _steps(self, protocol: str) -> Steps:
        return Steps(self.loaded.model, self.configuration.execution, protocol)


@contextlib.contextmanager
def stored() -> Iterator[Callable[[Sequence[int], Sequence[torch.Tensor]], Any]]:
    """A function that adds the vectors of pages to an index in a folder that is removed."""
    shards = count()
    with tempfile.TemporaryDirectory(prefix="lab-index-") as folder:
        yield lambda numbers, vectors: write_shard(
            Path(folder), next(shards), Index.build(Format(), vectors, list(map(str, numbers)))
        )


def _rows(inputs: Iterable[dict[str, Any]]) -> set[int]:
    """The rows (M) at which `fast` computes these batches."""
    rows = set()
    for batch in inputs:
        if "pixel_values" in batch:
            parts = (batch[n] for n in ("attention_mask", "mm_token_type_ids", "image_grid_thw"))
            rows |= {(last - first) * shape.tokens for shape, first, last in page_shapes(*parts)}
        else:
            batch_size, tokens = batch["input_ids"].shape
            rows.add(batch_size * bucket(tokens))
    return rows


class Remote:
    """A `Worker` in a child process. `call` gives a Failure where the process ends or hangs."""

    def __init__(self, *arguments: Any) -> None:
        kind = "forkserver" if hasattr(os, "O_PATH") else "spawn"
        context: Any = multiprocessing.get_context(kind)
        self.connection, theirs = context.Pipe()
        # The child reads the rest from the pipe, where what goes wrong has a reason.
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        # A caller's script without `if __name__ == "__main__"` must not run again in the child.
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            if kind == "forkserver":
                _start_server(context)
            self.log_start = os.fstat(_log()).st_size
            self.process.start()
        except KeyboardInterrupt:
            _stop_server()  # it may import libraries for seconds yet
            raise
        finally:
            sys.modules["__main__"] = main
        theirs.close()
        self.alive, self.pid, self.asked = True, self.process.pid, ""
        with contextlib.suppress(OSError):  # `answer` says why it ended
            self.connection.send((torch.get_num_threads(), *arguments))

    def call(self, name: str, *arguments: Any) -> Any:
        """The answer of the worker's method `name`, or a Failure; its LabError is raised here."""
        self.ask(name, *arguments)
        return self.answer()

    def ask(self, name: str, *arguments: Any) -> None:
        """Have the worker's method `name` run; `answer` waits for it."""
        self.asked = name
        with contextlib.suppress(OSError):  # `answer` says why the process ended
            self.connection.send((name, arguments))

    def answer(self) -> Any:
        """The answer to what was asked, as `call` gives it."""
        if not self.alive:
            return Failure("failed", "its process had ended")
        reason = f"no answer to {self.asked!r} within {DEADLINE_S} s; its process was ended"
        try:
            if self.connection.poll(DEADLINE_S):
                answer = self.connection.recv()
                if isinstance(answer, LabError):
                    raise answer
                return answer
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"its process ended: {_ending(self.process.exitcode)}{self._last_words()}"
        self.end()
        return Failure("failed", reason, ended=True)

    def end(self) -> None:
        """Close the pipe, which ends an idle process; kill one that is in a long step.

        Processes that it started, such as compilers, end with it.
        """
        self.alive, own = False, []
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self.pid).children(recursive=True)
        self.connection.close()
        self.process.join(2)
        self.process.kill()
        self.process.join()
        for process in own:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(own, timeout=2)

    def _last_words(self) -> str:
        """The line of an error that workers last wrote on stderr."""
        text = os.pread(_log(), 100_000, max(self.log_start, os.fstat(_log()).st_size - 100_000))
        lines = list(filter(str.strip, text.decode(errors="replace").splitlines()))
        errors = [line for line in lines if re.search("error|what()|abort", line, re.IGNORECASE)]
        return "".join(f": {scrubbed(plain(line))[:300]}" for line in (errors or lines)[-1:])


@cache
def _log() -> int:
    """The descriptor of a file without a name, which takes what workers write on stderr."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _start_server(context: Any) -> None:
    """Start the server that forks workers, once: deaf to signals, with a stderr of its own.

    It imports the libraries for seconds, and what it prints names folders of this machine.
    """
    context.set_forkserver_preload(["colqwen_lab.measure.sweep"])
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    config: Any = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    places = (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")
    short = (place for place in places if len(os.fsencode(place)) <= LONGEST_PLACE)
    place = next((place for place in short if os.access(place, os.W_OK | os.X_OK)), os.curdir)
    before, stderr = config.get("tempdir"), os.dup(2)
    try:
        with tempfile.TemporaryDirectory(prefix="lab-", dir=place) as config["tempdir"]:
            os.dup2(_log(), 2)
            resource_tracker.ensure_running()  # unblocks signals
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # the server inherits it
            forkserver.ensure_running()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if (path := server._forkserver_address) and not path.startswith("/proc/"):
                # The socket stays reachable when its folder is gone.
                server._forkserver_address = f"/proc/self/fd/{os.open(path, os.O_PATH)}"
    finally:
        config["tempdir"] = before
        os.dup2(stderr, 2)
        os.close(stderr)


def _stop_server() -> None:
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid:
        os.kill(server._forkserver_pid, signal.SIGKILL)


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    why = ", as the system does when host memory runs out" if name == "SIGKILL" else ""
    return f"signal {-code} ({name}{why})"


def serve(connection: Any) -> None:
    """The child's side: answers until the pipe closes. Signals are the parent's to handle."""
    listen(lambda *_: None)
    os.dup2(2, 1)  # the parent's stdout is for results
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the pipe is closed
        threads, *arguments = connection.recv()
        torch.set_num_threads(threads)
        worker = Worker(*arguments)
        if worker.device.type == "cuda":
            torch.cuda.set_device(worker.device)
        while True:
            name, arguments = connection.recv()
            # Not by Worker.call: the stack from lab.sweep to the forward stays at ten frames.
            try:
                answer = getattr(worker, name)(*arguments)
            except LabError as error:
                answer = error.with_traceback(None)
            except Exception as error:
                answer = failure_of(error)
            if isinstance(answer, Failure):
                free(worker.device)
            connection.send(answer)


def _end_with_parent() -> None:
    """A child in a long step would outlive its parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
