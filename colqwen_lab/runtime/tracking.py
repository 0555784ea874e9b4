"""Memory told from the tensors themselves, for a device that keeps no statistics or is not there: exact, repeatable.

Every storage that an operation makes is noted at its birth and at its end, with a label of what it is. It sees what
PyTorch's operators return (fake tensors included), not the scratch memory inside a kernel. Beside it the operations of
every matrix product and attention are counted, by PyTorch's own formulas.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from colqwen_lab.model.loading import storage_of

ACTIVATIONS = "activations"


def _attention_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    **more: Any,
) -> int:
    """All pairs of positions, or where attention is causal (said so, or by a mask) the half that may be seen."""
    pairs = sdpa_flop_count(query.shape, key.shape, value.shape)
    tokens = query.shape[-2]
    return (
        pairs * (tokens + 1) // (2 * tokens)
        if causal or more.get("attn_mask") is not None
        else pairs
    )


# The operator that attention is on CPU tensors; PyTorch's registry knows only those of GPUs.
FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
}


def ledger_of(
    log: Sequence[tuple[int, int]], labels: Sequence[str], peak_bytes: int
) -> dict[str, int]:
    """Live bytes by label at the first moment when they are `peak_bytes`."""
    live: dict[int, int] = {}
    total = 0
    for number, size in log:
        total += size - live.pop(number, 0)
        if size:
            live[number] = size
        if total == peak_bytes:
            break
    parts: Counter[str] = Counter()
    for number, size in live.items():
        parts[labels[number]] += size
    return dict(parts)


class MemoryTracker(TorchDispatchMode):
    """Counts live bytes of all storages: those of `resident` from the start, those of new tensors as they come.

    `live_bytes` is the sum now, `peak_bytes` its maximum, `flops` the operations so far. `log` holds every birth as
    (number, bytes) and every end as (number, 0), in order; `labels` what each number is.
    """

    def __init__(self, resident: Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.flops = 0
        self.log: list[tuple[int, int]] = []
        self.labels: list[str] = []
        self._numbers: dict[int, int] = {}
        self._blind = False
        self.see(resident)

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def see(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Count tensors that were there before, each with its label; one that is counted already keeps its own."""
        for label, tensor in tensors:
            self._see(tensor, label)

    def rewind(self, events: int, births: int) -> None:
        """Forget what was noted after so many events and births; `peak_bytes` stays."""
        del self.log[events:], self.labels[births:]
        self._numbers = {key: number for key, number in self._numbers.items() if number < births}
        self.flops = 0

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What is made meanwhile takes no memory; its operations count."""
        self._blind = True
        yield
        self._blind = False

    def label(self, tensors: Iterable[Tensor], name: str) -> None:
        """Say what tensors that were seen before are."""
        for tensor in tensors:
            self.labels[self._numbers[tensor.untyped_storage()._cdata]] = name

    def ledger(self) -> dict[str, int]:
        """Live bytes by label at the first moment of the peak; they add up to `peak_bytes`."""
        return ledger_of(self.log, self.labels, self.peak_bytes)

    def _see(self, tensor: Tensor, label: str = ACTIVATIONS) -> None:
        storage, key, size = storage_of(tensor)
        if key in self._numbers:
            return
        number = len(self.labels)
        self._numbers[key] = number
        self.labels.append(label)
        self.log.append((number, size))
        weakref.finalize(storage, _forget, weakref.ref(self), key, size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and not self._blind:
                self._see(leaf)
        return result


def _forget(tracker: weakref.ref[MemoryTracker], key: int, size: int) -> None:
    """Note the end of a storage, unless its tracker ended before it."""
    if (alive := tracker()) is not None and key in alive._numbers:
        alive.log.append((alive._numbers.pop(key), 0))
        alive.live_bytes -= size
