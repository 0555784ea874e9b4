"""One model on a device: in a child process (`Remote`), or in this one (`Worker`).

A sweep calls either by `call(name, *arguments)`. What ends a child, such as a signal or a crashed
CUDA context, is a Failure like any other. A child ends with its parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

from colqwen_lab.errors import LabError, scrubbed
from colqwen_lab.hardware import Card
from colqwen_lab.measure.memory import free, measure, set_cap
from colqwen_lab.measure.timing import Failure, measured_limits, synchronise
from colqwen_lab.model.checkpoint import Checkpoint
from colqwen_lab.model.loading import hold_unused_head, load
from colqwen_lab.records import Backend, Configuration, Limits, Memory, Stages
from colqwen_lab.runtime.batches import Batches
from colqwen_lab.runtime.eager import PROTOCOLS, Steps
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

    def end(self) -> None:
        """Release the model and everything it computed."""
        self.loaded, self.inputs, self.steps = None, [], {}
        free(self.device)

    def load(self, card: Card | None, batch_sizes: Sequence[int]) -> tuple[Any, Backend, Any]:
        """`(cap, outside)` bytes under `card`, the model's kernels, and its unused tensors.

        The kernel configs that `fast` tries at these batch sizes are compiled, all at once.
        """
        cap, c = set_cap(card, self.device) if card else (0, 0), self.configuration
        loader = load_fast if c.execution == "fast" else load
        self.loaded = loader(self.checkpoint, self.device, c.kernel, c.dtype or "bfloat16")
        if (fast := getattr(self.loaded.model, "fast", None)) and not card:
            fast.compile({m for size in batch_sizes for m in _rows(self._batches(size).inputs)})
        return cap, self.rest(), self.loaded.unused

    def measure(self, batch_size: int, protocol: str, alone: bool) -> tuple[Memory, Batches]:
        """The memory of steps of these batches, which later calls use; their tensors stay here.

        The peak of the longest batch is the peak of a cycle through all batches.
        """
        self.inputs, self.steps = [], {}
        batches = self._batches(batch_size)
        self.inputs = batches.inputs
        longest = max(self.inputs, key=lambda batch: batch["input_ids"].shape[1])
        head = PROTOCOLS[protocol].unused_head
        head_bytes = hold_unused_head(self.loaded, self.checkpoint, head)
        memory = measure(self.loaded, [longest], self._steps([longest], protocol), alone)
        memory = memory.model_copy(update={"unused_head_bytes": head_bytes})
        return memory, replace(batches, inputs=[])

    def step(self, protocol: str, control: bool, warm: bool = False) -> float:
        """Seconds of the next step and its sync; if `warm`, after an untimed one of its batch."""
        if (protocol, control) not in self.steps:
            self.steps[protocol, control] = self._steps(self.inputs, protocol)
        step = self.steps[protocol, control]
        if warm:
            step(warm_up=True)
        synchronise(self.device)
        start = time.perf_counter()
        step()
        synchronise(self.device)
        return time.perf_counter() - start

    def stages(self, protocol: str) -> Stages:
        """Seconds of a step in the vision encoder and in the rest: medians of three steps.

        A device sync before and after the encoder separates them; timed steps of a cell have none.
        """
        times: list[float] = []

        def note(*_: Any) -> None:
            synchronise(self.device)
            times.append(time.perf_counter())

        step, encoder = self._steps(self.inputs, protocol), self.loaded.model.vlm.model.visual
        with encoder.register_forward_pre_hook(note), encoder.register_forward_hook(note):
            for _ in range(STAGE_STEPS):
                note()
                step()
                note()
        start, encoding, encoded, end = np.reshape(times, (-1, 4)).T
        vision_s = float(np.median(encoded - encoding))
        rest_s = float(np.median(end - encoded + encoding - start))
        return Stages(vision_encoder_s=vision_s, language_model_s=rest_s)

    def embeddings(self, protocol: str) -> np.ndarray:
        """The token embeddings of the first batch, [real tokens, 320], in float32."""
        inputs = self.inputs[0]
        step = self._steps([inputs], protocol)
        step()
        return step.output.embeddings[inputs["attention_mask"].bool()].float().cpu().numpy()

    def rest(self) -> Backend:
        """Release steps and their outputs. The kernels used at the longest of the batches.

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
        return self.make_batches(**values, batch_size=batch_size, device=self.device)

    def _steps(self, inputs: list[Any], protocol: str) -> Steps:
        return Steps(self.loaded.model, inputs, self.configuration.execution, protocol)


def _rows(inputs: Iterable[dict[str, Any]]) -> set[int]:
    """The rows (M) at which `fast` computes these batches."""
    shapes = {batch["input_ids"].shape for batch in inputs}
    return {batch_size * bucket(tokens) for batch_size, tokens in shapes}


class Remote:
    """A `Worker` in a child process. `call` gives a Failure where the process ends or hangs."""

    def __init__(self, *arguments: Any) -> None:
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            context.set_forkserver_preload(["colqwen_lab.measure.sweep"])
        self.connection, theirs = context.Pipe()
        arguments = (theirs, torch.get_num_threads(), *arguments)
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

    def call(self, name: str, *arguments: Any) -> Any:
        """The answer of the worker's method `name`, or a Failure; its LabError is raised here."""
        if not self.alive:
            return Failure("failed", "its process had ended")
        reason = f"no answer to {name!r} within {DEADLINE_S} s; its process was ended"
        try:
            self.connection.send((name, arguments))
            if self.connection.poll(DEADLINE_S):
                answer = self.connection.recv()
                if isinstance(answer, LabError):
                    raise answer
                return answer
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"its process ended: {_ending(self.process.exitcode)}"
        self.end()
        return Failure("failed", reason, ended=True)

    def end(self) -> None:
        """Close the pipe, which ends an idle process; kill one that is in a long step."""
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


def serve(connection: Any, threads: int, *arguments: Any) -> None:
    """The child's side: answers until the pipe closes. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    worker = Worker(*arguments)
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)
    with contextlib.suppress(EOFError, OSError):  # the pipe is closed
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
