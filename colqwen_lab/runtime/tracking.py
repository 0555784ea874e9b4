"""Peak memory and operations, counted on the tensors: exact and repeatable, on any device.

The tracker notes the birth and the end of every storage that a PyTorch operator returns, fake
tensors included, with a label of its part. It does not see the scratch memory inside a kernel.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from colqwen_lab.model.loading import storage_of
from colqwen_lab.model.network import UNUSED_HEAD, ColQwen3, is_text_linear

ACTIVATIONS = "activations"
# Parts of a text linear by the last word of a tensor's name, and other parts by any text in it.
TEXT_LINEARS = {"qweight": "codes", "scales": "scales", "scale": "scales", "qzeros": "zeros"}
TEXT_LINEARS |= dict.fromkeys(("weight", "bias", "blocked"), "16 bits")
PARTS = {
    "embed_tokens": "embeddings",
    "merger": "mergers",
    ".visual.": "vision encoder",
    "embedding_proj_layer": "head",
    UNUSED_HEAD: "unused lm_head",
    "": "text norms and rotary tables",
}


def part_of(name: str) -> str:
    """The part of the network that a parameter or buffer of this name belongs to."""
    module, _, leaf = name.rpartition(".")
    fast = name.startswith("fast.")
    if fast or is_text_linear(module):
        # Dense GEMMs of execution fast share the storage of their linears, which come first.
        kind = "codes" if fast and leaf == "weight" else TEXT_LINEARS.get(leaf, "other")
        return f"text linears: {kind}"
    return next(part for text, part in PARTS.items() if text in name)


def resident(model: ColQwen3) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer with its part, in the order of a checkpoint."""
    named = (*model.named_parameters(), *model.named_buffers())
    return [(part_of(name), tensor) for name, tensor in named]


def _attention_flops(
    q: Tensor, k: Tensor, v: Tensor, _: float = 0, causal: bool = False, **named: Any
) -> int:
    """Operations of all pairs of positions, or of the visible half where attention is causal.

    Each query head counts, however many share a key head (torch 2.11's helper refuses these).
    """
    tokens = q.shape[-2]
    pairs = 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    masked = causal or named.get("attn_mask") is not None
    return pairs * (tokens + 1) // (2 * tokens) if masked else pairs


# PyTorch's registry lacks the attention operator of CPU tensors.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLOPS = flop_registry | {CPU_ATTENTION: _attention_flops}


def breakdown_of(
    log: Sequence[tuple[int, int]], labels: Sequence[str], start: int = 0
) -> dict[str, int]:
    """Live bytes by label at the peak, the first from event `start` on; they add up to it."""
    births = dict(reversed(log))
    totals = [*accumulate(size or -births[number] for number, size in log)]
    peak_at = max(range(start, len(log)), key=totals.__getitem__, default=0)
    parts: Counter[str] = Counter()
    for number, size in dict(log[: peak_at + 1]).items():
        parts[labels[number]] += size
    return dict(+parts)


class Mark(NamedTuple):
    """A moment: the events, births and operations so far."""

    events: int
    births: int
    flops: int


class MemoryTracker(TorchDispatchMode):
    """Counts live bytes of all storages: those of `resident` from the start, new ones as they come.

    `log` holds each birth as (number, bytes) and each end as (number, 0), in order;
    `labels[number]` names the part; `flops` are the operations of all GEMMs and attentions so far.
    While `hidden`, new tensors take no memory. `marks` say where the layers of a pass begin.
    """

    def __init__(self, resident: Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__()
        self.log: list[tuple[int, int]] = []
        self.labels: list[str] = []
        self.marks: list[Mark] = []
        self.flops, self.hidden = 0, False
        self._numbers: dict[int, int] = {}
        self.see(resident)

    @property
    def peak_bytes(self) -> int:
        return sum(self.breakdown().values())

    def breakdown(self) -> dict[str, int]:
        """Live bytes by label at the first moment of the peak."""
        return breakdown_of(self.log, self.labels)

    def see(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Count existing tensors under their labels; a storage keeps its first label."""
        for label, tensor in tensors:
            storage, key, size = storage_of(tensor)
            if key not in self._numbers:
                self._numbers[key] = len(self.labels)
                self.log.append((len(self.labels), size))
                self.labels.append(label)
                weakref.finalize(storage, _end, weakref.proxy(self), key)

    def mark(self, *_: Any) -> None:
        """Note where a layer begins; a forward hook too."""
        self.marks.append(Mark(len(self.log), len(self.labels), self.flops))

    def label(self, tensors: Iterable[Tensor], name: str) -> None:
        """Change the label of tensors that are counted already."""
        for tensor in tensors:
            self.labels[self._numbers[storage_of(tensor)[1]]] = name

    def rewind(self, to: Mark) -> None:
        """Forget what came after a mark."""
        events, births, self.flops = to
        del self.log[events:], self.labels[births:]
        self.marks = [mark for mark in self.marks if mark.births < births]
        self._numbers = {key: number for key, number in self._numbers.items() if number < births}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if count := FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        if not self.hidden:
            self.see((ACTIVATIONS, leaf) for leaf in tree_iter(result) if isinstance(leaf, Tensor))
        return result


def _end(tracker: MemoryTracker, key: int) -> None:
    """Note the end of a storage, unless its tracker has ended or forgotten it."""
    with suppress(ReferenceError, KeyError):
        tracker.log.append((tracker._numbers.pop(key), 0))
