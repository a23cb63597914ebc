"""Frames of a video, or tiles of an image, that are all of one size and follow each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile
from .host import Layout
from .raster import fitting_grid, patch_grid, patches_behind

if TYPE_CHECKING:
    from . import Vision
    from .structure import Encoder


def frames_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """Videos of one number of frames: pixel_values_videos is (videos, frames, 3, H, W)."""
    return _stacked(vision.video_encoder, arguments["pixel_values_videos"], items, last=0)


def frames_newline_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """As frames_layout, with one newline token behind the last frame of each video."""
    return _stacked(vision.video_encoder, arguments["pixel_values_videos"], items, last=1)


def tiles_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """Images of one number of tiles: pixel_values is (images, tiles, 3, H, W). How the tiles lie in the
    picture is not told. Some families send their videos this way, too."""
    return _stacked(vision.encoder, arguments["pixel_values"], items, last=0)


def _stacked(encoder: Encoder, pixels: Tensor, items: list[Tensor], last: int) -> list[Layout]:
    """last: tokens behind all frames. A CLS token may precede each frame's.

    Raises ValueError where the features are not rectangles of patches.
    """
    count, frames = pixels.shape[:2]
    length, device = sum(map(len, items)) // count, items[0].device
    each, grid = (length - last) // frames, patch_grid(encoder.tower, pixels)
    for first in (0, encoder.prefix):
        if tokens := fitting_grid(each - first, grid):
            break
    else:
        raise ValueError(f"a frame has {each} features for {grid[0]} x {grid[1]} patches")
    slots = torch.arange(frames * each, device=device).view(frames, each)[:, first:]
    patches = patches_behind(grid, tokens, device)
    numbers = torch.arange(count * frames, device=device).view(count, frames)[..., None, None]
    behind = patches + numbers * (grid[0] * grid[1])  # (count, frames, n, m)
    return [
        Layout([Tile(s, tokens) for s in slots], list(own), picture, length)
        for own, picture in zip(behind, pixels)
    ]
