from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import flop_counter

from colqwen_lab.runtime.tracking import MemoryTracker, part_of


def live_bytes(tracker: MemoryTracker) -> int:
    return sum(dict(tracker.log).values())


def test_counts_births_ends_and_the_peak() -> None:
    with MemoryTracker() as tracker:
        a = torch.zeros(1000)
        assert live_bytes(tracker) == 4000
        b = a + 1
        assert live_bytes(tracker) == 8000
        del a
        assert live_bytes(tracker) == 4000
        c = b.double()
        assert live_bytes(tracker) == tracker.peak_bytes == 12000
        del b, c
    assert live_bytes(tracker) == 0
    assert tracker.peak_bytes == 12000


def test_a_temporary_inside_an_expression_counts() -> None:
    x = torch.ones(256)
    with MemoryTracker([("x", x)]) as tracker:
        y = (x * 2 + 1).sum()
    assert live_bytes(tracker) == 1024 + 4
    assert tracker.peak_bytes == 3 * 1024
    assert float(y) == 768


def test_breakdown_is_that_of_the_peak() -> None:
    x = torch.ones(256)
    with MemoryTracker([("x", x)]) as tracker:
        y = x * 2
        tracker.label([y], "doubled")
        z = x.double()
        del y, z
        w = x + 1
    assert tracker.breakdown() == {"x": 1024, "doubled": 1024, "activations": 2048}
    assert sum(tracker.breakdown().values()) == tracker.peak_bytes
    del w


def test_hidden_tensors_take_no_memory_and_their_operations_count() -> None:
    x = torch.ones(8, 8)
    with MemoryTracker([("x", x)]) as tracker:
        tracker.hidden = True
        y = x @ x
        tracker.hidden = False
    assert tracker.peak_bytes == y.nbytes
    assert tracker.flops == 2 * 8**3


@pytest.mark.parametrize("key_heads", [1, 2, 8])
@pytest.mark.parametrize(("causal", "pairs"), [(False, 5 * 5), (True, 5 * 6 // 2)])
def test_attention_counts_every_query_head(
    key_heads: int, causal: bool, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query heads that share a key head too, which torch's own counter refuses in torch 2.11."""
    monkeypatch.delattr(flop_counter, "bmm_flop")  # which torch's own counter calls
    q, k = torch.ones(3, 8, 5, 16), torch.ones(3, key_heads, 5, 16)
    with MemoryTracker() as tracker:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, causal)
    assert tracker.flops == 2 * 3 * 8 * pairs * (16 + 16)


TEXT, VISUAL = "vlm.model.language_model", "vlm.model.visual"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (f"{TEXT}.layers.0.mlp.up_proj.qweight", "text linears: codes"),
        (f"{TEXT}.layers.0.mlp.up_proj.qzeros", "text linears: zeros"),
        (f"{TEXT}.layers.0.mlp.up_proj.g_idx", "text linears: other"),
        (f"{TEXT}.layers.0.mlp.up_proj.weight", "text linears: 16 bits"),
        (f"{TEXT}.layers.0.input_layernorm.weight", "text norms and rotary tables"),
        (f"{TEXT}.embed_tokens.weight", "embeddings"),
        (f"{VISUAL}.blocks.0.attn.qkv.weight", "vision encoder"),
        (f"{VISUAL}.deepstack_merger_list.0.norm.weight", "mergers"),
        ("embedding_proj_layer.bias", "head"),
        ("fast.layers.0.qkv.weight", "text linears: codes"),
        ("fast.layers.0.qkv.scale", "text linears: scales"),
        ("fast.layers.0.qkv.blocked", "text linears: 16 bits"),
        ("fast.layers.0.qkv.modules_.0.qweight", "text linears: codes"),
    ],
)
def test_parts_of_the_network(name: str, part: str) -> None:
    assert part_of(name) == part


def test_views_and_known_tensors_count_once() -> None:
    x = torch.zeros(100, 10)
    with MemoryTracker(("x", view) for view in (x, x.T, x[0])) as tracker:
        y = x.view(10, 100).T.unsqueeze(0)
        x.add_(1)
        assert live_bytes(tracker) == 4000
    del y


def test_sees_inside_composite_operators_and_modules() -> None:
    layer = torch.nn.Linear(64, 64)
    x = torch.ones(2, 3, 64)
    with (
        torch.no_grad(),
        MemoryTracker(("weights", t) for t in (x, *layer.parameters())) as tracker,
    ):
        y = torch.nn.functional.gelu(layer(x))
    resident = x.nbytes + sum(p.nbytes for p in layer.parameters())
    assert tracker.peak_bytes >= resident + 2 * y.nbytes
    assert live_bytes(tracker) == resident + y.nbytes


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 500)), max_size=40))
def test_agrees_with_an_account_kept_by_hand(moves: list[tuple[int, int]]) -> None:
    slots: dict[int, torch.Tensor] = {}
    expected, peak = {}, 0
    with MemoryTracker() as tracker:
        for slot, size in moves:
            if slot in slots:
                del slots[slot], expected[slot]
            else:
                slots[slot] = torch.empty(size, dtype=torch.uint8)
                expected[slot] = size
            peak = max(peak, sum(expected.values()))
            assert live_bytes(tracker) == sum(expected.values())
    assert tracker.peak_bytes == peak
