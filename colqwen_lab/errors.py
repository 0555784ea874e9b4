"""The two ways a request can end without a result; each is one line for the person who made it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from pydantic import TypeAdapter, ValidationError

P = ParamSpec("P")
R = TypeVar("R")


KINDS: dict[type, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
}
SECRETS = {
    r"(?<=//)[^/@\s]+@": "...@",
    r"\b(Bearer|Basic) \S+": r"\1 ...",
    r"\b((?:hf|api_org|gh[oprsu]|github_pat)_|(?:sk|glpat|xox[abprs])-|A[KS]IA)[\w-]{16,}": r"\1...",
    # Names hold spaces where a separator follows.
    r"[A-Za-z]:[\\/]+Users[\\/]+(?:[^\\/:*?\"<>|\n]+(?=[\\/])|[^\\/\s'\":]+)": "~",
    r"(?:/home|/Users)/[^/\\\s'\":]+(?:(?: [^/\\\s'\":]+)?(?=/))?": "~",
}


def scrubbed(text: str) -> str:
    """`text` without home folders, user names in paths, passwords and tokens: a record and a notebook travel."""
    if home := os.path.expanduser("~").rstrip("/\\"):
        text = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w-]|\.\w)", "~", text)
    for pattern, shown in SECRETS.items():
        text = re.sub(pattern, shown, text)
    return text


def printable(text: str) -> str:
    """`text` without what a terminal would obey; the ends of its lines stay."""
    return re.sub(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        "",
        text,
    )


def plain(text: str) -> str:
    """`text` on one line, without what a terminal would obey."""
    return printable(" ".join(text.split()))


def shown(text: str) -> str:
    """A line for a person: plain, scrubbed, and cut in its middle where it is very long."""
    line = scrubbed(plain(text))
    return line if len(line) <= 2000 else f"{line[:1500]} ... {line[-400:]}"


class LabError(Exception):
    """A request that cannot be served. The message is one line that says what to do."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: a notebook shows the line, not a traceback."""
        return [f"{type(self).__name__}: {self}"]


class BadInput(LabError, ValueError):
    """A wrong value. The message names the valid ones. Exit code 2."""

    exit_code = 2


class MissingRequirement(LabError, RuntimeError):
    """A need that this machine does not meet: no GPU, no weights, no network, no kernel. Exit code 1."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with every argument whose default is a bool, a number or a text held to that type.

    papermill passes "false" as a text: what reads as the type is taken as it, anything else is a BadInput.
    """
    asked = signature(function)
    several = (
        "model",
        "batch_sizes",
        "card",
        "cards",
        "base",
        "awq",
    )  # these take several forms, and check them

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = asked.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            default = asked.parameters[name].default
            if name not in several and isinstance(default, (bool, int, float, str)):
                try:
                    given.arguments[name] = TypeAdapter(type(default)).validate_python(value)
                except ValidationError:
                    valid = f"{KINDS[type(default)]}, such as {default!r}"
                    raise BadInput(f"{name} is {value!r}; valid: {valid}") from None
        return function(*given.args, **given.kwargs)

    return call


def one_of(what: str, value: str, valid: Iterable[str]) -> str:
    """`value`, if it is one of `valid`.

    Raises:
        BadInput: naming every valid value, and the nearest one if any is near.
    """
    names = list(valid)
    if isinstance(value, str) and value in names:
        return value
    near = difflib.get_close_matches(str(value).lower(), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise BadInput(f"unknown {what} {value!r}{hint}; valid: {', '.join(names)}")
