"""What happened to each image in the last forward: `Handle.last` is a list of `Record`s."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Tile:
    """A rectangle of an image's tokens: the whole image, a tile of it, its thumbnail, or a video frame.

    slots      (n,) where its tokens lie in the image's own token order, raster order within the tile
    grid       (rows, cols), rows * cols == n
    box        (left, top, right, bottom) of the picture it shows, as fractions of the image
    thumbnail  True for the whole-image view of a tiled image
    """

    slots: Tensor
    grid: tuple[int, int]
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    thumbnail: bool = False


@dataclass
class Record:
    """One image of the last forward; positions count the image's own tokens, newline tokens included.

    index     (K,) positions that stayed, ascending
    source    (N,) the slot 0..K-1 each token went into, -1 if dropped
    grid      (rows, cols) of the image, of its thumbnail where it is tiled
    tiles     every rectangle of patch tokens in the image; one where it is not tiled
    entering  tokens of this image that entered each part: {"features": N, "decoder": K}
    """

    index: Tensor
    source: Tensor
    grid: tuple[int, int]
    tiles: list[Tile] = field(default_factory=list)
    entering: dict[str, int] = field(default_factory=dict)
