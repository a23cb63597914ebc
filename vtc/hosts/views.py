"""Families with a whole view of each picture and views of its parts: parts come first among the tokens, but
the encoder sees all whole views in one call and all parts in the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile
from .host import Layout
from .raster import patch_grid, squares

if TYPE_CHECKING:
    from . import Vision


@dataclass
class _Views:
    """What the call holds: whole views (images, 3, H, W), parts of all images, how many each image has."""

    whole: Tensor
    parts: Tensor | None
    counts: list[int]

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> _Views:
        whole, counts = arguments["pixel_values"], arguments.get("num_local_patches")
        counts = [0] * len(whole) if counts is None else [int(count) for count in counts]
        return cls(whole, arguments.get("pixel_values_local"), counts)

    def firsts(self, whole: int, part: int) -> list[tuple[int, int]]:
        """For each image the number of its whole view's first patch and of its first part's; views of so
        many patches."""
        return [
            (image * whole, len(self.whole) * whole + sum(self.counts[:image]) * part)
            for image in range(len(self.whole))
        ]


def views_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """View behind view, a raster each. Two convolutions of stride 2 put about 4 x 4 patches into one token.
    Where the parts lie in the picture is not told."""
    views, tower = _Views.of(arguments), vision.encoder.tower
    whole = patch_grid(tower, views.whole)
    part = whole if views.parts is None else patch_grid(tower, views.parts)
    layouts = []
    for image, (first, first_part) in enumerate(views.firsts(whole[0] * whole[1], part[0] * part[1])):
        device, count = items[image].device, views.counts[image]
        starts = [(part, first_part + number * part[0] * part[1]) for number in range(count)]
        tiles, patches, slot = [], [], 0
        for grid, start in [*starts, (whole, first)]:
            patches.append(squares(grid, 4, device) + start)
            slots = torch.arange(slot, slot + len(patches[-1]), device=device)
            tiles.append(Tile(slots, (grid[0] // 4, grid[1] // 4)))
            slot += len(slots)
        tiles[-1].thumbnail = count > 0
        layouts.append(Layout(tiles, patches, views.whole[image]))
    return layouts


def views_map_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """The parts of a picture are one map, then comes the whole view; a newline token behind each row of
    both, and one token behind it all. An encoder behind a convolution: a token for each of its patches."""
    views, config = _Views.of(arguments), vision.base.config.vision_config.sam_config
    stride = 4 * config.patch_size
    side = views.whole.shape[-1] // stride  # tokens on a side of the whole view, and of a part
    part = side if views.parts is None else views.parts.shape[-1] // stride
    grids = arguments.get("patches_grid") or [(0, 0)] * len(items)
    layouts = []
    for image, (first, first_part) in enumerate(views.firsts(side**2, part**2)):
        cols, rows = (int(number) for number in grids[image]) if views.counts[image] else (0, 0)
        device, width = items[image].device, cols * part + 1  # with the newline
        places = [(row, col) for row in range(rows) for col in range(cols)]
        tiles = []
        for row, col in places:
            box = (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows)
            tiles.append(
                Tile(_block(row * part * width + col * part, part, width, device), (part, part), box)
            )
        behind = rows * part * width if places else 0
        tiles.append(Tile(_block(behind, side, side + 1, device), (side, side), thumbnail=bool(places)))
        starts = [first_part + number * part**2 for number in range(len(places))] + [first]
        patches = [
            torch.arange(start, start + len(tile.slots), device=device)[:, None]
            for tile, start in zip(tiles, starts)
        ]
        layouts.append(Layout(tiles, patches, views.whole[image], behind + side * (side + 1) + 1))
    return layouts


def views_queries_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """View behind view, as many tokens each as the encoder has queries for its size, and one token behind
    it all."""
    views, tower = _Views.of(arguments), vision.base.vision_tower
    side = tower.config.sam_config.patch_size * 4
    small = tower.query_768_resolution.weight.shape[0], tower.query_1024_resolution.weight.shape[0]

    def queries(pixels: Tensor) -> int:
        return small[0] if (pixels.shape[-1] // side) ** 2 <= 144 else small[1]

    whole, part = queries(views.whole), 0 if views.parts is None else queries(views.parts)
    layouts = []
    for image, (count, item) in enumerate(zip(views.counts, items, strict=True)):
        every = torch.arange(count * part + whole, device=item.device)
        tiles = [Tile(slots, (1, len(slots)), latent=True) for slots in every.split([part] * count + [whole])]
        tiles[-1].thumbnail = count > 0
        layouts.append(Layout(tiles, None, views.whole[image], len(every) + 1))
    return layouts


def _block(first: int, side: int, width: int, device: torch.device) -> Tensor:
    """The places of a square in raster order, in a map of rows of `width`, its corner at place `first`."""
    rows = torch.arange(side, device=device)[:, None] * width
    return (first + rows + torch.arange(side, device=device)).flatten()
