"""What happened to each image in the last forward: `Handle.last` is a list of `Record`s."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the picture

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass
class Tile:
    """A rectangle of an image's tokens: the whole image, a tile of it, its thumbnail, or a video frame.

    slots      (n,) where its tokens lie in the image's own token order, raster order within the tile
    grid       (rows, cols), rows * cols == n
    box        the part of the picture it shows; what is padding there lies outside of the picture
    thumbnail  True for the whole-image view of a tiled image
    latent     True where its tokens are queries of a resampler: none belongs to a place in the box
    """

    slots: Tensor
    grid: tuple[int, int]
    box: Box = WHOLE
    thumbnail: bool = False
    latent: bool = False


@dataclass
class Record:
    """One image of the last forward; positions count the image's own tokens, newline tokens included.

    index     (K,) positions that stayed, ascending
    source    (N,) the slot 0..K-1 each token went into, -1 if dropped
    grid      (rows, cols) of the image, of its thumbnail where it is tiled
    tiles     every rectangle of patch tokens in the image; one where it is not tiled
    entering  tokens of this image that entered each part: {"features": N, "decoder": K}; where the encoder
              itself reduced them {"encoder": N, "out": K}
    blocks    {block: (index, source)} after each encoder block that reduced tokens, in the patches of the
              whole image; depth: how many blocks there are
    order     (K,) the slot of each patch token that the encoder gives, in the order in which it gives them,
              which may be another (ToMe's). Patches un-merged: x[order.argsort()][source]
    """

    index: Tensor
    source: Tensor
    grid: tuple[int, int]
    tiles: list[Tile] = field(default_factory=list)
    entering: dict[str, int] = field(default_factory=dict)
    blocks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    order: Tensor | None = None
    depth: int = 0

    @property
    def latent(self) -> bool:
        """True where its tokens belong to no places in the picture, so that none can be drawn."""
        return any(tile.latent for tile in self.tiles)
