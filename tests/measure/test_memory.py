from __future__ import annotations

import pytest
import torch

from colqwen_lab.measure.memory import measure
from colqwen_lab.model.loading import Loaded
from colqwen_lab.records import Memory
from colqwen_lab.runtime.batches import query_batches
from colqwen_lab.runtime.eager import Steps


def peak(loaded: Loaded, batch: int, protocol: str = "lean") -> Memory:
    batches = query_batches(
        loaded.model.config, loaded.tokenizer, batch, "report", 64, torch.device("cpu")
    )
    return measure(loaded, batches.inputs, Steps(loaded.model, batches.inputs, "eager", protocol))


@pytest.mark.parametrize("protocol", ["lean", "published"])
def test_is_exact_and_repeatable(tiny: Loaded, protocol: str) -> None:
    assert len({peak(tiny, 8, protocol).peak_bytes for _ in range(3)}) == 1


def test_grows_with_the_batch_and_with_the_published_protocol(tiny: Loaded) -> None:
    peaks = [peak(tiny, batch).peak_bytes for batch in (1, 8, 64)]
    assert peaks == sorted(peaks)
    lean, published = peak(tiny, 64), peak(tiny, 64, "published")
    text = tiny.model.config.text_config
    a_cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * 64 * 19
    # Two KV caches live at the peak of the published protocol: the last step's and this one's.
    assert published.peak_bytes - lean.peak_bytes >= 1.9 * a_cache


def test_quantised_weights_take_less(tiny: Loaded, tiny_awq: Loaded) -> None:
    assert peak(tiny_awq, 1).resident_bytes < peak(tiny, 1).resident_bytes
    saved = tiny.weights_bytes - tiny_awq.weights_bytes
    linears = 589_824  # parameters of the 28 text linears at tiny
    packed = linears // 2 + linears // 128 * 2.5
    assert saved == pytest.approx(2 * linears - packed, rel=0.001)
