"""Images that are one rectangle of tokens in raster order, one or r x r encoder patches behind each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..record import Tile
from .host import Layout

if TYPE_CHECKING:
    from . import Vision


def raster_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """One image per item, or all of one size in one item; how many patches a token merges is read off their
    numbers. Where `image_sizes` are given, images of these sizes stand one behind the other in one encoder
    row. Raises ValueError where the features are not the tower's patches, one by one or in squares.
    """
    pixels, sizes = _pixels(arguments), arguments.get("image_sizes")
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    if len(items) != len(pixels):
        items = [part for item in items for part in item.chunk(len(pixels) // len(items))]
    layouts, start = [], 0
    for number, item in enumerate(items):
        own = pixels[number] if sizes is None else pixels[number, :, : sizes[number][0], : sizes[number][1]]
        grid = patch_grid(vision.encoder.tower, own)
        ratio, first = _ratio(grid, len(item), number)
        layouts.append(rectangle(start, grid, own, item.device, ratio, first))
        start += grid[0] * grid[1]
    return layouts


def map_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """A convolutional encoder's map: as many rows and columns of tokens as fit the picture's shape."""
    layouts = []
    for own, item in zip(_pixels(arguments), items, strict=True):
        grid = fitting_grid(len(item), tuple(own.shape[-2:]))
        if grid is None:
            raise ValueError(
                f"{len(item)} features are no rectangle of the shape of {tuple(own.shape)} pixels"
            )
        layouts.append(Layout([Tile(torch.arange(len(item), device=item.device), grid)], None, own))
    return layouts


def rectangle(
    start: int,
    grid: tuple[int, int],
    pixels: Tensor,
    device: torch.device,
    ratio: int = 1,
    first: int = 0,
) -> Layout:
    """One untiled image whose first patch has number `start`: `grid` patches, a token for each ratio x ratio
    of them, behind `first` other tokens."""
    rows, cols = grid[0] // ratio, grid[1] // ratio
    slots = torch.arange(first, first + rows * cols, device=device)
    return Layout(
        [Tile(slots, (rows, cols))], [squares(grid, ratio, device) + start], pixels, first + len(slots)
    )


def squares(grid: tuple[int, int], ratio: int, device: torch.device) -> Tensor:
    """The patches of each ratio x ratio square, squares in raster order: (n, ratio * ratio). Patches at the
    right and the bottom that make no whole square are in none."""
    rows, cols = grid[0] // ratio, grid[1] // ratio
    numbers = torch.arange(grid[0] * grid[1], device=device).view(*grid)[: rows * ratio, : cols * ratio]
    blocks = numbers.reshape(rows, ratio, cols, ratio).transpose(1, 2)
    return blocks.reshape(-1, ratio * ratio)


def patches_behind(grid: tuple[int, int], tokens: tuple[int, int], device: torch.device) -> Tensor:
    """The patches that each of `tokens` (rows, cols) is made of: squares of them where they divide the grid,
    else the 2 x 2 that bilinear interpolation blends. (n, m)"""
    ratio = grid[0] // tokens[0]
    if (grid[0] // ratio, grid[1] // ratio) == tokens:
        return squares(grid, ratio, device)
    rows, cols = (_blended(size, out, device) for size, out in zip(grid, tokens))
    return (rows[:, None, :, None] * grid[1] + cols[None, :, None, :]).reshape(-1, 4)


def fitting_grid(n: int, shape: tuple[int, int]) -> tuple[int, int] | None:
    """The rectangle of n tokens with the proportions of `shape`, None where there is none."""
    rows = round(math.sqrt(n * shape[0] / shape[1]))
    return (rows, n // rows) if rows and n % rows == 0 else None


def patch_grid(tower: nn.Module, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches that a tower makes of pixels (..., H, W)."""
    owners = [tower.config, *tower.modules()]  # timm's towers do not have it in their config
    size = next(size for owner in owners if (size := getattr(owner, "patch_size", None)))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return pixels.shape[-2] // height, pixels.shape[-1] // width


def _pixels(arguments: dict[str, Any]) -> Tensor:
    """Also under a name that a family has given up."""
    return next(
        value for name, value in arguments.items() if name.startswith("pixel_values") and value is not None
    )


def _blended(size: int, out: int, device: torch.device) -> Tensor:
    """The two places of `size` that interpolation to `out` takes each from, the same twice if it is one."""
    centre = ((2 * torch.arange(out, device=device) + 1) * size - out).clamp(0, 2 * out * (size - 1))
    low, high = centre // (2 * out), -(-centre // (2 * out))  # of whole numbers, so that none is rounded
    return torch.stack([low, high], dim=1)


def _ratio(patches: tuple[int, int], n: int, image: int) -> tuple[int, int]:
    """(patches on a token's side, tokens in front of them) for n tokens."""
    rows, cols = patches
    for first in (0, 1):  # a CLS token that a host lets through stands in front
        ratio = math.isqrt(rows * cols // max(n - first, 1))
        if ratio and rows % ratio == cols % ratio == 0 and (rows // ratio) * (cols // ratio) == n - first:
            return ratio, first
    raise ValueError(
        f"image {image} has {n} features for {rows} x {cols} patches: "
        "check vision_feature_select_strategy, it must fit the vision tower"
    )
