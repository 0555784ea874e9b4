"""What there is to compare: BASE, its quantised children, and any folder or hub repository."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from colqwen_lab.errors import BadInput

# The integer weight-only presets of AutoRound that its GPTQ packing holds: bits, and the group size if not 128.
SCHEME = re.compile(r"W([2348])A16(?:G(32|64))?")
SCHEMES = tuple(f"W{bits}A16{group}" for bits in (2, 3, 4, 8) for group in ("", "G64", "G32"))


@dataclass(frozen=True)
class Repository:
    """A hub repository at a commit; `main` is resolved to its commit at load, and that commit recorded."""

    name: str
    revision: str = "main"


@dataclass(frozen=True)
class Variant:
    """Something to measure.

    `scheme` is its AutoRound scheme (None: 16 bits), `hub` where its weights are, by size or `any`.
    """

    name: str
    description: str
    scheme: str | None = None
    hub: dict[str, Repository] = field(default_factory=dict)
    folder: Path | None = None


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            "base",
            "the original model, 16 bits",
            hub={
                "4b": Repository("TomoroAI/tomoro-colqwen3-embed-4b", "6a32fb68598730bf5620fbf18d832c784235c59c"),
                "8b": Repository("TomoroAI/tomoro-colqwen3-embed-8b", "0b9fe28142910e209bbac15b1efe85507c27644f"),
            },
        ),
        Variant(
            "awq",
            "AutoRound W4A16, group 128, text tower only",
            scheme="W4A16",
            hub={
                size: Repository(f"shubhamg2208/tomoro-ai-colqwen3-embed-{size}-w4a16-autoawq-seqlen-1024")
                for size in ("4b", "8b")
            },
        ),
    )
}


def resolve_variant(name: str) -> Variant:
    """The variant of this name: `base`, `awq`, an AutoRound scheme such as W8A16, a folder, or a hub id OWNER/NAME.

    Raises:
        BadInput: none of these; the message names them.
    """
    if name.lower() in VARIANTS:
        return VARIANTS[name.lower()]
    if name.upper() in SCHEMES:
        return Variant(name.upper(), f"AutoRound {name.upper()}, text tower only", scheme=name.upper())
    if os.path.isdir(name):
        return Variant(Path(name).resolve().name, "a checkpoint folder", folder=Path(name))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        return Variant(name, "a hub repository", hub={"any": Repository(name)})
    raise BadInput(
        f"unknown model {name!r}; valid: {', '.join(VARIANTS)}, an AutoRound scheme ({SCHEMES[0]} ... {SCHEMES[-1]}), "
        "a folder that holds a checkpoint, or a hub id OWNER/NAME"
    )


def scheme_parts(scheme: str) -> tuple[int, int]:
    """`(bits, group size)` of a scheme, for example (4, 128) of W4A16.

    Raises:
        BadInput: no such scheme.
    """
    match = SCHEME.fullmatch(scheme)
    if not match:
        raise BadInput(f"unknown scheme {scheme!r}; valid: {', '.join(SCHEMES)}")
    return int(match[1]), int(match[2] or 128)
