"""The two ways a request can end without a result; each is one line for the person who made it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LabError(Exception):
    """A request that cannot be served. The message is one line that says what to do."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: a notebook shows the line, not a traceback."""
        return [f"{type(self).__name__}: {self}"]


class BadInput(LabError, ValueError):
    """A wrong value. The message names the valid ones. Exit code 2."""

    exit_code = 2


class Unmet(LabError, RuntimeError):
    """A need that this machine does not meet: no GPU, no weights, no network, no kernel. Exit code 1."""


def one_of(what: str, value: str, valid: Iterable[str]) -> str:
    """`value`, if it is one of `valid`.

    Raises:
        BadInput: naming every valid value, and the nearest one if any is near.
    """
    names = list(valid)
    if value in names:
        return value
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise BadInput(f"unknown {what} {value!r}{hint}; valid: {', '.join(names)}")
