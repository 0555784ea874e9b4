"""Ctrl-C and SIGTERM: a program ends in one line; other callers keep their own handlers."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM)
received: list[int] = []


def end(line: str, code: int = 0) -> NoReturn:
    """End the program with a line on stderr: 130 after Ctrl-C, 143 after SIGTERM, or `code`."""
    listen(signal.SIG_IGN)
    print(line, file=sys.stderr)
    sys.exit(code or 128 + (received or [signal.SIGINT])[-1])


def interrupt(number: int, _: Any) -> None:
    """Either signal becomes a KeyboardInterrupt, so that everything is cleaned up."""
    received.append(number)
    raise KeyboardInterrupt


def _end_now(number: int, _: Any) -> None:
    os.write(2, b"colqwen-lab: stopped\n")
    os._exit(128 + number)


def listen(handler: Any) -> None:
    """Handle both signals by `handler`."""
    for number in STOPPING:
        signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Both signals wait until the block ends. Only the main thread receives them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {n: signal.signal(n, lambda n, _: waiting.append(n)) for n in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


# While the program imports its libraries there is nothing to clean up.
if os.path.basename("".join(sys.orig_argv[1:2])) == "colqwen-lab" or (
    sys.argv[0] == "-m" and "colqwen_lab" in sys.orig_argv
):
    listen(_end_now)
