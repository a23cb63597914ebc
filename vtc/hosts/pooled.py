"""Molmo 2: a table names the patches of each token, of a low-resolution view and of overlapping crops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile
from .host import Layout

if TYPE_CHECKING:
    from . import Vision


def pooled_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """The whole view, then the crops put together to one rectangle."""
    grids = [
        [(low_rows, low_cols), (rows, cols)]
        for low_rows, low_cols, rows, cols in arguments["image_grids"].tolist()
    ]
    layouts = _layouts(arguments["pixel_values"], arguments["image_token_pooling"], grids, items)
    for layout in layouts:
        layout.tiles[0].thumbnail = len(layout.tiles) > 1
    return layouts


def pooled_video_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """Frame by frame."""
    grids = [[(rows, cols)] * frames for frames, rows, cols in arguments["video_grids"].tolist()]
    return _layouts(arguments["pixel_values_videos"], arguments["video_token_pooling"], grids, items)


def _layouts(
    pixels: Tensor, table: Tensor, grids: list[list[tuple[int, int]]], items: list[Tensor]
) -> list[Layout]:
    """pixels (crops, patches, values); table (tokens, m) numbers of patches over all crops, -1 for none."""
    device = items[0].device
    table = table[(table >= 0).any(dim=1)].to(device)
    some = table.amax(dim=1, keepdim=True)  # stands for patches that a token at an uneven edge lacks
    parts = torch.where(table < 0, some, table).split([len(item) for item in items])
    layouts = []
    for patches, tiles in zip(parts, grids, strict=True):
        tiles = [grid for grid in tiles if grid[0] * grid[1]]
        sizes = [rows * cols for rows, cols in tiles]
        slots = torch.arange(len(patches), device=device).split(sizes)
        first, last = (int(n) // pixels.shape[1] for n in patches.aminmax())
        found = [Tile(own, grid) for own, grid in zip(slots, tiles)]
        layouts.append(Layout(found, list(patches.split(sizes)), pixels[first : last + 1]))
    return layouts
