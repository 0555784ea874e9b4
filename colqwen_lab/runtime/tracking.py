"""Memory of a device that keeps no statistics, told from the tensors themselves: exact and repeatable.

Every storage that an operation makes is counted from its birth to its end. It sees what PyTorch's operators return
(fake tensors included), not the scratch memory inside a kernel.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryTracker(TorchDispatchMode):
    """Counts live bytes of all storages: those of `resident` from the start, those of new tensors as they come.

    `live_bytes` is the sum now, `peak_bytes` its maximum since `reset_peak`.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, Any] = {}
        for tensor in resident:
            self._see(tensor)

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._forget, key, size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live_bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result
