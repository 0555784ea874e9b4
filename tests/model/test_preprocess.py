"""Images to patches: equal to transformers' processor, by Pillow and by two GEMMs."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from colqwen_lab.errors import BadInput
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.model.preprocess import (
    _weights,
    patched,
    patches,
    pixels_of,
    resized,
    resized_size,
)
from colqwen_lab.model.synthetic import page

CONFIG = ColQwen3Config.of_size("tiny")
BUDGET = 100
NOISE = np.random.default_rng(0).integers(0, 256, (600, 500, 3), dtype=np.uint8)
IMAGES = {
    "text": page(3).resize((620, 877)),
    "noise": Image.fromarray(NOISE),
    "photograph": Image.fromarray(NOISE[:40, :30]).resize((900, 1100), Image.Resampling.BICUBIC),
    "enlarged": page(4).resize((60, 90)),
    "one pixel": Image.new("RGB", (1, 1), (1, 128, 255)),
    "wide": page(5).resize((900, 60)),
    "the right size": page(6).resize((320, 320)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_equals_transformers_processor(name: str) -> None:
    # preprocessor_config.json of Qwen3-VL, with the budget as the area of 32 x 32 pixels each.
    theirs = Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        size={"longest_edge": BUDGET * 32 * 32, "shortest_edge": 65536},
    )(images=[IMAGES[name]], return_tensors="pt")
    pixels, grid = patches(IMAGES[name], CONFIG, BUDGET)
    assert torch.equal(pixels, theirs["pixel_values"])
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    assert pixels.shape[0] // 4 <= BUDGET


@pytest.mark.parametrize("name", IMAGES)
def test_resizing_by_gemms_is_pillow_s_but_for_a_level_in_a_thousand_values(name: str) -> None:
    image = IMAGES[name]
    size = resized_size(*image.size, CONFIG, BUDGET)
    by_pillow, by_gemms = pixels_of(image, size), resized(pixels_of(image), size)
    levels = (by_pillow.int() - by_gemms.int()).abs()
    assert levels.max() <= 1
    assert (levels > 0).float().mean() <= 0.001
    assert by_gemms.shape == (*size, 3)
    own, grid = patched(by_gemms, CONFIG)
    theirs, same_grid = patches(image, CONFIG, BUDGET)
    assert grid == same_grid
    assert (own - theirs).abs().max() < 2.01 / 255


@pytest.mark.parametrize("tokens", [0, 16_385])
def test_a_budget_out_of_bounds_is_refused(tokens: int) -> None:
    with pytest.raises(BadInput, match="visual_tokens must be 1 to 16384"):
        resized_size(100, 100, CONFIG, tokens)


def test_weights_of_a_long_side_take_little_memory() -> None:
    tracemalloc.start()
    weights = _weights(8000, 32, torch.device("cpu"))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 2**20
    units = Image.fromarray(np.eye(8000, dtype=np.float32))
    whole = np.asarray(units.resize((32, 8000), Image.Resampling.BICUBIC))
    assert np.array_equal(weights.numpy(), whole.T)
