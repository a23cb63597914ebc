"""Pictures of what a compressed model saw: kept tokens in colour, merged groups outlined, the rest faded."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from .images import open_image
from .record import WHOLE, Box, Record, Tile
from .sheet import GAP, INK, PAPER, below_each_other, contact_sheet, side_by_side
from .views import after, place, reducing, tiles_of

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

LONG_SIDE = 576  # pixels of the drawn image's long side, about
COLUMNS = 4  # frames of a video, or blocks of an encoder, in one row
BLOCKS = 12  # on one sheet
DROPPED = -1  # in maps of slots: the token there was dropped
OUTSIDE = -2  # in maps of slots: no token looks at these pixels


def draw(
    images: Image | str | Path | list,
    handle: Any,
    *,
    processor: Any = None,
    block: int | str | None = None,
    caption: bool | str = True,
    long_side: int = LONG_SIDE,
) -> Image:
    """Draws the tokens of the last forward on the image, or on each of several images in a row.

    images     what the processor was given: one PIL image or path for each image of the forward, and for
               each video, after the images, a list of its frames
    handle     what `compress()` returned, or a `Record` or a list of them
    processor  tells which part of an image the model saw, and which tiles are one image's where the model
               does not know it: a processor or image processor of transformers, or any other transform that
               makes a tensor of a PIL image without drawing lots. Without one, an image of one tile is taken
               to be cropped to the shape of its grid, as CLIP's processor does, and an encoder by itself to
               have seen all of it
    block      of an encoder that reduces tokens inside: 6 for the tokens that leave block 6; "all" for a
               sheet with a panel for each block that reduced tokens, for 12 of them if there are more. None
               for what is left in the end
    caption    False for none, a text of your own, or True for method, budget and counts
    long_side  size in pixels, rounded so that every token covers the same whole number of pixels; on a sheet
               of blocks a panel has half of it
    Raises ValueError where the model has not run, the numbers of images differ, a video has no frames,
    tokens are queries of a resampler, or no block up to the given one reduced tokens.
    """
    images = images if isinstance(images, (list, tuple)) else [images]
    images = [_opened(image) for image in images]
    records = [handle] if isinstance(handle, Record) else getattr(handle, "last", handle)
    if not records:
        raise ValueError("there is nothing to draw yet: run the compressed model on the image once first")
    if any(record.latent for record in records):
        raise ValueError(
            "this model's tokens are queries of a resampler, which belong to no place in the picture and "
            "cannot be drawn: handle.last tells which of them stayed"
        )
    records = place(images, records, processor)
    pictures, captions = [], []
    for image, record in zip(images, records, strict=True):
        cropped = processor is None and not _bare(record)
        if block == "all":
            pictures.append(_blocks_sheet(image, record, cropped, long_side // 2, caption is not False))
        else:
            record = record if block is None else after(record, block)
            pictures.append(_picture(image, record, cropped, long_side))
        captions.append(caption if isinstance(caption, str) else _caption(handle, record, block))
    return side_by_side(pictures) if caption is False else contact_sheet(pictures, captions, len(pictures))


def _caption(handle: Any, record: Record, block: int | str | None) -> str:
    plan = [(method.name, told["keep"]) for method, told in getattr(handle, "plan", [])]
    parts = [" + ".join(name if keep is None else f"{name}, {_budget(keep)}" for name, keep in plan)]
    parts += [f"block {block}"] if isinstance(block, Integral) else []
    parts += [f"{len(record.index)} of {len(record.source)} tokens"]
    return "  ·  ".join(part for part in parts if part)


def _budget(keep: Any) -> str:
    if isinstance(keep, str):
        return f"keep {keep}"
    return f"keep {keep:g}" if isinstance(keep, Real) else "keep by block"


def _bare(record: Record) -> bool:
    """Whether no language model comes behind the encoder."""
    return "encoder" in record.entering and "decoder" not in record.entering


def _blocks_sheet(image: Any, record: Record, cropped: bool, long_side: int, captioned: bool) -> Image:
    blocks = reducing(record)
    if len(blocks) > BLOCKS:
        blocks = [blocks[round(i * (len(blocks) - 1) / (BLOCKS - 1))] for i in range(BLOCKS)]
    left = [after(record, block) for block in blocks]
    panels = [_picture(image, state, cropped, long_side) for state in left]
    counts = [f"{len(state.index)} token{'s' * (len(state.index) > 1)}" for state in left]
    captions = [f"block {block}: {count}" for block, count in zip(blocks, counts)] if captioned else None
    rows = math.ceil(len(panels) / COLUMNS)
    sheet = contact_sheet(panels, captions, math.ceil(len(panels) / rows))
    return sheet.crop((GAP, GAP, sheet.width - GAP, sheet.height - GAP))  # without its margin


def _opened(image: Any) -> Image | list[Image]:
    return [open_image(frame) for frame in image] if isinstance(image, (list, tuple)) else open_image(image)


def _picture(image: Image | list[Image], record: Record, cropped: bool, long_side: int) -> Image:
    """One image; a tiled one with its thumbnail to the right of its tiles; a video frame by frame."""
    if isinstance(image, list):
        return _film(image, record, long_side)
    if _is_film(record):
        raise ValueError(
            f"{len(record.tiles)} frames, or tiles whose places are not known, cannot be drawn on one "
            "picture: give a list with a picture of each"
        )
    tiles = tiles_of(record)
    thumbnails = [tile for tile in tiles if tile.thumbnail]
    crops = [tile for tile in tiles if not tile.thumbnail]
    if not crops:
        thumbnails, crops = [], thumbnails
    if len(tiles) == 1 and cropped and crops[0].box == WHOLE:
        crops = [replace(crops[0], box=_centre(image, crops[0].grid))]
    panels = [_panel(*_cut(image, crops), record, long_side)]
    panels += [_panel(image, [tile], record, long_side // 2) for tile in thumbnails]
    return side_by_side(panels)


def _is_film(record: Record) -> bool:
    """Frames all show the whole picture; of an image one thumbnail does at most."""
    return len(record.tiles) > 1 and all(
        tile.box == (0, 0, 1, 1) and not tile.thumbnail for tile in record.tiles
    )


def _film(frames: list[Image], record: Record, long_side: int) -> Image:
    """What was kept of each frame that the model saw; of several frames in one row of tokens the first."""
    tiles = record.tiles
    if not frames or len(frames) < len(tiles):
        raise ValueError(f"{len(frames)} frames were given for a video of which the model saw {len(tiles)}")
    chosen = [frames[i * len(frames) // len(tiles)] for i in range(len(tiles))]
    panels = [_panel(frame, [tile], record, long_side // 2) for frame, tile in zip(chosen, tiles)]
    rows = [side_by_side(panels[i : i + COLUMNS]) for i in range(0, len(panels), COLUMNS)]
    return below_each_other(rows)


def _centre(image: Image, grid: tuple[int, int]) -> Box:
    """The largest box in the middle of an image that has the shape of the grid."""
    rows, cols = grid
    scale = min(image.width / cols, image.height / rows)
    x, y = cols * scale / image.width / 2, rows * scale / image.height / 2
    return 0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y


def _cut(image: Image, tiles: list[Tile]) -> tuple[Image, list[Tile]]:
    """What the tiles show of an image, black where they show padding, and the tiles on that."""
    boxes = np.array([tile.box for tile in tiles])  # (tiles, 4)
    start, end = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    left, top = (round(place * side) for place, side in zip(start, image.size))
    right, bottom = (round(place * side) for place, side in zip(end, image.size))
    shown = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    boxes = (boxes - np.tile(start, 2)) / np.tile(end - start, 2)
    return shown, [replace(tile, box=tuple(box)) for tile, box in zip(tiles, boxes.tolist())]


def _panel(image: Image, tiles: list[Tile], record: Record, long_side: int) -> Image:
    from PIL import Image

    size = _panel_size(image, tiles[0], long_side)
    pixels = np.asarray(image.resize(size, Image.LANCZOS), dtype=np.float32)  # (H, W, 3)
    source = record.source.cpu().numpy()  # (N,)
    members = np.bincount(source[source >= 0], minlength=len(record.index))  # (K,)
    slots, lines = _maps(tiles, source, size)  # (H, W) both
    merged = (slots >= 0) & (members[slots.clip(0)] > 1)  # (H, W)
    pixels = np.where((slots == DROPPED)[..., None], _faded(pixels), pixels)
    tinted = 0.25 * pixels + 0.75 * _group_means(pixels, slots, len(members))
    pixels = np.where(merged[..., None], tinted, pixels)
    pixels = np.where((lines & ~merged)[..., None], 0.8 * pixels + 0.2 * 255, pixels)
    regions = np.where(merged, slots, np.where(slots >= 0, len(members), DROPPED))
    _outline(pixels, regions)
    return Image.fromarray(pixels.round().astype(np.uint8))


def _panel_size(image: Image, tile: Tile, long_side: int) -> tuple[int, int]:
    """(width, height) in which the cells of the tile are whole pixels."""
    left, top, right, bottom = tile.box
    cells = tile.grid[1] / (right - left), tile.grid[0] / (bottom - top)  # over the whole image
    scale = long_side / max(image.size)
    width, height = (
        round(n * max(2, round(side * scale / n))) for n, side in zip(cells, image.size, strict=True)
    )
    return width, height


def _maps(tiles: list[Tile], source: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Which slot each pixel's token went into, and where the grid lines are: (H, W) int and (H, W) bool."""
    width, height = size
    slots = np.full((height, width), OUTSIDE)
    lines = np.zeros((height, width), dtype=bool)
    for tile in tiles:
        left, top, right, bottom = tile.box
        rows, cols = tile.grid
        y = np.linspace(top * height, bottom * height, rows + 1).round().astype(int)
        x = np.linspace(left * width, right * width, cols + 1).round().astype(int)
        cells = source[tile.slots.cpu().numpy()].reshape(rows, cols)
        slots[y[0] : y[-1], x[0] : x[-1]] = cells.repeat(np.diff(y), axis=0).repeat(np.diff(x), axis=1)
        lines[y[:-1], x[0] : x[-1]] = True
        lines[y[0] : y[-1], x[:-1]] = True
    return slots, lines


def _faded(pixels: np.ndarray) -> np.ndarray:
    grey = pixels @ [0.299, 0.587, 0.114]
    return (195 + 0.17 * grey)[..., None].repeat(3, axis=2)


def _group_means(pixels: np.ndarray, slots: np.ndarray, k: int) -> np.ndarray:
    """The mean colour of each pixel's slot: (H, W, 3)."""
    labels = slots.clip(-1) + 1
    flat = labels.ravel()
    count = np.bincount(flat, minlength=k + 1).clip(1)
    means = [np.bincount(flat, pixels[..., c].ravel(), k + 1) / count for c in range(3)]
    return np.stack(means, axis=1)[labels]


def _outline(pixels: np.ndarray, regions: np.ndarray) -> None:
    """Draws where regions (H, W) meet, in white between groups and in ink where dropped tokens begin."""
    regions = np.pad(regions, 1, constant_values=DROPPED)  # closes the outline at the edge of the picture
    white, ink = np.zeros(regions.shape, dtype=bool), np.zeros(regions.shape, dtype=bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        meet = regions[a] != regions[b]
        outer = meet & (np.minimum(regions[a], regions[b]) == DROPPED)
        for side in (a, b):
            white[side] |= meet
            ink[side] |= outer
    pixels[white[1:-1, 1:-1]] = PAPER
    pixels[ink[1:-1, 1:-1]] = INK
