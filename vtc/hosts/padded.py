"""Siglip 2: pictures as rows of patches, padded to the longest, and how many rows and columns each has."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .host import Layout
from .raster import rectangle

if TYPE_CHECKING:
    from . import Vision


def padded_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """One picture or tile per item, a token for each r x r patches."""
    pixels = arguments["pixel_values"]  # (pictures, patches, values)
    layouts = []
    for row, (item, (rows, cols)) in enumerate(zip(items, arguments["spatial_shapes"].tolist(), strict=True)):
        own = pixels[row, : rows * cols]
        ratio = math.isqrt(rows * cols // len(item))
        layouts.append(rectangle(row * pixels.shape[1], (rows, cols), own, item.device, ratio))
    return layouts
