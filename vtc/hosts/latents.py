"""Images that are a fixed number of queries of a resampler: tokens without a place in the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile
from .host import Layout

if TYPE_CHECKING:
    from . import Vision


def latents_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """One image per item, its queries in one row."""
    layouts = []
    for item, pixels in zip(items, arguments["pixel_values"], strict=True):
        slots = torch.arange(len(item), device=item.device)
        layouts.append(Layout([Tile(slots, (1, len(item)), latent=True)], None, pixels))
    return layouts
