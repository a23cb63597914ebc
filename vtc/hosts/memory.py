"""Mllama: a picture is up to so many tiles, a CLS token and patches each; its tiles are one encoder row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile
from .host import Layout

if TYPE_CHECKING:
    from . import Vision


def count_tiles(arguments: dict[str, Any]) -> Tensor:
    """Tiles of each picture of each prompt, 0 where one only pads the prompt: (prompts, pictures)."""
    tiles = arguments["aspect_ratio_mask"].sum(dim=-1)
    return tiles * (arguments["aspect_ratio_ids"] > 0)


def memory_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """One layout for each picture; an item holds the tokens of its tiles.

    The CLS token of its first tile is the one that is asked for attention: it sees all tiles.
    """
    tower, ratios = vision.encoder.tower, vision.encoder.tower.config.supported_aspect_ratios
    width = tower.num_patches + (8 - tower.num_patches % 8) % 8  # of a tile in the encoder, which pads it
    side = tower.config.image_size // tower.config.patch_size
    most, counts = arguments["pixel_values"].shape[2], count_tiles(arguments)
    layouts = []
    for item, picture in zip(items, counts.flatten().nonzero()[:, 0].tolist(), strict=True):
        rows, cols = ratios[int(arguments["aspect_ratio_ids"].flatten()[picture]) - 1]
        own = torch.arange(side * side, device=item.device)
        tiles, patches = [], []
        for tile in range(int(counts.flatten()[picture])):
            row, col = divmod(tile, cols)
            box = (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows)
            tiles.append(Tile(tile * tower.num_patches + 1 + own, (side, side), box))
            # the first tile's CLS is cut, the others' are not
            patches.append((picture * (most * width - 1) + tile * width + own)[:, None])
        pixels = arguments["pixel_values"].flatten(0, 1)[picture, : len(tiles)]
        layouts.append(Layout(tiles, patches, pixels, len(item)))
    return layouts
