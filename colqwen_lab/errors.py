"""The two ways a request can fail, each one line for a person; and text that is safe to print."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

SECRETS = {
    r"(?<=//)[^/@\s]+@": "...@",
    r"\b(Bearer|Basic) \S+": r"\1 ...",
    r"\b((?:hf|api_org|gh[oprsu]|github_pat)_|(?:sk|glpat|xox[abprs])-|A[KS]IA)[\w-]{16,}": (
        r"\1..."
    ),
    # Names hold spaces where a separator follows.
    r"[A-Za-z]:[\\/]+Users[\\/]+(?:[^\\/:*?\"<>|\n]+(?=[\\/])|[^\\/\s'\":]+)": "~",
    r"(?:/home|/Users)/[^/\\\s'\":]+(?:(?: [^/\\\s'\":]+)?(?=/))?": "~",
}
# Also what turns the direction of writing, and what takes no place; joiners are part of words.
CONTROL = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)


def scrubbed(text: str) -> str:
    """`text` without home folders, user names, passwords and tokens."""
    if home := os.path.expanduser("~").rstrip("/\\"):
        text = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w-]|\.\w)", "~", text)
    for pattern, replacement in SECRETS.items():
        text = re.sub(pattern, replacement, text)
    return text


def printable(text: str) -> str:
    """`text` without control characters that a terminal would obey; line ends stay."""
    return CONTROL.sub("", text)


def plain(text: str) -> str:
    """`text` on one line, without control characters."""
    return printable(" ".join(text.split()))


def shown(text: str) -> str:
    """One printable line without secrets; a very long one is cut in the middle."""
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
    """A wrong value; the message names the valid ones. Exit code 2."""

    exit_code = 2


class MissingRequirement(LabError, RuntimeError):
    """This machine lacks a GPU, weights, the network or a kernel. Exit code 1."""


def one_of(what: str, value: str, valid: Iterable[str]) -> str:
    """`value`, if it is one of `valid`; else BadInput with the valid values and the nearest one."""
    names = list(valid)
    if isinstance(value, str) and value in names:
        return value
    raise unknown(what, value, names)


def unknown(what: str, value: object, valid: Iterable[str]) -> BadInput:
    """The error for a value that is none of `valid`: these, and the nearest of them."""
    names = list(valid)
    near = difflib.get_close_matches(str(value).lower(), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return BadInput(f"unknown {what} {value!r}{hint}; valid: {', '.join(names)}")


def ambiguous(word: str, meaning: str) -> BadInput:
    """The error for a word of the program that is also the name of a file or folder here."""
    path = f"{word!r} is {meaning}, and a file or folder here has this name"
    return BadInput(f"{path}; write ./{word} for it, or run in another folder")
