"""What the library knows of a family of models, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..record import Tile


@dataclass
class Layout:
    """Where the patch tokens of one image lie among the tokens that it sends to the language model.

    tiles    its rectangles of patch tokens
    patches  for each tile (n, m): the encoder patches behind each of its n tokens, counted over all
             encoder rows of the call, CLS and registers not counted; m = 1 unless the projector merges
    """

    tiles: list[Tile]
    patches: list[Tensor]

    @property
    def n(self) -> int:
        """How many patch tokens the image has; newline tokens and CLS are not counted."""
        return sum(len(tile.slots) for tile in self.tiles)

    def to(self, device: torch.device) -> Layout:
        tiles = [replace(tile, slots=tile.slots.to(device)) for tile in self.tiles]
        return Layout(tiles, [patches.to(device) for patches in self.patches])


# (base model, arguments of get_image_features, features of each image) -> layout of each image
LayoutFunction = Callable[[nn.Module, dict[str, Any], list[Tensor]], list[Layout]]


@dataclass(frozen=True)
class Host:
    """One family. `tower` and `projector` are attribute paths from the base model."""

    name: str
    model_types: tuple[str, ...]
    tower_types: tuple[str, ...]
    layout: LayoutFunction
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    tiled: bool = False  # an image may become several encoder rows
    features: str = "pooler_output"  # the field of get_image_features' output that is scattered


def whole_image(row: int, grid: tuple[int, int], first_slot: int, device: torch.device) -> Layout:
    """One untiled image: encoder row `row`, its patches in raster order behind `first_slot` other tokens."""
    n = grid[0] * grid[1]
    slots = torch.arange(first_slot, first_slot + n, device=device)
    patches = torch.arange(row * n, (row + 1) * n, device=device)
    return Layout([Tile(slots, grid)], [patches[:, None]])
