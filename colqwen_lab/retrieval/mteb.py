"""A loaded variant as a model of mteb 2.x (`pip install -e ".[mteb]"`).

import mteb
from colqwen_lab.retrieval.mteb import MtebModel
mteb.evaluate(MtebModel("awq"), mteb.get_tasks(tasks=["VidoreDocVQARetrieval"]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mteb.models import ModelMeta
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from colqwen_lab.errors import BadInput
from colqwen_lab.measure.environment import pick_device
from colqwen_lab.model.config import EMBED_DIM, resolve_size, resolve_variant
from colqwen_lab.model.decode import to_rgb
from colqwen_lab.model.loading import load
from colqwen_lab.model.quantize import checkpoint_of
from colqwen_lab.options import VISUAL_TOKENS
from colqwen_lab.retrieval.data import Page
from colqwen_lab.retrieval.evaluate import embed
from colqwen_lab.retrieval.metrics import maxsim, unpadded


class MtebModel:
    """Implements mteb's EncoderProtocol. Embeddings are [items, longest, 320], padded with zeros.

    Models, sizes and weights are those of `sweep`; `visual_tokens` is the budget of a page.
    `revision` is unused. Raises as `load` and `resolve_variant`.
    """

    def __init__(
        self,
        model_name: str = "awq",
        revision: str | None = None,
        *,
        device: str | None = None,
        size: str = "auto",
        weights: str = "auto",
        visual_tokens: int = VISUAL_TOKENS,
        **_: Any,
    ) -> None:
        where = torch.device(device) if device else pick_device()
        size = resolve_size(size, where.type == "cuda")
        self.loaded = load(checkpoint_of(resolve_variant(model_name), size, weights, where), where)
        self.visual_tokens = visual_tokens
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"colqwen-lab/{model_name.replace('/', '--')}-{size}",
                "revision": self.loaded.weights,
                "embed_dim": EMBED_DIM,
                "similarity_fn_name": ScoringFunction.MAX_SIM,
                "modalities": ["text", "image"],
            }
        )

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **_: Any) -> Tensor:
        """Embeddings [items, longest, 320] of all batches of a loader.

        An item with both a text and an image is embedded by its text if it is a query, else by its
        image. Raises BadInput if it has neither, or its image cannot be read.
        """
        order = ("text", "image") if prompt_type == PromptType.query else ("image", "text")
        embeddings: list[Tensor] = []
        for batch in inputs:
            rows = zip(*(batch[name] for name in order if name in batch), strict=True)
            pages = [_page(row) for row in rows]
            embeddings += embed(self.loaded, pages, self.visual_tokens)[0]
        return pad_sequence(embeddings, batch_first=True)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """MaxSim [items of embeddings1, items of embeddings2]; rows of zeros are padding."""
        return maxsim(_ragged(embeddings1), _ragged(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """MaxSim [items] of each item of embeddings1 with the same item of embeddings2."""
        pairs = zip(_ragged(embeddings1), _ragged(embeddings2), strict=True)
        return torch.cat([maxsim([ours], [theirs])[0] for ours, theirs in pairs])


def _page(row: Sequence[Any]) -> Page:
    content = next((part for part in row if part is not None), None)
    if content is None:
        raise BadInput("an item must have a text or an image, got neither")
    try:
        return content if isinstance(content, str) else to_rgb(content)
    except Exception as error:  # decoders raise anything
        raise BadInput(f"an image cannot be read: {error!s:.200}") from None


def _ragged(embeddings: Any) -> list[Tensor]:
    padded = torch.as_tensor(embeddings)
    padded = padded.reshape(-1, *padded.shape[-2:])
    return unpadded(padded, padded.any(dim=-1))
