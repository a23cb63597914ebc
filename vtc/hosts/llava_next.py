"""LLaVA-NeXT and its kin: a thumbnail, then tiles cut back to the image's shape, a newline token after each
row. A token may be made of several patches, and the tiles of a large image may be interpolated to fewer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import WHOLE, Box, Tile
from .host import Layout
from .raster import patches_behind

if TYPE_CHECKING:
    from . import Vision

_CPU = torch.device("cpu")  # where reading numbers back costs no synchronisation
_UNLIMITED = {"vision_aspect_ratio": "anyres_max_1000000"}  # no image has more tiles: none is interpolated


@dataclass
class _Canvas:
    """What an image is laid on, in the middle and as large as it fits, before it is cut into tiles.

    grid  (rows, cols) of tiles
    size  (height, width) of the image, in pixels of its own
    """

    grid: tuple[int, int]
    size: tuple[int, int]

    def box(self, numbers: Tensor, side: int) -> Box:
        """The part of the image that a rectangle of tokens shows, numbered tile by tile, `side` on a tile's
        side. Un-padding cuts whole tokens only: those at an edge may show padding, outside of the image."""
        corners = [self._place(int(number), side) for number in (numbers[0], numbers[-1])]
        canvas = [count * side for count in self.grid]
        scale = min(tokens / pixels for tokens, pixels in zip(canvas, self.size))
        ends = []
        for axis, (tokens, pixels) in enumerate(zip(canvas, self.size)):
            length = pixels * scale  # of the image, in tokens
            start = (tokens - length) / 2
            first, last = (corner[axis] for corner in corners)
            ends.append(((first - start) / length, (last + 1 - start) / length))
        (top, bottom), (left, right) = ends
        return left, top, right, bottom

    def _place(self, number: int, side: int) -> tuple[int, int]:
        """Row and column of a token in the canvas."""
        tile, token = divmod(number, side**2)
        row, col = divmod(tile, self.grid[1])
        return row * side + token // side, col * side + token % side


def llava_next_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """Runs the model's own packing on token numbers, so that tiling and un-padding need no maths here.

    Raises ValueError where the packed features do not have the packed numbers' length.
    """
    rate = Fraction(getattr(vision.base.config, "downsample_rate", 1))  # tokens for each patch on a side
    side = _side(vision)
    patches = patches_behind((side, side), (int(side * rate), int(side * rate)), _CPU)
    tiles = _count_tiles(vision, arguments)
    packed = _pack(vision, arguments, tiles, len(patches))
    layouts = [
        _layout(*image, patches, side**2)
        for image in zip(packed, tiles, _pixels(arguments, tiles), _canvases(vision, arguments))
    ]
    return _count_on(layouts, items, tiles, side**2)


def llava_onevision_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """As llava_next_layout, where images of many tiles are made smaller behind the encoder: these are two
    rectangles, the thumbnail and a blend of all tiles."""
    side = _side(vision)
    patches = patches_behind((side, side), (side, side), _CPU)
    tiles = _count_tiles(vision, arguments)
    packed = _pack(vision, arguments, tiles, side**2)
    unlimited = _pack(vision, arguments, tiles, side**2, **_UNLIMITED)
    layouts, pictures = [], zip(tiles, _pixels(arguments, tiles), _canvases(vision, arguments))
    for numbers, whole, (count, pixels, canvas) in zip(packed, unlimited, pictures):
        if len(numbers) == len(whole):
            layouts.append(_layout(numbers, count, pixels, canvas, patches, side**2))
        else:
            layouts.append(_blend(numbers, whole, pixels, canvas, side))
    return _count_on(layouts, items, tiles, side**2)


def _side(vision: Vision) -> int:
    """Patches on a tile's side."""
    config = vision.base.config.vision_config
    return config.image_size // config.patch_size


def _count_tiles(vision: Vision, arguments: dict[str, Any]) -> list[int]:
    """For each image, thumbnail included. Some families do not tile the images of a prompt with several."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes = vision.base.config, arguments["image_sizes"]
    together = arguments.get("batch_num_images")
    alone = [True] * len(sizes) if together is None else [n == 1 for n in together for _ in range(n)]
    size = config.vision_config.image_size
    return [
        image_size_to_num_patches(image, config.image_grid_pinpoints, size) if tiled else 1
        for image, tiled in zip(sizes, alone, strict=True)
    ]


def _canvases(vision: Vision, arguments: dict[str, Any]) -> list[_Canvas]:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    pinpoints, side = vision.base.config.image_grid_pinpoints, vision.base.config.vision_config.image_size
    sizes = [tuple(int(pixels) for pixels in size) for size in arguments["image_sizes"]]
    return [_Canvas(get_anyres_image_grid_shape(size, pinpoints, side), size) for size in sizes]


def _pixels(arguments: dict[str, Any], tiles: list[int]) -> Sequence[Tensor]:
    """Those of each image: tiles are stacked and padded, or follow each other over all images."""
    pixels = arguments["pixel_values"]
    return pixels if pixels.dim() == 5 else pixels.split(tiles)


def _pack(
    vision: Vision, arguments: dict[str, Any], tiles: list[int], n: int, **options: Any
) -> list[Tensor]:
    """For each image the numbers of its tokens in their final order, n for each tile, -1 for a newline."""
    config, pack = vision.base.config, vision.base.pack_image_features
    given = {"image_newline": torch.tensor([-1.0], dtype=torch.float64)}  # which counts exactly
    for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
        given[name] = options.get(name) or arguments.get(name) or getattr(config, name, None)
    given = {name: value for name, value in given.items() if name in inspect.signature(pack).parameters}
    numbers = [torch.arange(count * n, dtype=torch.float64).view(count, n, 1) for count in tiles]
    packed = pack(numbers, arguments["image_sizes"], **given)
    packed = packed[0] if isinstance(packed, tuple) else packed
    return [numbers[:, 0].long() for numbers in packed]


def _count_on(layouts: list[Layout], items: list[Tensor], tiles: list[int], area: int) -> list[Layout]:
    """Numbers the patches of all images one behind the other; `area` patches make a tile."""
    first = 0
    for image, (layout, item, count) in enumerate(zip(layouts, items, tiles, strict=True)):
        if len(item) != layout.length:
            raise ValueError(
                f"image {image} has {len(item)} features where its tiles give {layout.length}: "
                "check vision_feature_select_strategy, it must fit the vision tower"
            )
        layout.patches = [patches + first * area for patches in layout.patches]
        first += count
    return [layout.to(item.device) for layout, item in zip(layouts, items)]


def _layout(
    numbers: Tensor, tiles: int, pixels: Tensor, canvas: _Canvas, patches: Tensor, area: int
) -> Layout:
    """numbers (n_slots,) of the tokens of an image; patches (n, m) behind each token of a tile of `area`."""
    n = len(patches)
    owner = torch.where(numbers < 0, -1, numbers // n)
    found = []
    for number in range(tiles):
        slots = (owner == number).nonzero()[:, 0]
        tokens = numbers[slots] - number * n  # ascending: raster order
        if len(slots):
            rows = len((tokens // math.isqrt(n)).unique())
            box = canvas.box(numbers[slots] - n, math.isqrt(n)) if number else WHOLE
            tile = Tile(slots, (rows, len(slots) // rows), box)
            found.append((tile, patches[tokens] + number * area))
    layout = Layout([tile for tile, _ in found], [behind for _, behind in found], pixels, len(numbers))
    layout.tiles[0].thumbnail = len(layout.tiles) > 1
    return layout


def _blend(numbers: Tensor, whole: Tensor, pixels: Tensor, canvas: _Canvas, side: int) -> Layout:
    """An interpolated image: `numbers` of its tokens, `whole` of the patches they were made of."""
    n = side**2
    (rows, cols), (old_rows, old_cols) = _shape(numbers[n:]), _shape(whole[n:])
    behind = patches_behind((old_rows, old_cols), (rows, cols), _CPU)
    patches = whole[n:].view(old_rows, old_cols + 1)[:, :-1].flatten()[behind]
    slots = torch.arange(n, len(numbers)).view(rows, cols + 1)[:, :-1].flatten()
    box = canvas.box(whole[whole >= n] - n, side)
    tiles = [Tile(torch.arange(n), (side, side), thumbnail=True), Tile(slots, (rows, cols), box)]
    thumbnail = torch.arange(n)[:, None].expand(n, patches.shape[1])  # tiles may become one row
    return Layout(tiles, [thumbnail, patches], pixels, len(numbers))


def _shape(numbers: Tensor) -> tuple[int, int]:
    """Rows and columns of tokens between newlines."""
    cols = int((numbers < 0).nonzero()[0, 0])
    return len(numbers) // (cols + 1), cols
