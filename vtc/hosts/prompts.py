"""Idefics: features come prompt by prompt, the pictures of a prompt behind each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile
from .host import Layout
from .raster import patch_grid, rectangle

if TYPE_CHECKING:
    from . import Vision


def prompts_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """One layout per picture; pictures that only pad a prompt are no encoder rows. All have the same number
    of tokens: a raster of r x r patches each, or the queries of a resampler."""
    pixels, mask = arguments["pixel_values"], arguments.get("pixel_attention_mask")
    real = _real(pixels, mask)  # (prompts, pictures)
    n = sum(map(len, items)) // int(real.sum())
    pictures = pixels[real]
    if mask is not None and mask.dim() == 4:
        cropped = [_crop(*each) for each in zip(pictures, mask[real])]
    else:
        cropped = list(pictures)
    device = items[0].device
    if vision.host.latent:
        slots = torch.arange(n, device=device)
        return [Layout([Tile(slots, (1, n), latent=True)], None, picture) for picture in cropped]
    grid = patch_grid(vision.encoder.tower, pixels)
    area = grid[0] * grid[1]
    ratio = math.isqrt(area // n)
    return [rectangle(row * area, grid, picture, device, ratio) for row, picture in enumerate(cropped)]


def _real(pixels: Tensor, mask: Tensor | None) -> Tensor:
    """Which of the pictures (prompts, pictures, 3, H, W) hold something: a mask says so, or their pixels."""
    if mask is not None and mask.dim() == 2:
        return mask.bool()
    real = pixels.flatten(2).ne(0).any(dim=-1)
    if not bool(real.any()):
        real[0, 0] = True  # what SmolVLM makes of a call without any picture
    return real


def _crop(picture: Tensor, mask: Tensor) -> Tensor:
    """A picture (3, H, W) without the padding to the largest of the batch; mask (H, W)."""
    return picture[:, : int(mask.any(dim=1).sum()), : int(mask.any(dim=0).sum())]
