"""The sizes of ColQwen3 and the variants that are compared. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from colqwen_lab.errors import BadInput, one_of

EMBED_DIM = 320
TEXT_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
VISION_KEYS = ("hidden_size", "intermediate_size", "depth", "num_heads")


def _size(
    text: Sequence[int],
    vision: Sequence[int],
    deepstack: list[int],
    mrope: Sequence[int] = (24, 20, 20),
    vocabulary: int = 151936,
    positions: int = 262144,
    vision_positions: int = 2304,
    **other: Any,
) -> dict[str, Any]:
    """A configuration from the values of TEXT_KEYS and VISION_KEYS."""
    rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    return {
        "text_config": dict(zip(TEXT_KEYS, text, strict=True))
        | {"vocab_size": vocabulary, "max_position_embeddings": positions}
        | {"rope_parameters": rotary | {"mrope_section": list(mrope)}},
        "vision_config": dict(zip(VISION_KEYS, vision, strict=True))
        | {"num_position_embeddings": vision_positions, "out_hidden_size": text[0]}
        | {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2}
        | {"deepstack_visual_indexes": deepstack},
        "embed_dim": EMBED_DIM,
        "tie_word_embeddings": True,
        **other,
    }


# The first ids of the packaged tokenizer are its special tokens.
TINY_IDS = {
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "image_token_id": 5,
    "video_token_id": 6,
}
SIZES = {
    "tiny": _size(
        (128, 256, 4, 4, 2, 32), (64, 128, 4, 4), [0, 1, 2], (6, 5, 5), 1536, 4096, 256, **TINY_IDS
    ),
    # A quarter of the 4B's depth and less than half of its width: a CPU runs it in seconds.
    "mid": _size((1024, 3072, 8, 8, 2, 128), (512, 2048, 8, 16), [1, 3, 5]),
    "4b": _size((2560, 9728, 36, 32, 8, 128), (1024, 4096, 24, 16), [5, 11, 17]),
    "8b": _size(
        (4096, 12288, 36, 32, 8, 128), (1152, 4304, 27, 16), [8, 16, 24], tie_word_embeddings=False
    ),
}


def resolve_size(size: str, cuda: bool) -> str:
    """The size's name; `auto` is COLQWEN_LAB_SIZE, else 4b with CUDA, tiny without."""
    size = check_size(size)
    if size == "auto":
        size = check_size(os.environ.get("COLQWEN_LAB_SIZE") or "auto")
    return ("4b" if cuda else "tiny") if size == "auto" else size


def check_size(size: str) -> str:
    """The size's name in lower case, or `auto`. Raises BadInput."""
    return one_of("size", str(size).lower(), ["auto", *SIZES])


# The integer weight-only presets of AutoRound that its GPTQ packing holds.
SCHEMES = tuple(f"W{bits}A16{group}" for bits in (2, 3, 4, 8) for group in ("", "G64", "G32"))


def scheme_parts(scheme: str) -> tuple[int, int]:
    """`(bits, group size)` of a scheme: (4, 128) for W4A16. Raises BadInput: an unknown scheme."""
    bits, _, group = one_of("scheme", scheme, SCHEMES)[1:].partition("A16")
    return int(bits), int(group.removeprefix("G") or 128)


class Repository(NamedTuple):
    """A hub repository at a revision; `main` is resolved to a commit at load."""

    name: str
    revision: str = "main"


@dataclass(frozen=True)
class Variant:
    """A model to measure.

    `scheme` is its AutoRound scheme, None for 16 bits. `hub` holds repositories by size or `any`.
    """

    name: str
    description: str
    scheme: str | None = None
    hub: dict[str, Repository] = field(default_factory=dict)
    folder: Path | None = None


AWQ_REPOSITORY = "shubhamg2208/tomoro-ai-colqwen3-embed-{}-w4a16-autoawq-seqlen-1024"
VARIANTS = {
    "base": Variant(
        "base",
        "the original model, 16 bits",
        hub={
            "4b": Repository(
                "TomoroAI/tomoro-colqwen3-embed-4b", "6a32fb68598730bf5620fbf18d832c784235c59c"
            ),
            "8b": Repository(
                "TomoroAI/tomoro-colqwen3-embed-8b", "0b9fe28142910e209bbac15b1efe85507c27644f"
            ),
        },
    ),
    "awq": Variant(
        "awq",
        "AutoRound W4A16, group 128, language model only",
        scheme="W4A16",
        hub={size: Repository(AWQ_REPOSITORY.format(size)) for size in ("4b", "8b")},
    ),
}


def resolve_variant(name: str) -> Variant:
    """The variant `base`, `awq`, a scheme such as W8A16, a folder or a hub id. Raises BadInput."""
    scheme = name.upper()
    if name.lower() in VARIANTS:
        return VARIANTS[name.lower()]
    if scheme in SCHEMES:
        return Variant(scheme, f"AutoRound {scheme}, language model only", scheme)
    if os.path.isdir(name):
        return Variant(Path(name).resolve().name, "a checkpoint folder", folder=Path(name))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        return Variant(name, "a hub repository", hub={"any": Repository(name)})
    raise BadInput(
        f"model must be {', '.join(VARIANTS)}, a scheme ({SCHEMES[0]} to {SCHEMES[-1]}), "
        f"a checkpoint folder or a hub id OWNER/NAME, got {name!r}"
    )
