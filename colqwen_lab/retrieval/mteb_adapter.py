"""A loaded variant as a model of mteb 2.x (`pip install -e ".[mteb]"`): its tasks, this lab's weights and scores.

import mteb
from colqwen_lab.retrieval.mteb_adapter import MtebModel
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
from colqwen_lab.model.inputs import VISUAL_TOKENS, decoding, to_rgb
from colqwen_lab.model.loading import load
from colqwen_lab.model.quantize import checkpoint_of
from colqwen_lab.retrieval.data import Page
from colqwen_lab.retrieval.embed import embed_pages
from colqwen_lab.retrieval.maxsim import maxsim, unpadded


class MtebModel:
    """Satisfies mteb's EncoderProtocol. Embeddings travel as [items, longest, 320], zero at padding.

    Args:
        model_name: base, awq, an AutoRound scheme, a folder, a hub id.
        revision: not used; the weights' own is in `mteb_model_meta`.
        device: cpu, cuda, ...; by default the GPU where there is one.
        size: auto, tiny, mid, 4b, 8b.
        weights: auto, hub, random, or a checkpoint folder.
        visual_tokens: the budget of a page.

    Raises:
        BadInput: an unknown model or size.
        MissingRequirement: no weights, or no kernel for them, here.
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
        named = {
            "name": f"colqwen-lab/{model_name.replace('/', '--')}-{size}",
            "revision": self.loaded.weights,
        }
        known = {
            "embed_dim": EMBED_DIM,
            "similarity_fn_name": ScoringFunction.MAX_SIM,
            "modalities": ["text", "image"],
        }
        self.mteb_model_meta = ModelMeta.create_empty(named | known)

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **_: Any) -> Tensor:
        """Embeddings [items, longest, 320] of a loader's batches: of an item with both a query's text, else the image.

        Raises:
            BadInput: an item with neither, or an image that cannot be read.
        """
        order = ("text", "image") if prompt_type == PromptType.query else ("image", "text")
        found: list[Tensor] = []
        for batch in inputs:
            rows = zip(*(batch[name] for name in order if name in batch), strict=True)
            found += embed_pages(self.loaded, [_page(row) for row in rows], self.visual_tokens)[0]
        return pad_sequence(found, batch_first=True)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """MaxSim [items of the first, items of the second]; a row of zeros is padding."""
        return maxsim(_ragged(embeddings1), _ragged(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """MaxSim [items] of each item of the first with the same of the second."""
        pairs = zip(_ragged(embeddings1), _ragged(embeddings2), strict=True)
        return torch.cat([maxsim([ours], [theirs])[0] for ours, theirs in pairs])


def _page(row: Sequence[Any]) -> Page:
    for item in row:
        if isinstance(item, str):
            return item
        if item is not None:
            with decoding("an image"):
                return to_rgb(item)
    raise BadInput("an item has neither text nor image; valid: a task of texts, images, or both")


def _ragged(embeddings: Any) -> list[Tensor]:
    padded = torch.as_tensor(embeddings)
    padded = padded if padded.ndim == 3 else padded.unsqueeze(0)
    return unpadded(padded, padded.any(dim=-1))
