"""MiniCPM-V: crops of different sizes packed into one row, merged by 2 x 2 once or twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .host import Layout
from .raster import rectangle

if TYPE_CHECKING:
    from . import Vision


def minicpm_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """One layout per crop or, as videos come, per frame."""
    return _layouts(arguments["pixel_values"], arguments["target_sizes"], items)


def minicpm_video_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    return _layouts(arguments["pixel_values_videos"], arguments["target_sizes_videos"], items)


def _layouts(pixels: Tensor, sizes: Tensor, items: list[Tensor]) -> list[Layout]:
    """pixels (1, 3, P, P * patches). Tokens of 4 x 4 patches are made of 2 x 2 of what the last blocks see,
    since the encoder itself has merged 2 x 2 by then."""
    layouts, first, start, patch = [], 0, 0, pixels.shape[2]
    for item, (rows, cols) in zip(items, sizes.tolist(), strict=True):
        halved = rows * cols == 16 * len(item)
        grid = (rows // 2, cols // 2) if halved else (rows, cols)
        own = pixels[..., start * patch : (start + rows * cols) * patch]
        layouts.append(rectangle(first, grid, own, item.device, ratio=2))
        first += grid[0] * grid[1]
        start += rows * cols
    return layouts
