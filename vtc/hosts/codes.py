"""Images that are words of a vocabulary, one for each code of a map: no encoder of attention blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile
from .host import Layout

if TYPE_CHECKING:
    from . import Vision


def codes_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """A raster of codes, a word for the end of the line behind each row. Pictures are padded to one size."""
    factor = vision.encoder.tower.vision_spatial_factor
    layouts = []
    for item, pixels, size in zip(items, arguments["pixel_values"], arguments["image_sizes"], strict=True):
        height, width = (int(side) for side in size)
        rows, cols = height // factor, width // factor
        slots = torch.arange(len(item), device=item.device).view(rows, cols + 1)[:, :-1].flatten()
        layouts.append(Layout([Tile(slots, (rows, cols))], None, pixels[:, :height, :width], len(item)))
    return layouts
