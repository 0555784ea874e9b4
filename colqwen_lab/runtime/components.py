"""The parts of the network that a ledger of bytes names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from colqwen_lab.model.network import ColQwen3, is_text_linear

PACKED = {
    "qweight": "text linears: codes",
    "scales": "text linears: scales",
    "qzeros": "text linears: zeros",
}
FAST_PARTS = PACKED | {
    "weight": PACKED["qweight"],
    "scale": PACKED["scales"],
    "blocked": "text linears: 16 bits",
}


def component(name: str) -> str:
    """The part that a parameter or buffer of this name belongs to."""
    module, _, leaf = name.rpartition(".")
    if name.startswith(
        "fast."
    ):  # products of execution fast; 16-bit ones share the storage of their linears
        return FAST_PARTS.get(leaf, "text linears: other")
    if is_text_linear(module):
        return PACKED.get(
            leaf, "text linears: 16 bits" if leaf in ("weight", "bias") else "text linears: other"
        )
    if "embed_tokens" in name:
        return "embeddings"
    if "merger" in name:
        return "mergers"
    if ".visual." in name:
        return "vision tower"
    return "head" if name.startswith("embedding_proj_layer") else "text norms and rotary tables"


def resident(model: ColQwen3) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer with its part, in the order of a checkpoint."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield component(name), tensor
