"""ColQwen3 on transformers' Qwen3-VL: a linear head gives one unit vector of 320 values per token.

Modules are named as in the published checkpoints (`vlm.model.language_model.*`,
`vlm.model.visual.*`, `embedding_proj_layer.*`), so these load unchanged and no remote code runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import Cache, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel
from transformers.utils import ModelOutput

from colqwen_lab.model.config import EMBED_DIM, SIZES

TEXT_LAYERS = "vlm.model.language_model.layers"
# A language-model head that the forward never calls. The publisher's code loads it; it takes memory
# where it is not tied to the embeddings, as in the 8B.
UNUSED_HEAD = "vlm.lm_head.weight"


class ColQwen3Config(Qwen3VLConfig):
    """The published configuration: Qwen3-VL's, and the width of an embedding."""

    model_type = "colqwen3"
    text_config: Any = None
    vision_config: Any = None
    embed_dim: int = EMBED_DIM
    padding_side: str = "left"
    # The default of the transformers that wrote the published folders, which leave it out.
    tie_word_embeddings: bool = True

    @classmethod
    def of_size(cls, size: str) -> ColQwen3Config:
        return cls(**SIZES[size])


@dataclass
class ColQwen3Output(ModelOutput):
    """`embeddings` [batch, tokens, 320], zero at padding; `past_key_values` with `use_cache`."""

    embeddings: Tensor | None = None
    past_key_values: Cache | None = None


class ColQwen3(Qwen3VLPreTrainedModel):
    """Late-interaction embedding model: one L2-normalised vector of 320 values per token.

    Source: the hub code of TomoroAI/tomoro-colqwen3-embed-4b, written again over Qwen3VLModel.
    """

    config: ColQwen3Config
    config_class = ColQwen3Config
    # With an empty prefix AutoRound saves a checkpoint without the head.
    base_model_prefix = "vlm"

    def __init__(self, config: ColQwen3Config) -> None:
        super().__init__(config)
        # The published names start with `vlm.model`.
        self.vlm: Any = nn.ModuleDict({"model": Qwen3VLModel(config)})
        self.embedding_proj_layer = nn.Linear(config.text_config.hidden_size, config.embed_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.model.language_model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        **images: Any,
    ) -> ColQwen3Output:
        """Embeddings of a batch of queries or pages, from the arguments that `inputs` makes.

        `use_cache` keeps the KV cache, as the published protocol does.
        """
        outputs = self.vlm.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **images
        )
        # No name for the head's result: it would stay in memory during the next operation.
        embeddings = nn.functional.normalize(
            self.embedding_proj_layer(outputs.last_hidden_state), dim=-1
        )
        if attention_mask is not None:
            embeddings = embeddings * attention_mask.unsqueeze(-1)
        return ColQwen3Output(embeddings=embeddings, past_key_values=outputs.past_key_values)


def empty_network(config: ColQwen3Config, dtype: torch.dtype) -> ColQwen3:
    """The network on the meta device, except its rotary buffers, which are real and float32."""
    with init_empty_weights(include_buffers=False):
        model = ColQwen3(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def unused_head_shape(config: ColQwen3Config) -> tuple[int, int] | None:
    """The shape of the language-model head; None if it is tied to the embeddings."""
    text = config.text_config
    return None if config.tie_word_embeddings else (text.vocab_size, text.hidden_size)


def is_text_linear(name: str) -> bool:
    """Whether a module's name is a linear of the language model; only these are quantised."""
    return name.startswith(TEXT_LAYERS) and name.rsplit(".", 1)[-1].endswith("_proj")
