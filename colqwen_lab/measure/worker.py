"""One model and what a sweep asks of it: in a process of its own, or in this one.

`Worker` is the model; all that it takes and answers can be sent over a pipe. `Remote` asks a `Worker` in a child
process. The clock runs in the worker, around the step alone. What ends a child, a signal or a crashed CUDA context,
is an outcome like any other; a child ends with its parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch

from colqwen_lab.errors import LabError, scrubbed
from colqwen_lab.hardware import Card
from colqwen_lab.measure.cap import set_cap
from colqwen_lab.measure.limits import measured_limits
from colqwen_lab.measure.memory import free, measure
from colqwen_lab.measure.timing import time_towers, timed
from colqwen_lab.model.checkpoint import Checkpoint
from colqwen_lab.model.loading import Loaded, load
from colqwen_lab.records import Limits, Memory, Stages, Workload
from colqwen_lab.runtime.batches import Batches
from colqwen_lab.runtime.eager import Steps
from colqwen_lab.runtime.fast import bucket, capture_stream, load_fast

# The longest that one answer may take: the load of a large model over a slow disk, or the compilation of a forward.
DEADLINE_S = 1800


class Failure(Exception):
    """An outcome that is no figure: out of memory, or failed, and why. `ended` where it ended its process."""

    def __init__(self, status: str, reason: str, ended: bool = False) -> None:
        super().__init__(status, reason, ended)
        self.status, self.reason, self.ended = status, reason, ended


def failure_of(error: BaseException) -> Failure:
    """The outcome of an exception: `oom` where the device or the host ran out of memory, else `failed`."""
    if isinstance(error, Failure):
        return error.with_traceback(None)
    text = scrubbed(" ".join(str(error).split()))[:300]
    memory = (
        isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
    )
    return Failure("oom" if memory else "failed", f"{type(error).__name__}: {text}")


def attempt(work: Callable[[], Any], device: torch.device) -> Any:
    """What `work` returns, or a Failure. Its frames are let go first, then memory is freed."""
    try:
        return work()
    except LabError:
        raise
    except Exception as error:  # every outcome of a cell is a row
        outcome = failure_of(error)
    free(device)
    return outcome


@dataclass(frozen=True)
class About:
    """What a record says of a loaded model."""

    weights: str
    dtype: str
    engaged: dict[str, int]
    kept_16bit: dict[str, int]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """All that a worker starts from. `batches` makes Batches of config, tokenizer, batch_size and device."""

    source: Checkpoint
    device: torch.device
    execution: str
    backend: str
    dtype: str
    batches: Callable[..., Batches]


class Worker:
    """One model on a device. What it cannot do raises."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, setting.device
        self.loaded: Loaded | None = None
        self._let_go()

    def _let_go(self) -> None:
        self.inputs: list[Any] = []
        self.steps: dict[tuple[str, bool], Steps] = {}

    @property
    def model(self) -> Loaded:
        assert self.loaded is not None
        return self.loaded

    @property
    def alive(self) -> bool:
        return self.loaded is not None

    @property
    def pid(self) -> int:
        return os.getpid()

    def cap(self, card: Card) -> tuple[int, int]:
        """Run under the memory of `card` from here on: `cap.set_cap`. Before `load`."""
        return set_cap(card, self.device)

    def load(self) -> About:
        ask = self.setting
        how = load_fast if ask.execution == "fast" else load
        self.loaded = made = how(ask.source, ask.device, ask.backend, ask.dtype)
        return About(made.weights, made.dtype, made.engaged, made.kept_16bit, made.left_out)

    def memory(self, batch: int, protocol: str, alone: bool) -> Memory:
        """The peak of the longest batch, which a cycle through all batches meets; `alone` on the device, or not."""
        self._let_go()
        inputs = [max(self._batches(batch).inputs, key=lambda one: one["input_ids"].shape[1])]
        return measure(self.model, inputs, self._steps(inputs, protocol), alone)

    def prepare(
        self, batch: int, wanted: Iterable[tuple[str, bool]]
    ) -> tuple[Workload, tuple[str, ...]]:
        """Make the batches, and a stepper for each wanted protocol, the control's (True) apart; and what was said."""
        made = self._batches(batch)
        self.inputs = made.inputs
        self.steps = {
            (protocol, control): self._steps(made.inputs, protocol) for protocol, control in wanted
        }
        return made.workload, made.said

    def _batches(self, batch: int) -> Batches:
        config, tokenizer = self.model.model.config, self.model.tokenizer
        return self.setting.batches(
            config=config, tokenizer=tokenizer, batch_size=batch, device=self.device
        )

    def _steps(self, inputs: list[Any], protocol: str) -> Steps:
        return Steps(self.model.model, inputs, self.setting.execution, protocol)

    def turn(self, protocol: str, control: bool, lead_in: bool) -> float:
        """Seconds of the next step; with `lead_in` after the same step, thrown away."""
        return timed(self.steps[protocol, control], self.device, lead_in)

    def towers(self, protocol: str) -> Stages:
        """Seconds of a step in the vision tower and in the rest: `clock.time_towers`."""
        return time_towers(
            self.steps[protocol, False], self.model.model.vlm.model.visual, self.device
        )

    def embeddings(self, protocol: str) -> np.ndarray:
        """The token embeddings of the first batch, [real tokens, 320], in float32."""
        inputs = self.inputs[0]
        step = self._steps([inputs], protocol)
        step()
        return step.output.embeddings[inputs["attention_mask"].bool()].float().cpu().numpy()

    def compile(self, batch_sizes: Sequence[int]) -> None:
        """Have the kernels that `fast` tries at these batch sizes compiled, all at once."""
        fast = getattr(self.model.model, "fast", None)
        if fast is not None and any(product.tunable for product in fast.products()):
            fast.compile(
                sorted(
                    {rows for batch in batch_sizes for rows in _rows(self._batches(batch).inputs)}
                )
            )

    def chosen(self) -> tuple[dict[str, int], dict[str, str]]:
        """`(text linears of each kernel, schedules by product and rows)`: of the longest batch made, and of all.

        Shorter batches have fewer rows, for which another kernel may serve best.
        """
        fast = getattr(self.model.model, "fast", None)
        if fast is None:
            return self.model.engaged, {}
        rows = _rows(self.inputs)
        ends = tuple(f" x {one}" for one in rows)
        return fast.engaged(max(rows)), {
            name: one for name, one in fast.chosen.items() if name.endswith(ends)
        }

    def limits(self) -> Limits:
        # Where the model's own products run: cuBLAS keeps a workspace for each stream, and later peaks would hold it.
        fast = self.setting.execution == "fast"
        with torch.cuda.stream(capture_stream() if fast else torch.cuda.current_stream()):
            return measured_limits(self.device)

    def rest(self) -> None:
        """Let steps and their outputs go; the batches stay."""
        self.steps = {}
        free(self.device)

    def end(self) -> None:
        self.loaded = None
        self._let_go()
        free(self.device)


def _rows(inputs: Iterable[dict[str, Any]]) -> set[int]:
    """The numbers of rows at which `fast` computes these batches."""
    shapes = {one["input_ids"].shape for one in inputs}
    return {batch * bucket(tokens) for batch, tokens in shapes}


class Remote:
    """A `Worker` in a process of its own: its methods are asked over a pipe. What ends the process is a `Failure`."""

    def __init__(self, setting: Setting) -> None:
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            context.set_forkserver_preload(["colqwen_lab.measure.sweep"])
        self.connection, there = context.Pipe()
        self.process = context.Process(
            target=serve, args=(there, setting, torch.get_num_threads()), daemon=True
        )
        # A caller's script without `if __name__ == "__main__"` must not run again in the child.
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            self.process.start()
        finally:
            sys.modules["__main__"] = main
        there.close()
        self.alive = True

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._ask, name)

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def _ask(self, name: str, *arguments: Any) -> Any:
        if not self.alive:
            raise Failure("failed", "its process had ended")
        try:
            self.connection.send((name, arguments))
            if not self.connection.poll(DEADLINE_S):
                self.process.kill()
                self._lose(f"no answer to {name!r} within {DEADLINE_S} s; its process was ended")
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            self._lose(f"its process ended: {_ending(self.process.exitcode)}")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _lose(self, reason: str) -> NoReturn:
        self.end()
        raise Failure("failed", reason, ended=True)

    def end(self) -> None:
        """A worker without a parent at its pipe ends by itself; one at work on a long step is not waited for."""
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


def serve(connection: Any, setting: Setting, threads: int) -> None:
    """The child's side: answer until the parent closes the pipe; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if setting.device.type == "cuda":
        torch.cuda.set_device(setting.device)
    worker = Worker(setting)
    with contextlib.suppress(EOFError, OSError):  # the pipe is closed
        while True:
            name, arguments = connection.recv()
            try:
                answer = getattr(worker, name)(*arguments)
            except LabError as error:
                answer = error.with_traceback(None)
            except Exception as error:
                answer = failure_of(error)
            if isinstance(answer, Failure):
                free(setting.device)
            connection.send(answer)


def _end_with_parent() -> None:
    """A long step would keep a child that nobody waits for."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
