"""The sizes of ColQwen3, as the keyword arguments of its configuration.

`4b` and `8b` are the published networks (Qwen3-VL-4B and -8B with a head of 320 dimensions; see the config.json of
TomoroAI/tomoro-colqwen3-embed-4b and -8b). `tiny` has every part of them, deepstack, 3-D rotary positions, vision
tower, grouped heads, at dimensions that a group of 128 divides, for a machine with no GPU; `mid` lies between, with
random weights only, to time kernels on a CPU.
"""

from __future__ import annotations

import os
from typing import Any

from colqwen_lab.errors import one_of

EMBED_DIM = 320


def _size(text: dict[str, Any], vision: dict[str, Any], **other: Any) -> dict[str, Any]:
    """The parts that all sizes share: one rotary base, grouped heads, the patch geometry, a 320-dimension head."""
    rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": text.pop("mrope")}
    return {
        "text_config": {"num_hidden_layers": 36, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"vocab_size": 151936, "max_position_embeddings": 262144, "rope_parameters": rotary}
        | text,
        "vision_config": {"num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": text["hidden_size"]}
        | {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2}
        | vision,
        "embed_dim": EMBED_DIM,
    } | other


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _size(
        text={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32, "vocab_size": 1536}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "mrope": [6, 5, 5]},
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
        text={"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 8}
        | {"num_key_value_heads": 2, "mrope": [24, 20, 20]},
        vision={"depth": 8, "hidden_size": 512, "intermediate_size": 2048, "deepstack_visual_indexes": [1, 3, 5]},
        tie_word_embeddings=True,
    ),
    "4b": _size(
        text={"hidden_size": 2560, "intermediate_size": 9728, "mrope": [24, 20, 20]},
        vision={"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
        tie_word_embeddings=True,
    ),
    "8b": _size(
        text={"hidden_size": 4096, "intermediate_size": 12288, "mrope": [24, 20, 20]},
        vision={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
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
