"""Gemma 4: patches come with their places; k x k of them become a token, or each is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile
from .host import Layout

if TYPE_CHECKING:
    from . import Vision


def placed_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """One layout per picture, also where the features of all pictures are one matrix."""
    places = arguments["image_position_ids"]
    tiles, patches = _tiles(places, sum(map(len, items)), items[0].device)
    return [
        Layout([tile], [behind], pixels[: _count(place)])
        for tile, behind, pixels, place in zip(tiles, patches, arguments["pixel_values"], places, strict=True)
    ]


def placed_video_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """One layout per video; the frames of all videos are encoder rows behind each other."""
    places = arguments["video_position_ids"]
    tiles, patches = _tiles(places, sum(map(len, items)), items[0].device)
    layouts, first = [], 0
    for frames in arguments["num_frames_per_video"].tolist():
        film, length = slice(first, first + frames), 0
        for tile in tiles[film]:
            tile.slots, length = tile.slots + length, length + len(tile.slots)
        pixels = arguments["pixel_values_videos"][film, : _count(places[first])]
        layouts.append(Layout(tiles[film], patches[film], pixels))
        first += frames
    return layouts


def _tiles(places: Tensor, n: int, device: torch.device) -> tuple[list[Tile], list[Tensor]]:
    """A tile and its patches for each row of places (rows, patches, 2), column and row of each patch and -1
    for padding; n tokens are made of all rows together."""
    places = places.to(device)
    side = round((sum(map(_count, places)) / n) ** 0.5)  # of the square of patches that is a token
    tiles, patches = [], []
    for row, place in enumerate(places):
        place = place[: _count(place)] // side
        cols = int(place[:, 0].max()) + 1
        cell = place[:, 0] + cols * place[:, 1]
        order = cell.argsort(stable=True).view(-1, side * side)  # (tokens, patches of one)
        # tokens of one patch stay in the order of the patches, pooled ones lie in raster order
        slots = order[:, 0] if side == 1 else torch.arange(len(order), device=device)
        tiles.append(Tile(slots, (len(order) // cols, cols)))
        patches.append(order + row * places.shape[1])
    return tiles, patches


def _count(place: Tensor) -> int:
    return int((place[:, 0] >= 0).sum())
