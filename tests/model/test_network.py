from __future__ import annotations

import pytest
import torch
from transformers import Qwen3VLModel

from colqwen_lab.model.config import SIZES, resolve_size
from colqwen_lab.model.network import (
    ColQwen3,
    ColQwen3Config,
    empty_network,
    is_text_linear,
    unused_head_shape,
)

MIB = 2**20


@pytest.fixture(scope="module")
def model() -> ColQwen3:
    """In float32 with weights large enough that every part shows in the result."""
    torch.manual_seed(0)
    model = ColQwen3(ColQwen3Config.of_size("tiny")).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)
    model.embedding_proj_layer.bias.normal_()
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(7, 1536, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def page(model: ColQwen3) -> dict[str, torch.Tensor]:
    """One page of 4 x 6 patches, so 2 x 3 visual tokens, after two words and before three."""
    tokens = torch.tensor([[20, 3, *[model.config.image_token_id] * 6, 4, 21, 22]])
    pixels = torch.randn(24, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(2))
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "mm_token_type_ids": (tokens == model.config.image_token_id).int(),
    }


def test_parameter_counts_are_the_published_ones() -> None:
    networks = {size: empty_network(ColQwen3Config.of_size(size), torch.bfloat16) for size in SIZES}
    count = {
        size: sum(parameter.numel() for parameter in network.parameters())
        for size, network in networks.items()
    }
    assert count["4b"] == 4_438_635_328
    # 16,724.46 MiB with the unused head of 1,187 MiB; source: the project's facts.
    assert count["8b"] * 2 / MIB + 151936 * 4096 * 2 / MIB == pytest.approx(16_724.46, abs=0.01)
    assert count["tiny"] * 2 <= 3_000_000


def test_parts_of_the_4b() -> None:
    model = empty_network(ColQwen3Config.of_size("4b"), torch.bfloat16)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    linears = {
        name: size for name, size in sizes.items() if is_text_linear(name.removesuffix(".weight"))
    }
    assert len(linears) == 252
    assert sum(linears.values()) == 3_633_315_840
    assert sizes["vlm.model.language_model.embed_tokens.weight"] == 388_956_160
    assert sum(size for name, size in sizes.items() if "merger" in name) == 109_105_152
    assert sizes["embedding_proj_layer.weight"] + sizes["embedding_proj_layer.bias"] == 819_520
    assert {name.split(".")[0] for name in sizes} == {"vlm", "embedding_proj_layer"}
    buffers = dict(model.named_buffers())
    assert all(
        buffer.dtype == torch.float32 for name, buffer in buffers.items() if "inv_freq" in name
    )


def test_tiny_has_every_part_of_the_real_one() -> None:
    config = ColQwen3Config.of_size("tiny")
    text, vision = config.text_config, config.vision_config
    assert len(vision.deepstack_visual_indexes) == 3
    assert text.num_attention_heads > text.num_key_value_heads
    assert sum(text.rope_parameters["mrope_section"]) * 2 == text.head_dim
    assert text.hidden_size % 128 == 0
    assert text.intermediate_size % 128 == 0


def test_embeddings_are_unit_vectors_and_zero_at_padding(model: ColQwen3) -> None:
    tokens = ids(3, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    output = model(tokens, mask)
    assert output.embeddings.shape == (3, 9, 320)
    norms = output.embeddings.norm(dim=-1)
    torch.testing.assert_close(norms, mask.float())
    assert output.past_key_values is None


def test_kv_cache_only_if_asked(model: ColQwen3) -> None:
    assert model(ids(2, 5), use_cache=True).past_key_values.get_seq_length() == 5


def test_left_padding_changes_nothing(model: ColQwen3) -> None:
    tokens = ids(1, 8)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 8])
    torch.testing.assert_close(
        model(padded, mask).embeddings[:, 5:], model(tokens).embeddings, atol=2e-5, rtol=0
    )


def test_attention_is_causal(model: ColQwen3) -> None:
    tokens = ids(1, 8)
    changed = tokens.clone()
    changed[0, -1] += 1
    before, after = model(tokens).embeddings, model(changed).embeddings
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-3)


def test_equals_qwen3_vl_with_a_head(model: ColQwen3, page: dict[str, torch.Tensor]) -> None:
    inner = Qwen3VLModel(model.config).eval()
    inner.load_state_dict(model.vlm.model.state_dict())
    hidden = inner(**page, use_cache=False).last_hidden_state
    head = hidden @ model.embedding_proj_layer.weight.T + model.embedding_proj_layer.bias
    torch.testing.assert_close(model(**page).embeddings, head / head.norm(dim=-1, keepdim=True))


def test_images_need_their_token_types(model: ColQwen3, page: dict[str, torch.Tensor]) -> None:
    del page["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        model(**page)


def test_deepstack_and_three_dimensional_positions_reach_the_result(
    model: ColQwen3, page: dict[str, torch.Tensor]
) -> None:
    before = model(**page).embeddings
    turned = model(**page | {"image_grid_thw": torch.tensor([[1, 6, 4]])}).embeddings
    assert (before - turned).abs().max() > 1e-3
    merger = model.vlm.model.visual.deepstack_merger_list[1]
    kept = merger.linear_fc2.weight.clone()
    merger.linear_fc2.weight.zero_()
    without = model(**page).embeddings
    merger.linear_fc2.weight.copy_(kept)
    assert (before - without)[:, 2:8].abs().max() > 1e-3


def test_resolve_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLQWEN_LAB_SIZE", raising=False)
    assert resolve_size("auto", cuda=False) == "tiny"
    assert resolve_size("auto", cuda=True) == "4b"
    assert resolve_size("8b", cuda=False) == "8b"
    monkeypatch.setenv("COLQWEN_LAB_SIZE", "8b")
    assert resolve_size("auto", cuda=False) == "8b"
    monkeypatch.setenv("COLQWEN_LAB_SIZE", "5b")
    with pytest.raises(ValueError, match=r"COLQWEN_LAB_SIZE '5b'.*auto, tiny, mid, 4b, 8b"):
        resolve_size("auto", cuda=False)


def test_only_the_8b_has_an_untied_head() -> None:
    """Published folders leave out what their transformers took as the default: tied."""
    configs = {size: ColQwen3Config.of_size(size) for size in SIZES}
    heads = {size: unused_head_shape(config) for size, config in configs.items()}
    assert heads == dict.fromkeys(SIZES) | {"8b": (151936, 4096)}
    values = {name: value for name, value in SIZES["4b"].items() if name != "tie_word_embeddings"}
    assert unused_head_shape(ColQwen3Config(**values)) is None
