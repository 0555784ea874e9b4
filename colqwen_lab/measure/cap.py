"""A smaller card on a bigger GPU: torch runs under the card's memory, and the largest batch is found by trying."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.hardware import Card
from colqwen_lab.measure.interference import others_on
from colqwen_lab.measure.timing import synchronise

# Runs near the edge fail later by fragmentation, so the batch that is reported stays this share below the edge.
MARGIN = 0.05
VERIFIED_RUNS = 3
SEARCHED_TO = 4096
METHOD = "cap on torch's memory, doubling and bisection, 5 % margin, run again"


def set_cap(card: Card, device: torch.device) -> tuple[int, int]:
    """`(cap, outside)` in bytes: torch may take `cap`, the card's usable memory less what lies outside torch here.

    Set before the model loads. Outside torch is measured after a first product, which loads the libraries.

    Raises:
        MissingRequirement: no CUDA GPU, one smaller than the card, or one that others use, whose memory would count as outside.
    """
    if device.type != "cuda":
        raise MissingRequirement(
            "a card's memory is a cap on a CUDA GPU, and there is none here; `colqwen-lab plan` predicts it"
        )
    if others_on(device, {os.getpid()}):
        raise MissingRequirement(
            "other processes are on this GPU, and their memory would count as this one's; end them first"
        )
    square = torch.ones(256, 256, device=device)
    (square @ square).sum().item()
    synchronise(device)
    unused, total = torch.cuda.mem_get_info(device)
    outside = total - unused - torch.cuda.memory_reserved(device)
    cap = card.usable_bytes - outside
    if not 0 < cap <= total - outside:
        raise MissingRequirement(
            f"a {card.name} card has more memory than this GPU, or less than its context; name a smaller card"
        )
    torch.cuda.set_per_process_memory_fraction(cap / total, device)
    return cap, outside


def largest_running(runs: Callable[[int], bool], limit: int = SEARCHED_TO) -> int:
    """The largest batch up to `limit` that runs, by doubling and then bisection to the margin; 0 if not even one."""
    works, fails = 0, limit + 1
    batch = 1
    while batch <= limit and batch < fails:
        if runs(batch):
            works, batch = batch, min(2 * batch, limit) if batch < limit else limit + 1
        else:
            fails = batch
    while fails - works > max(1, MARGIN / 2 * works):
        middle = (works + fails) // 2
        works, fails = (middle, fails) if runs(middle) else (works, middle)
    return works
