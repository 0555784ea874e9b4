"""What happens to a batch: one forward under a protocol. A measurement and a prediction run this same code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colqwen_lab.model.network import ColQwen3, ColQwen3Output

# Of a peak: with the published protocol the second step runs while the first one's output lives.
STEPS = 2

Forward = Callable[[ColQwen3, dict[str, Tensor], bool], ColQwen3Output]


@dataclass(frozen=True)
class Protocol:
    """`use_cache`: the forward keeps the KV cache; `keep_output`: the last output lives while the next step runs."""

    use_cache: bool
    keep_output: bool


PROTOCOLS = {
    "lean": Protocol(use_cache=False, keep_output=False),
    "published": Protocol(True, True),
}


def eager(model: ColQwen3, inputs: dict[str, Tensor], use_cache: bool) -> ColQwen3Output:
    """The forward as transformers writes it, mask and all."""
    return model(**inputs, use_cache=use_cache)


def fast(model: ColQwen3, inputs: dict[str, Tensor], use_cache: bool) -> ColQwen3Output:
    """The forward of `fast.py`, for a model that `fast.load_fast` made ready."""
    forward: Any = model.fast
    return forward(model, inputs, use_cache)


EXECUTIONS: dict[str, Forward] = {"eager": eager, "fast": fast}


class Steps:
    """Calling it embeds the next batch, batches in turn, and holds the output as the protocol says.

    With `lead_in` it stays at that batch.
    """

    def __init__(
        self,
        model: ColQwen3,
        inputs: Sequence[dict[str, Tensor]],
        execution: str = "eager",
        protocol: str = "lean",
    ) -> None:
        self.model, self.inputs = model, inputs
        self.forward, self.protocol = EXECUTIONS[execution], PROTOCOLS[protocol]
        self.count = 0
        self.output: Any = None

    @torch.no_grad()
    def __call__(self, lead_in: bool = False) -> None:
        if not self.protocol.keep_output:
            self.output = None
        batch = self.inputs[self.count % len(self.inputs)]
        self.count += not lead_in
        self.output = self.forward(self.model, batch, self.protocol.use_cache)
