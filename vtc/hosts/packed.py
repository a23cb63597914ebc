"""Towers that see all patches of a call as one row, each picture or frame as large as its entry in grid_thw.

A token is a square of patches, and tokens lie in raster order, frame behind frame. The patches come either
square by square, in the order of their tokens, or in raster order themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile
from .host import Layout
from .raster import squares

if TYPE_CHECKING:
    from . import Vision

# (rows and columns of patches, patches on a token's side, device) -> the patches of each token: (n, side**2)
Order = Callable[[tuple[int, int], int, torch.device], Tensor]


def packed_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """The patches of a token are neighbours in the row. Frames of a video are the tiles of its layout."""
    layouts, config = _layouts(vision, arguments, items, _in_order), vision.encoder.tower.config
    return _in_windows(layouts, arguments, config) if getattr(config, "window_size", None) else layouts


def packed_raster_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """The patches of a picture are in raster order; its tokens, too."""
    layouts, tower = _layouts(vision, arguments, items, squares), vision.encoder.tower
    return _in_windows(layouts, arguments, tower) if getattr(tower, "window_size", None) else layouts


def packed_tokens_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """As packed_layout, where grids and rows of pixels are counted in tokens."""
    area = vision.encoder.tower.config.spatial_merge_size**2
    layouts, first = [], 0
    for item, (_, rows, cols) in zip(items, arguments["image_grid_thw"].tolist(), strict=True):
        last = first + len(item)
        slots = torch.arange(len(item), device=item.device).split(rows * cols)
        patches = torch.arange(first * area, last * area, device=item.device).view(-1, area)
        tiles = [Tile(frame, (rows, cols)) for frame in slots]
        own = arguments["pixel_values"][first:last]
        layouts.append(Layout(tiles, list(patches.split(rows * cols)), own))
        first = last
    return layouts


def packed_newline_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """As packed_raster_layout, with a newline token behind each row and one token at either end."""
    layouts = []
    for layout in packed_raster_layout(vision, arguments, items):
        (tile,) = layout.tiles
        rows, cols = tile.grid
        slots = 1 + tile.slots + tile.slots // cols
        layouts.append(replace(layout, tiles=[Tile(slots, tile.grid)], length=rows * (cols + 1) + 2))
    return layouts


def _layouts(vision: Vision, arguments: dict[str, Any], items: list[Tensor], order: Order) -> list[Layout]:
    kind = "image" if "pixel_values" in arguments else "video"
    pixels = arguments["pixel_values" if kind == "image" else "pixel_values_videos"]
    if f"{kind}_grid_thw" in arguments:
        grids = arguments[f"{kind}_grid_thw"].tolist()
    else:
        grids = [(1, rows, cols) for rows, cols in arguments[f"{kind}_grid_hw"].tolist()]
    sides = _sides(vision, arguments.get(f"{kind}_merge_sizes"), grids, items)
    layouts, first = [], 0
    for item, (frames, rows, cols), side in zip(items, grids, sides, strict=True):
        grid, last = (rows // side, cols // side), first + frames * rows * cols
        n = grid[0] * grid[1]
        # Of some families a token of a video is made of the same place in several frames.
        merged = max(1, frames * n // len(item))
        frame = torch.arange(frames, device=item.device)[:, None, None] * rows * cols + first
        patches = order((rows, cols), side, item.device)[None] + frame  # (frames, n, side ** 2)
        patches = patches.view(frames // merged, merged, n, -1).transpose(1, 2).flatten(2)
        slots = torch.arange(len(patches) * n, device=item.device).split(n)
        layouts.append(Layout([Tile(s, grid) for s in slots], list(patches), pixels[first:last]))
        first = last
    return layouts


def _sides(vision: Vision, given: Tensor | None, grids: list, items: list[Tensor]) -> list[int]:
    """How many patches are on a token's side, for each picture or video."""
    if given is not None:
        return given.tolist()
    config = vision.encoder.tower.config
    side = getattr(config, "spatial_merge_size", None) or getattr(config, "merge_kernel_size", [None])[0]
    if side:
        return [side] * len(grids)
    return [math.isqrt(math.prod(grid) // len(item)) for grid, item in zip(grids, items, strict=True)]


def _in_order(grid: tuple[int, int], side: int, device: torch.device) -> Tensor:
    return torch.arange(grid[0] * grid[1], device=device).view(-1, side * side)


def _in_windows(layouts: list[Layout], arguments: dict[str, Any], tower: Any) -> list[Layout]:
    """Such a tower sorts tokens by windows of attention in front of its blocks, and back behind them.
    tower: itself or its config, whichever knows the windows."""
    from transformers.vision_utils import get_vision_window_index

    grids = arguments["image_grid_thw" if "pixel_values" in arguments else "video_grid_thw"]
    sorted_by, _ = get_vision_window_index(
        grids, tower.spatial_merge_size, tower.window_size, tower.patch_size
    )
    area = tower.spatial_merge_size**2
    place = sorted_by.argsort().to(layouts[0].tiles[0].slots.device)  # where the tower has each token
    return [
        replace(layout, patches=[place[p // area] * area + p % area for p in layout.patches])
        for layout in layouts
    ]
