"""Peak memory and operations, counted on the tensors: exact and repeatable, on any device.

The tracker notes the birth and the end of every storage that a PyTorch operator returns, fake
tensors included, with a label of its part. It does not see the scratch memory inside a kernel.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from colqwen_lab.model.loading import storage_of
from colqwen_lab.model.network import ColQwen3, is_text_linear

ACTIVATIONS = "activations"
TEXT_LINEARS = {
    **{"qweight": "codes", "scales": "scales", "scale": "scales", "qzeros": "zeros"},
    **{"weight": "16 bits", "bias": "16 bits", "blocked": "16 bits"},
}


def part_of(name: str) -> str:
    """The part of the network that a parameter or buffer of this name belongs to."""
    module, _, leaf = name.rpartition(".")
    fast = name.startswith("fast.")
    if fast or is_text_linear(module):
        # Dense GEMMs of execution fast share the storage of their linears, which come first.
        kind = "codes" if fast and leaf == "weight" else TEXT_LINEARS.get(leaf, "other")
        return f"text linears: {kind}"
    if "embed_tokens" in name:
        return "embeddings"
    if ".visual." in name:
        return "mergers" if "merger" in name else "vision encoder"
    return "head" if name.startswith("embedding_proj_layer") else "text norms and rotary tables"


def resident(model: ColQwen3) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer with its part, in the order of a checkpoint."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield part_of(name), tensor


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *dropout_causal: Any, **named: Any) -> int:
    """Operations of all pairs of positions, or of the visible half where attention is causal."""
    pairs, tokens = sdpa_flop_count(q.shape, k.shape, v.shape), q.shape[-2]
    causal = any(dropout_causal[1:]) or named.get("attn_mask") is not None
    return pairs * (tokens + 1) // (2 * tokens) if causal else pairs


# PyTorch's registry lacks the attention operator of CPU tensors.
FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
}


def breakdown_of(
    log: Sequence[tuple[int, int]], labels: Sequence[str], start: int = 0
) -> dict[str, int]:
    """Live bytes by label at the peak, the first from event `start` on; they add up to it."""
    sizes: dict[int, int] = {}
    total = peak = peak_at = 0
    for index, (number, size) in enumerate(log):
        total += size - sizes.get(number, 0)
        sizes[number] = size
        if total > peak and index >= start:
            peak, peak_at = total, index
    parts: Counter[str] = Counter()
    for number, size in dict(log[: peak_at + 1]).items():
        parts[labels[number]] += size
    return dict(+parts)


class MemoryTracker(TorchDispatchMode):
    """Counts live bytes of all storages: those of `resident` from the start, new ones as they come.

    `live_bytes` is the sum now, `peak_bytes` its maximum, `flops` the operations of all GEMMs and
    attentions so far. `log` holds each birth as (number, bytes) and each end as (number, 0), in
    order; `labels[number]` names the part. While `hidden`, new tensors take no memory.
    """

    def __init__(self, resident: Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.flops = 0
        self.log: list[tuple[int, int]] = []
        self.labels: list[str] = []
        self._numbers: dict[int, int] = {}
        self.hidden = False
        self.see(resident)

    def see(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Count existing tensors under their labels; a storage keeps its first label."""
        for label, tensor in tensors:
            storage, key, size = storage_of(tensor)
            if key in self._numbers:
                continue
            self._numbers[key] = len(self.labels)
            self.log.append((len(self.labels), size))
            self.labels.append(label)
            weakref.finalize(storage, _end, weakref.ref(self), key, size)
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def label(self, tensors: Iterable[Tensor], name: str) -> None:
        """Change the label of tensors that are counted already."""
        for tensor in tensors:
            self.labels[self._numbers[tensor.untyped_storage()._cdata]] = name

    def rewind(self, events: int, births: int) -> None:
        """Forget what came after so many events and births; `peak_bytes` stays."""
        del self.log[events:], self.labels[births:]
        self._numbers = {key: number for key, number in self._numbers.items() if number < births}
        self.flops = 0

    def breakdown(self) -> dict[str, int]:
        """Live bytes by label at the first moment of the peak; they add up to `peak_bytes`."""
        return breakdown_of(self.log, self.labels)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        if not self.hidden:
            self.see((ACTIVATIONS, leaf) for leaf in tree_iter(result) if isinstance(leaf, Tensor))
        return result


def _end(tracker: weakref.ref[MemoryTracker], key: int, size: int) -> None:
    """Note the end of a storage, unless its tracker ended before it."""
    if (alive := tracker()) is not None and key in alive._numbers:
        alive.log.append((alive._numbers.pop(key), 0))
        alive.live_bytes -= size
