"""LLaVA-NeXT: a thumbnail, then tiles cut back to the image's shape, a newline token after each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..record import Tile
from .host import Layout


def llava_next_layout(base: nn.Module, arguments: dict[str, Any], features: list[Tensor]) -> list[Layout]:
    """Runs the model's own packing on patch numbers, so that tiling and un-padding need no maths here.

    Raises ValueError where the packed features do not have the packed numbers' length.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = base.config
    sizes = arguments["image_sizes"]
    side = config.vision_config.image_size // config.vision_config.patch_size
    strategy = arguments.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in sizes
    ]
    # On the CPU, where reading the result back costs no synchronisation; float64 counts exactly.
    numbers = torch.arange(sum(tiles) * side * side, dtype=torch.float64).view(-1, side * side, 1)
    newline = torch.tensor([-1.0], dtype=torch.float64)
    packed, _ = base.pack_image_features(numbers.split(tiles), sizes, strategy, image_newline=newline)
    layouts, first_row = [], 0
    for image, (feature, number) in enumerate(zip(features, packed, strict=True)):
        if len(feature) != len(number):
            raise ValueError(
                f"image {image} has {len(feature)} features where its tiles give {len(number)}: "
                "check vision_feature_select_strategy, it must fit the vision tower"
            )
        layouts.append(_layout(number[:, 0].long(), first_row, tiles[image], side).to(feature.device))
        first_row += tiles[image]
    return layouts


def _layout(numbers: Tensor, first_row: int, tiles: int, side: int) -> Layout:
    """numbers (n_slots,): the patch behind each token, -1 for a newline."""
    owner = torch.where(numbers < 0, -1, numbers // (side * side)) - first_row
    found = [_tile(numbers, owner == tile, side) for tile in range(tiles)]
    layout = Layout(
        [tile for tile, _ in found if len(tile.slots)], [p for tile, p in found if len(tile.slots)]
    )
    layout.tiles[0].thumbnail = len(layout.tiles) > 1
    _set_boxes(layout, numbers)
    return layout


def _tile(numbers: Tensor, mine: Tensor, side: int) -> tuple[Tile, Tensor]:
    slots = mine.nonzero()[:, 0]
    patches = numbers[slots]  # ascending within a tile: raster order
    rows = len((patches % (side * side) // side).unique())
    return Tile(slots, (rows, len(slots) // max(rows, 1))), patches[:, None]


def _set_boxes(layout: Layout, numbers: Tensor) -> None:
    """The part of the picture each tile shows, read off its place between the newline tokens."""
    crops = layout.tiles[1:]
    if not crops:
        return
    first = int(crops[0].slots[0])  # the tokens of the tile grid follow the thumbnail's
    width = int((numbers[first:] < 0).nonzero()[0, 0])  # patches between two newlines
    height = (len(numbers) - first) // (width + 1)
    for tile in crops:
        row, col = divmod(int(tile.slots[0]) - first, width + 1)
        rows, cols = tile.grid
        tile.box = (col / width, row / height, (col + cols) / width, (row + rows) / height)
