"""Which part of a picture each of a model's views of it shows, and which records are of one picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .record import WHOLE, Box, Record, Tile

NEAR = 0.05  # of a view's side: a view that begins so close to a multiple of its size begins there


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
    index, source, tiles, n, k = [], [], [], 0, 0
    for record in records:
        index.append(record.index + n)
        source.append(torch.where(record.source < 0, -1, record.source + k))
        tiles += [replace(tile, slots=tile.slots + n) for tile in record.tiles]
        n, k = n + len(record.source), k + len(record.index)
    entering = {part: sum(record.entering[part] for record in records) for part in records[0].entering}
    return Record(torch.cat(index), torch.cat(source), records[-1].grid, tiles, entering)


def views(processor: Any, size: tuple[int, int]) -> list[Box]:
    """The box of each view that a processor makes of a picture of this size (width, height), in the order in
    which it hands them over; [] where it hands over no pictures. Padding lies outside of the picture.

    The processor is asked: it gets a picture that grows brighter to the right and downwards.
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
    return [_box(share, size) for share in shares if not share[:2].isnan().all()]


def _probes(ramps: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Black, white and the ramps, as channels."""
    return [[np.full_like(ramp, level) for ramp in ramps] for level in (0, 255)] + [ramps]


def _pixels(processor: Any, picture: np.ndarray) -> Tensor | None:
    """What the encoder is given for a picture: (views, 3, H, W)."""
    from PIL import Image

    from .evaluation.prompts import encode

    image = Image.fromarray(picture)
    if hasattr(processor, "tokenizer"):
        inputs = encode(processor, ["?"], [image])
    else:  # an image processor
        inputs = processor(images=[image], return_tensors="pt")
    pixels = inputs.get("pixel_values")
    return None if pixels is None or pixels.dim() < 4 else pixels.flatten(0, -4)


def _box(share: Tensor, size: tuple[int, int]) -> Box:
    """share (3, H, W): between which pixels of the picture each pixel lies, 0 the first and 1 the last."""
    width, height = size  # the first pixel has its centre half a pixel from the edge
    left, right = _ends((share[0].nanmean(dim=0) * (width - 1) + 0.5) / width)
    top, bottom = _ends((share[1].nanmean(dim=1) * (height - 1) + 0.5) / height)
    return left, top, right, bottom


def _ends(places: Tensor) -> tuple[float, float]:
    """Where a row of pixels begins and ends, whose centres lie at `places`, NaN in padding."""
    known = (~places.isnan()).nonzero()[:, 0]
    first, last = known[0], known[-1]
    step = (places[last] - places[first]) / (last - first).clamp_min(1)
    start = places[first] - (first + 0.5) * step
    size = step * len(places)
    return _near(start, size), _near(start + size, size)


def _near(place: Tensor, size: Tensor) -> float:
    count = max(1, round(1 / size.item()))
    multiple = round(place.item() * count) / count
    return multiple if abs(place.item() - multiple) < NEAR / count else place.item()


def _located(record: Record, boxes: list[Box]) -> Record:
    """The tiles where the views lie. Tiles of different grids were cut, to places that the model knows."""
    tiles = record.tiles or [Tile(torch.arange(len(record.source)), record.grid)]
    if len(boxes) != len(tiles) or len({tile.grid for tile in tiles}) > 1:
        return record
    several = len(boxes) > 1
    placed = [replace(tile, box=box, thumbnail=several and box == WHOLE) for tile, box in zip(tiles, boxes)]
    return replace(record, tiles=placed)
