from __future__ import annotations

import gc
import weakref

import pytest
import torch

from colqwen_lab.model.loading import Loaded
from colqwen_lab.runtime.batches import query_batches
from colqwen_lab.runtime.eager import Steps


@pytest.fixture
def batch(tiny: Loaded) -> dict[str, torch.Tensor]:
    batches = query_batches(tiny.model.config, tiny.tokenizer, 4, "report", 8, torch.device("cpu"))
    return batches.inputs[0]


def test_lean_frees_the_last_output_before_the_next_step(
    tiny: Loaded, batch: dict[str, torch.Tensor]
) -> None:
    alive_during_step = {}
    for protocol in ("lean", "published"):
        step = Steps(tiny.model, "eager", protocol)
        step(batch)
        assert not step.output.embeddings.requires_grad
        previous = weakref.ref(step.output.embeddings.untyped_storage())
        forward = step.forward

        def watched(
            *args: object, p: str = protocol, r: weakref.ref = previous, f: object = forward
        ) -> object:
            gc.collect()
            alive_during_step[p] = r() is not None
            return f(*args)  # type: ignore[operator]

        step.forward = watched  # type: ignore[assignment]
        step(batch)
    assert alive_during_step == {"lean": False, "published": True}


def test_only_the_published_protocol_keeps_a_kv_cache(
    tiny: Loaded, batch: dict[str, torch.Tensor]
) -> None:
    caches = {}
    for protocol in ("lean", "published"):
        step = Steps(tiny.model, "eager", protocol)
        step(batch)
        caches[protocol] = step.output.past_key_values
    assert caches["lean"] is None
    assert caches["published"].get_seq_length() == 17
