"""Where the crops of a tiled image lie around its thumbnail, and what the thumbnail says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .record import Tile

_DIGITS = 6  # crops of one column begin at the same fraction of the picture, up to rounding


@dataclass(frozen=True)
class Crops:
    """The grid of an image's crops.

    thumbnail  the number of the whole-image view among its tiles
    place      {number of a crop among the tiles: its (row, col)}
    rows, cols of crops
    """

    thumbnail: int
    place: dict[int, tuple[int, int]]
    rows: int
    cols: int

    @classmethod
    def of(cls, tiles: Sequence[Tile]) -> Crops | None:
        """None where there is no thumbnail, no crop, or where crops are not told to make up a grid."""
        whole = [number for number, tile in enumerate(tiles) if tile.thumbnail]
        crops = [number for number, tile in enumerate(tiles) if not tile.thumbnail]
        if len(whole) != 1 or not crops:
            return None
        lefts, tops = (sorted({_edge(tiles[number], axis) for number in crops}) for axis in (0, 1))
        place = {
            number: (tops.index(_edge(tiles[number], 1)), lefts.index(_edge(tiles[number], 0)))
            for number in crops
        }
        if sorted(place.values()) != [(row, col) for row in range(len(tops)) for col in range(len(lefts))]:
            return None
        return cls(whole[0], place, len(tops), len(lefts))

    def cut(self, tiles: Sequence[Tile], seen: Tensor) -> dict[int, Tensor]:
        """What the thumbnail says of each crop's tokens: seen (layers, n) over its own tokens, spread by
        bilinear interpolation over the tokens of all crops together: {crop: (layers, n of the crop)}."""
        number = {at: crop for crop, at in self.place.items()}
        heights = [tiles[number[row, 0]].grid[0] for row in range(self.rows)]
        widths = [tiles[number[0, col]].grid[1] for col in range(self.cols)]
        own = seen.unflatten(1, tiles[self.thumbnail].grid)[None].float()  # (1, layers, h, w)
        size = (sum(heights), sum(widths))
        spread = F.interpolate(own, size, mode="bilinear", align_corners=False)[0]
        return {
            number[row, col]: piece.flatten(1)
            for row, band in enumerate(spread.split(heights, dim=1))
            for col, piece in enumerate(band.split(widths, dim=2))
        }


def _edge(tile: Tile, axis: int) -> float:
    return round(tile.box[axis], _DIGITS)
