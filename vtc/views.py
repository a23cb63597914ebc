"""Which part of a picture each of a model's views of it shows, which records are of one picture, and what was
left of it behind a block."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .record import WHOLE, Box, Record, Tile

NEAR = 0.05  # of a view's side: a tile that begins so close to a multiple of its size begins there
NEARER = 0.01  # a picture's only view, of which timm may crop but a little


def place(images: list[Any], records: list[Record], processor: Any) -> list[Record]:
    """One record for each picture, its tiles where the processor cuts them from; lists of frames stay.

    Many models see the tiles of a picture as pictures of their own and are not told which belong together.
    Raises ValueError where the pictures and the records do not go together.
    """
    found = [[] if isinstance(image, list) else views(processor, image.size) for image in images]
    counts = [1] * len(images)
    if len(records) != len(images):
        counts = [max(1, len(boxes)) for boxes in found]
    if sum(counts) != len(records):
        raise ValueError(
            f"{len(images)} image(s) were given and the last forward had {len(records)}: give each image of "
            "it, in order, and the processor, which may know an image's tiles; else a picture of each tile"
        )
    ends = np.cumsum(counts).tolist()
    parts = [records[end - count : end] for end, count in zip(ends, counts)]
    return [_located(join(part), boxes) for part, boxes in zip(parts, found, strict=True)]


def join(records: list[Record]) -> Record:
    """The records of a picture's views as one."""
    if len(records) == 1:
        return records[0]
    index, source = _end_to_end([(record.index, record.source) for record in records])
    starts = np.cumsum([0] + [len(record.source) for record in records]).tolist()
    tiles = [
        replace(tile, slots=tile.slots + start)
        for start, record in zip(starts, records)
        for tile in record.tiles
    ]
    entering = {part: sum(record.entering[part] for record in records) for part in records[0].entering}
    common = sorted(set.intersection(*(set(record.blocks) for record in records)))
    blocks = {block: _end_to_end([record.blocks[block] for record in records]) for block in common}
    return Record(index, source, records[-1].grid, tiles, entering, blocks, depth=records[-1].depth)


def _end_to_end(states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The (index, source) of several rows of tokens as of one."""
    index, source, n, k = [], [], 0, 0
    for kept, slots in states:
        index.append(kept + n)
        source.append(torch.where(slots < 0, -1, slots + k))
        n, k = n + len(slots), k + len(kept)
    return torch.cat(index), torch.cat(source)


def after(record: Record, block: int | str) -> Record:
    """What was left of an image's patches behind a block. Raises ValueError where nothing was reduced yet."""
    if not isinstance(block, Integral) or isinstance(block, bool):
        raise ValueError(f"block must be the number of a block, 'all' or None, not {block!r}")
    blocks = reducing(record)
    if record.depth and block >= record.depth:
        raise ValueError(f"there is no block {block}: this encoder has blocks 0 to {record.depth - 1}")
    if block < blocks[0]:
        raise ValueError(f"no block up to {block} reduced tokens, the first that did is block {blocks[0]}")
    index, source = record.blocks[max(b for b in blocks if b <= block)]
    return replace(record, index=index, source=source, tiles=_patches(record, len(source)))


def _patches(record: Record, n: int) -> list[Tile]:
    """The tiles of an image as its encoder has them, n patches one tile after the other: a model may make one
    token of several patches, and put newline tokens between them."""
    tiles = tiles_of(record)
    cells = sum(tile.grid[0] * tile.grid[1] for tile in tiles)
    side = math.isqrt(n // cells)  # of the patches that are one token
    if side * side * cells != n:
        raise ValueError(f"{n} patches cannot be laid on {cells} places: draw the final state, without block")
    grids = [(side * tile.grid[0], side * tile.grid[1]) for tile in tiles]
    rows = torch.arange(n).split([rows * cols for rows, cols in grids])
    return [replace(tile, slots=slots, grid=grid) for tile, slots, grid in zip(tiles, rows, grids)]


def tiles_of(record: Record) -> list[Tile]:
    """Its tiles, or the one that it is."""
    return record.tiles or [Tile(torch.arange(len(record.source)), record.grid)]


def reducing(record: Record) -> list[int]:
    """The blocks of the encoder that reduced tokens. Raises ValueError where none did."""
    if not record.blocks:
        raise ValueError(
            "no block of an encoder reduced tokens in this forward, so there is nothing to draw by block: "
            "compress with stage='encoder' and a keep below 1, or leave block out"
        )
    return sorted(record.blocks)


def views(processor: Any, size: tuple[int, int]) -> list[Box]:
    """The box of each view that a processor makes of a picture of this size (width, height), in the order in
    which it hands them over; [] where it hands over no pictures. Padding lies outside of the picture.

    The processor, or a transform that makes a tensor of one picture, is asked: it gets a picture that grows
    brighter to the right and downwards.
    """
    if processor is None:
        return []
    across, down = (np.linspace(0, 255, side).round().astype(np.uint8) for side in size)
    ramps = np.broadcast_arrays(across[None], down[:, None], np.uint8(0))
    seen = [_pixels(processor, np.stack(channels, axis=-1)) for channels in _probes(ramps)]
    if any(pixels is None for pixels in seen):
        return []
    black, white, ramp = seen
    shares = (
        (ramp - black) / (white - black)
    ).double()  # whatever the normalisation; NaN where it is padding
    shares = [share for share in shares if not share[:2].isnan().all()]
    return [_box(share, size, NEARER if len(shares) == 1 else NEAR) for share in shares]


def _probes(ramps: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Black, white and the ramps, as channels."""
    return [[np.full_like(ramp, level) for ramp in ramps] for level in (0, 255)] + [ramps]


def _pixels(processor: Any, picture: np.ndarray) -> Tensor | None:
    """What the encoder is given for a picture: (views, 3, H, W)."""
    from PIL import Image

    from .evaluation.prompts import encode

    image = Image.fromarray(picture)
    if hasattr(processor, "tokenizer"):
        pixels = encode(processor, ["?"], [image]).get("pixel_values")
    elif hasattr(processor, "model_input_names"):  # an image processor
        pixels = processor(images=[image], return_tensors="pt").get("pixel_values")
    else:  # a transform
        pixels = processor(image)
        if not isinstance(pixels, Tensor):  # which leaves it a PIL image
            pixels = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        pixels = pixels.float()[None]
    return None if pixels is None or pixels.dim() < 4 else pixels.flatten(0, -4)


def _box(share: Tensor, size: tuple[int, int], near: float) -> Box:
    """share (3, H, W): between which pixels of the picture each pixel lies, 0 the first and 1 the last."""
    width, height = size  # the first pixel has its centre half a pixel from the edge
    left, right = _ends((share[0].nanmean(dim=0) * (width - 1) + 0.5) / width, near)
    top, bottom = _ends((share[1].nanmean(dim=1) * (height - 1) + 0.5) / height, near)
    return left, top, right, bottom


def _ends(places: Tensor, near: float) -> tuple[float, float]:
    """Where a row of pixels begins and ends, whose centres lie at `places`, NaN in padding."""
    known = (~places.isnan()).nonzero()[:, 0]
    first, last = known[0], known[-1]
    step = (places[last] - places[first]) / (last - first).clamp_min(1)
    start = places[first] - (first + 0.5) * step
    size = step * len(places)
    return _near(start, size, near), _near(start + size, size, near)


def _near(place: Tensor, size: Tensor, near: float) -> float:
    count = max(1, round(1 / size.item()))
    multiple = round(place.item() * count) / count
    return multiple if abs(place.item() - multiple) < near / count else place.item()


def _located(record: Record, boxes: list[Box]) -> Record:
    """The tiles where the views lie. Tiles of different grids were cut, to places that the model knows."""
    tiles = tiles_of(record)
    if len(boxes) != len(tiles) or len({tile.grid for tile in tiles}) > 1:
        return record
    several = len(boxes) > 1
    placed = [replace(tile, box=box, thumbnail=several and box == WHOLE) for tile, box in zip(tiles, boxes)]
    return replace(record, tiles=placed)
