"""Pictures of different sizes, each cut to r x r patches per token: packed into one row, or padded rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile
from .host import Layout

if TYPE_CHECKING:
    from . import Vision


def pixtral_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """Pixtral: `image_sizes` in pixels; all patches in one encoder row."""
    size = vision.encoder.tower.config.patch_size
    layouts, first = [], 0
    for picture, item, (height, width) in zip(
        arguments["pixel_values"], items, torch.as_tensor(arguments["image_sizes"]).tolist(), strict=True
    ):
        grid = height // size, width // size
        layouts.append(merged(grid, len(item), first, picture[:, :height, :width], item.device))
        first += grid[0] * grid[1]
    return layouts


def siglip2_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """Siglip 2: `spatial_shapes` in patches; an encoder row per picture, padded to the longest."""
    pixels = arguments["pixel_values"]  # (pictures, patches, values)
    shapes = arguments["spatial_shapes"].tolist()
    return [
        merged((rows, cols), len(item), row * pixels.shape[1], pixels[row, : rows * cols], item.device)
        for row, (item, (rows, cols)) in enumerate(zip(items, shapes, strict=True))
    ]


def merged(grid: tuple[int, int], n: int, first: int, pixels: Tensor, device: torch.device) -> Layout:
    """A picture of grid (rows, cols) patches, which are the encoder's from `first` on, in n tokens of squares
    of patches. What does not fill a square at the right and lower edge is in no token."""
    rows, cols = grid
    ratio = next((r for r in range(1, min(grid) + 1) if (rows // r) * (cols // r) == n), 0)
    if not ratio:
        raise ValueError(f"an image of {rows} x {cols} patches has {n} features: no square of patches fits")
    height, width = rows // ratio, cols // ratio
    numbers = torch.arange(first, first + rows * cols, device=device).view(rows, cols)
    blocks = numbers[: height * ratio, : width * ratio].view(height, ratio, width, ratio).transpose(1, 2)
    slots = torch.arange(n, device=device)
    return Layout([Tile(slots, (height, width))], [blocks.reshape(n, ratio * ratio)], pixels)
