"""One step: a forward of a batch under a protocol. Measurements and predictions run this code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colqwen_lab.model.network import ColQwen3, ColQwen3Output

# Steps that reach the peak: with the published protocol, two outputs live in the second step.
STEPS = 2

Forward = Callable[[ColQwen3, dict[str, Tensor], bool], ColQwen3Output]


class Protocol(NamedTuple):
    """Whether the forward keeps a KV cache, the last output is kept during the next step, and the
    untied language-model head, which nothing calls, is in memory.
    """

    use_cache: bool
    keep_output: bool
    unused_head: bool


PROTOCOLS = {"lean": Protocol(False, False, False), "published": Protocol(True, True, True)}


def eager(model: ColQwen3, inputs: dict[str, Tensor], use_cache: bool) -> ColQwen3Output:
    """One forward of transformers: embeddings [batch, tokens, 320]."""
    return model(**inputs, use_cache=use_cache)


def fast(model: Any, inputs: dict[str, Tensor], use_cache: bool) -> ColQwen3Output:
    """One forward of `fast.py`, of a model from `load_fast`: embeddings [batch, tokens, 320]."""
    return model.fast(model, inputs, use_cache)


EXECUTIONS: dict[str, Forward] = {"eager": eager, "fast": fast}


class Steps:
    """Each call embeds a batch. `output` is kept as the protocol says."""

    def __init__(self, model: ColQwen3, execution: str = "eager", protocol: str = "lean") -> None:
        self.model = model
        self.forward, self.protocol = EXECUTIONS[execution], PROTOCOLS[protocol]
        self.output: Any = None

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> None:
        if not self.protocol.keep_output:
            self.output = None
        self.output = self.forward(self.model, batch, self.protocol.use_cache)
