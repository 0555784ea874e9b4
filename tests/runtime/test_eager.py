from __future__ import annotations

import gc
import weakref

import torch

from colqwen_lab.model.loading import Loaded
from colqwen_lab.runtime.batches import query_batches
from colqwen_lab.runtime.eager import Steps


def steps(tiny: Loaded, protocol: str) -> Steps:
    made = query_batches(tiny.model.config, tiny.tokenizer, 4, "report", 8, torch.device("cpu"))
    return Steps(tiny.model, made.inputs, "eager", protocol)


def test_batches_are_cycled(tiny: Loaded) -> None:
    step = steps(tiny, "lean")
    seen = []
    for _ in range(3):
        step()
        seen.append(step.output.embeddings)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    for warm_up in (True, False):
        step(warm_up=warm_up)
        assert torch.equal(step.output.embeddings, seen[1])
    assert not seen[0].requires_grad


def test_lean_frees_the_last_output_before_the_next_step(tiny: Loaded) -> None:
    alive_during_step = {}
    for protocol in ("lean", "published"):
        step = steps(tiny, protocol)
        step()
        previous = weakref.ref(step.output.embeddings.untyped_storage())
        forward = step.forward

        def watched(
            *args: object, p: str = protocol, r: weakref.ref = previous, f: object = forward
        ) -> object:
            gc.collect()
            alive_during_step[p] = r() is not None
            return f(*args)  # type: ignore[operator]

        step.forward = watched  # type: ignore[assignment]
        step()
    assert alive_during_step == {"lean": False, "published": True}


def test_only_the_published_protocol_keeps_a_kv_cache(tiny: Loaded) -> None:
    caches = {}
    for protocol in ("lean", "published"):
        step = steps(tiny, protocol)
        step()
        caches[protocol] = step.output.past_key_values
    assert caches["lean"] is None
    assert caches["published"].get_seq_length() == 17
