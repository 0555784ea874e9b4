"""One model on a device: in a child process (`Remote`), or in this one (`Worker`).

A sweep asks either by `ask(name, *arguments)`. What ends a child, such as a signal or a crashed CUDA
context, is a Failure like any other, and a child ends with its parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from colqwen_lab.errors import LabError, scrubbed
from colqwen_lab.hardware import Card
from colqwen_lab.measure.memory import free, measure, set_cap
from colqwen_lab.measure.timing import Failure, measured_limits, module_times, synchronise
from colqwen_lab.model.checkpoint import Checkpoint
from colqwen_lab.model.loading import Loaded, load
from colqwen_lab.records import Backend, Limits, Memory, Stages, Workload
from colqwen_lab.runtime.batches import Batches
from colqwen_lab.runtime.eager import Steps
from colqwen_lab.runtime.fast import bucket, capture_stream, load_fast

# The longest wait for an answer: a large model loads from a slow disk, or a forward compiles.
DEADLINE_S = 1800
STAGE_STEPS = 3


def failure_of(error: Exception) -> Failure:
    """The failure of an exception: oom if the device or the host ran out of memory, else failed."""
    text = scrubbed(" ".join(str(error).split()))[:300]
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    status = "oom" if out_of_memory or "can't allocate memory" in text else "failed"
    return Failure(status, f"{type(error).__name__}: {text}")


@dataclass(frozen=True)
class Setup:
    """What a worker starts from. `batches` makes Batches of config, tokenizer, batch_size and device."""

    checkpoint: Checkpoint
    device: torch.device
    execution: str
    kernel: str
    dtype: str
    batches: Callable[..., Batches]


class Worker:
    """One model on a device, and the measurements of it. `ask` turns exceptions into failures."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.device, self.pid = setup, setup.device, os.getpid()
        self.loaded: Loaded | None = None
        self.inputs: list[Any] = []
        self.steps: dict[tuple[str, bool], Steps] = {}

    @property
    def alive(self) -> bool:
        return self.loaded is not None

    def ask(self, name: str, *arguments: Any) -> Any:
        """The answer of the method `name`, or a Failure; a LabError passes."""
        try:
            return getattr(self, name)(*arguments)
        except LabError:
            raise
        except Exception as error:
            failure = failure_of(error)
        free(self.device)  # after the exception has released its frames and their tensors
        return failure

    def end(self) -> None:
        """Release the model and everything it computed."""
        self.loaded, self.inputs = None, []
        self.rest()

    # ------------------------------------------------------------ what a sweep asks

    def cap(self, card: Card) -> tuple[int, int]:
        """`(cap, outside)` in bytes, from now on; see `memory.set_cap`. Before `load`."""
        return set_cap(card, self.device)

    def load(self) -> tuple[str, tuple[str, ...], Backend]:
        """`(weights label, names of unused tensors, backend)` of the loaded model."""
        setup = self.setup
        loader = load_fast if setup.execution == "fast" else load
        self.loaded = loaded = loader(setup.checkpoint, setup.device, setup.kernel, setup.dtype)
        return loaded.weights, loaded.unused, self._backend(loaded.engaged, {})

    def memory(self, batch_size: int, protocol: str, alone: bool) -> Memory:
        """The peak of the longest batch, which is the peak of a cycle through all batches."""
        self.inputs, self.steps = [], {}
        batches = self._batches(batch_size).inputs
        longest = max(batches, key=lambda batch: batch["input_ids"].shape[1])
        return measure(self._model, [longest], self._steps([longest], protocol), alone)

    def prepare(
        self, batch_size: int, wanted: Iterable[tuple[str, bool]]
    ) -> tuple[Workload, tuple[str, ...]]:
        """Make the batches, and the steps of each (protocol, control); returns workload and messages."""
        batches = self._batches(batch_size)
        self.inputs = batches.inputs
        self.steps = {key: self._steps(batches.inputs, key[0]) for key in wanted}
        return batches.workload, batches.messages

    def step(self, protocol: str, control: bool, warm: bool = False) -> float:
        """Seconds of the next step and its device sync; `warm`: after an untimed step of its batch."""
        step = self.steps[protocol, control]
        if warm:
            step(lead_in=True)
        synchronise(self.device)
        start = time.perf_counter()
        step()
        synchronise(self.device)
        return time.perf_counter() - start

    def stages(self, protocol: str) -> Stages:
        """Seconds of a step in the vision encoder and in the rest: medians of three steps."""
        step_s = []
        with module_times(self._model.model.vlm.model.visual, self.device) as vision_s:
            for _ in range(STAGE_STEPS):
                step_s.append(self.step(protocol, False))
        rest_s = [step - part for step, part in zip(step_s, vision_s, strict=True)]
        return Stages(
            vision_encoder_s=statistics.median(vision_s), language_model_s=statistics.median(rest_s)
        )

    def embeddings(self, protocol: str) -> np.ndarray:
        """The token embeddings of the first batch, [real tokens, 320], in float32."""
        inputs = self.inputs[0]
        step = self._steps([inputs], protocol)
        step()
        return step.output.embeddings[inputs["attention_mask"].bool()].float().cpu().numpy()

    def compile(self, batch_sizes: Sequence[int]) -> None:
        """Compile, all at once, the kernel configs that `fast` tries at these batch sizes."""
        if fast := getattr(self._model.model, "fast", None):
            rows = {m for size in batch_sizes for m in _rows(self._batches(size).inputs)}
            fast.compile(sorted(rows))

    def backend(self) -> Backend:
        """The kernels used at the longest batch, and the kernel configs of all prepared batches.

        Shorter batches have fewer rows (M), at which another kernel may be faster.
        """
        if (fast := getattr(self._model.model, "fast", None)) is None:
            return self._backend(self._model.engaged, {})
        rows = _rows(self.inputs)
        ends = tuple(f" x {m}" for m in rows)
        configs = {name: value for name, value in fast.chosen.items() if name.endswith(ends)}
        return self._backend(fast.engaged(max(rows)), configs)

    def limits(self) -> Limits:
        """What this GPU reaches now: a large GEMM and a copy."""
        # On the stream of the model's own GEMMs: cuBLAS keeps a workspace for each stream, and a
        # new one would count in later peaks.
        fast = self.setup.execution == "fast"
        with torch.cuda.stream(capture_stream() if fast else torch.cuda.current_stream()):
            return measured_limits(self.device)

    def rest(self) -> None:
        """Release steps and their outputs; the batches stay."""
        self.steps = {}
        free(self.device)

    # ------------------------------------------------------------ parts

    @property
    def _model(self) -> Loaded:
        assert self.loaded is not None
        return self.loaded

    def _backend(self, engaged: dict[str, int], kernel_configs: dict[str, str]) -> Backend:
        return Backend(
            requested=self.setup.kernel,
            engaged=engaged,
            dtype=self._model.dtype,
            requested_dtype=self.setup.dtype,
            kept_16bit=self._model.kept_16bit,
            kernel_configs=kernel_configs,
        )

    def _batches(self, batch_size: int) -> Batches:
        config, tokenizer = self._model.model.config, self._model.tokenizer
        return self.setup.batches(
            config=config, tokenizer=tokenizer, batch_size=batch_size, device=self.device
        )

    def _steps(self, inputs: list[Any], protocol: str) -> Steps:
        return Steps(self._model.model, inputs, self.setup.execution, protocol)


def _rows(inputs: Iterable[dict[str, Any]]) -> set[int]:
    """The rows (M) at which `fast` computes these batches."""
    shapes = {batch["input_ids"].shape for batch in inputs}
    return {batch_size * bucket(tokens) for batch_size, tokens in shapes}


class Remote:
    """A `Worker` in a child process. `ask` gives a Failure where the process ends or hangs."""

    def __init__(self, setup: Setup) -> None:
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            context.set_forkserver_preload(["colqwen_lab.measure.sweep"])
        self.connection, theirs = context.Pipe()
        arguments = (theirs, setup, torch.get_num_threads())
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        # A caller's script without `if __name__ == "__main__"` must not run again in the child.
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            self.process.start()
        finally:
            sys.modules["__main__"] = main
        theirs.close()
        self.alive, self.pid = True, self.process.pid

    def ask(self, name: str, *arguments: Any) -> Any:
        """The answer of the worker's method `name`, or a Failure; its LabError is raised here."""
        if not self.alive:
            return Failure("failed", "its process had ended")
        try:
            self.connection.send((name, arguments))
            if self.connection.poll(DEADLINE_S):
                answer = self.connection.recv()
            else:
                self.process.kill()
                reason = f"no answer to {name!r} within {DEADLINE_S} s; its process was ended"
                answer = Failure("failed", reason, ended=True)
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"its process ended: {_ending(self.process.exitcode)}"
            answer = Failure("failed", reason, ended=True)
        if isinstance(answer, Failure) and answer.ended:
            self.end()
        if isinstance(answer, LabError):
            raise answer
        return answer

    def end(self) -> None:
        """End the process: it ends by itself when the pipe closes, or is killed in a long step."""
        self.alive = False
        self.connection.close()
        self.process.join(2)
        self.process.kill()
        self.process.join()


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    why = ", as the system does when host memory runs out" if name == "SIGKILL" else ""
    return f"signal {-code} ({name}{why})"


def serve(connection: Any, setup: Setup, threads: int) -> None:
    """The child's side: answers until the parent closes the pipe; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if setup.device.type == "cuda":
        torch.cuda.set_device(setup.device)
    worker = Worker(setup)
    with contextlib.suppress(EOFError, OSError):  # the pipe is closed
        while True:
            name, arguments = connection.recv()
            try:
                answer = getattr(worker, name)(*arguments)
            except LabError as error:
                answer = error.with_traceback(None)
            except Exception as error:  # every outcome of a cell is a row
                answer = failure_of(error)
            if isinstance(answer, Failure):
                free(setup.device)
            connection.send(answer)


def _end_with_parent() -> None:
    """A child in a long step would outlive its parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
