"""The sizes of ColQwen3, and the variants that are compared."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colqwen_lab.errors import BadInput, one_of

EMBED_DIM = 320


def _size(text: dict[str, Any], vision: dict[str, Any], **other: Any) -> dict[str, Any]:
    """The parts that all sizes share: one rotary base, grouped heads, the patch geometry, a 320-dimension head."""
    rotary = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_interleaved": True,
        "mrope_section": text.pop("mrope"),
    }
    return {
        "text_config": {
            "num_hidden_layers": 36,
            "head_dim": 128,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
        | {"vocab_size": 151936, "max_position_embeddings": 262144, "rope_parameters": rotary}
        | text,
        "vision_config": {
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
        }
        | {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2}
        | vision,
        "embed_dim": EMBED_DIM,
    } | other


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _size(
        text={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "vocab_size": 1536,
        }
        | {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "mrope": [6, 5, 5],
        },
        vision={"depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
        | {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1, 2]},
        # The first ids of the tokenizer in the package: its special tokens.
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=True,
    ),
    # A quarter of the 4B's depth and less than half of its width: what a CPU multiplies in seconds.
    "mid": _size(
        text={
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
        }
        | {"num_key_value_heads": 2, "mrope": [24, 20, 20]},
        vision={
            "depth": 8,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "deepstack_visual_indexes": [1, 3, 5],
        },
        tie_word_embeddings=True,
    ),
    "4b": _size(
        text={"hidden_size": 2560, "intermediate_size": 9728, "mrope": [24, 20, 20]},
        vision={
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        tie_word_embeddings=True,
    ),
    "8b": _size(
        text={"hidden_size": 4096, "intermediate_size": 12288, "mrope": [24, 20, 20]},
        vision={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        tie_word_embeddings=False,
    ),
}


def resolve_size(size: str, cuda: bool) -> str:
    """`size`, where `auto` means COLQWEN_LAB_SIZE, else 4b where there is a CUDA GPU and tiny where not.

    Raises:
        BadInput: no such size.
    """
    size = check_size(size)
    if size == "auto":
        size = check_size(os.environ.get("COLQWEN_LAB_SIZE") or "auto")
    return ("4b" if cuda else "tiny") if size == "auto" else size


def check_size(size: str) -> str:
    """`size`, if it is a known one or `auto`. Raises BadInput."""
    return one_of("size", str(size).lower(), ["auto", *SIZES])


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
                "4b": Repository(
                    "TomoroAI/tomoro-colqwen3-embed-4b", "6a32fb68598730bf5620fbf18d832c784235c59c"
                ),
                "8b": Repository(
                    "TomoroAI/tomoro-colqwen3-embed-8b", "0b9fe28142910e209bbac15b1efe85507c27644f"
                ),
            },
        ),
        Variant(
            "awq",
            "AutoRound W4A16, group 128, text tower only",
            scheme="W4A16",
            hub={
                size: Repository(
                    f"shubhamg2208/tomoro-ai-colqwen3-embed-{size}-w4a16-autoawq-seqlen-1024"
                )
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
        return Variant(
            name.upper(), f"AutoRound {name.upper()}, text tower only", scheme=name.upper()
        )
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
