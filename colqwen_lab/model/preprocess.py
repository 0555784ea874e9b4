"""Page images to the patches of the vision encoder, as the published processor makes them.

An image is resized in 8 bits, its columns first: by Pillow, or on a GPU by two GEMMs with Pillow's
weights. Scaling to -1..1 and cutting into patches run on the image's device. Source of the steps:
transformers' Qwen2VLImageProcessorPil.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from colqwen_lab.errors import BadInput
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.options import MOST_VISUAL_TOKENS, VISUAL_TOKENS

# The published processor enlarges an image below 64 visual tokens.
MIN_VISUAL_TOKENS = 64
# Unit vectors that are resized at once.
UNIT_ROWS = 1024
# Pixel values [patches, 3 * 2 * 16 * 16] in float32, and the grid (1, rows, columns).
Patches = tuple[Tensor, tuple[int, int, int]]


def check_visual_tokens(visual_tokens: int) -> int:
    """`visual_tokens` as it is, if it is a valid budget per image. Raises BadInput."""
    if not 1 <= visual_tokens <= MOST_VISUAL_TOKENS:
        raise BadInput(f"visual_tokens must be 1 to {MOST_VISUAL_TOKENS}, got {visual_tokens}")
    return visual_tokens


def resized_size(
    width: int, height: int, config: ColQwen3Config, visual_tokens: int = VISUAL_TOKENS
) -> tuple[int, int]:
    """`(height, width)` in pixels to which an image is resized within a budget. Raises BadInput."""
    vision, most = config.vision_config, check_visual_tokens(visual_tokens)
    side = vision.patch_size * vision.spatial_merge_size
    least = min(MIN_VISUAL_TOKENS, most)
    return smart_resize(height, width, side, least * side**2, most * side**2)


def visual_tokens_of(
    width: int, height: int, config: ColQwen3Config, visual_tokens: int = VISUAL_TOKENS
) -> int:
    """The visual tokens of an image of this size in pixels, within a budget. Raises BadInput."""
    rows, columns = resized_size(width, height, config, visual_tokens)
    vision = config.vision_config
    return rows * columns // (vision.patch_size * vision.spatial_merge_size) ** 2


def pixels_of(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """An RGB image as uint8 [height, width, 3]; resized to `size` (height, width) by Pillow."""
    if size and size != (image.height, image.width):
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 pixels [height, width, 3] resized to `size` on their device.

    As `pixels_of` resizes, but for a level of 255 in at most 0.1 % of the values, where a sum lies
    between two levels.
    """
    for axis, count in ((1, size[1]), (0, size[0])):  # as Pillow: columns first
        if pixels.shape[axis] != count:
            weights = _weights(pixels.shape[axis], count, pixels.device)
            sums = torch.tensordot(weights, pixels.float(), ([1], [axis])).movedim(0, axis)
            pixels = (sums + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return pixels


@lru_cache(maxsize=16)
def _weights(size: int, count: int, device: torch.device) -> Tensor:
    """Pillow's weights [count, size]: what it makes of pictures of the unit vectors."""
    weights = []
    for start in range(0, size, UNIT_ROWS):  # all of a side of 12,000 pixels have 550 MiB
        rows = min(UNIT_ROWS, size - start)
        units = Image.fromarray(np.eye(rows, size, start, dtype=np.float32))
        weights.append(np.asarray(units.resize((count, rows), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.concatenate(weights).T.copy()).to(device)


def patched(pixels: Tensor, config: ColQwen3Config) -> Patches:
    """The patches of resized uint8 pixels [height, width, 3], on their device."""
    vision = config.vision_config
    side, merge = vision.patch_size, vision.spatial_merge_size
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    values = (pixels.float() / 255 - 0.5) / 0.5
    blocks = values.view(rows // merge, merge, side, columns // merge, merge, side, 3)
    blocks = blocks.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5)
    frames = blocks.expand(*blocks.shape[:5], vision.temporal_patch_size, side, side)
    return frames.reshape(rows * columns, -1), (1, rows, columns)


def patches(
    image: Image.Image, config: ColQwen3Config, visual_tokens: int = VISUAL_TOKENS
) -> Patches:
    """`(pixel values [patches, 1536] in float32, grid)` of an RGB image. Raises BadInput."""
    size = resized_size(*image.size, config, visual_tokens)
    return patched(pixels_of(image, size), config)
