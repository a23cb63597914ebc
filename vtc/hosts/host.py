"""What the library knows of a family of models, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import Tile

if TYPE_CHECKING:
    from . import Vision


@dataclass
class Layout:
    """Where the patch tokens of one image or video lie among the tokens that it sends to the language model.

    tiles    its rectangles of patch tokens: the whole image, its tiles, or the frames of a video
    patches  for each tile (n, m): the encoder tokens behind each of its n tokens, counted over all encoder
             rows of the call one after the other, CLS and registers not counted; m > 1 where the projector
             merges. None where no patches are behind them: queries of a resampler, a convolutional map
    pixels   what the encoder was given for this image: tells pictures apart, nothing else is read from it
    length   all its tokens, where there are others beside patch tokens: CLS, newlines, separators
    """

    tiles: list[Tile]
    patches: list[Tensor] | None
    pixels: Tensor
    length: int = 0

    def __post_init__(self):
        self.length = self.length or self.n

    @property
    def n(self) -> int:
        """How many patch tokens the image has; newline tokens and CLS are not counted."""
        return sum(len(tile.slots) for tile in self.tiles)

    def to(self, device: torch.device) -> Layout:
        tiles = [replace(tile, slots=tile.slots.to(device)) for tile in self.tiles]
        patches = None if self.patches is None else [patches.to(device) for patches in self.patches]
        return replace(self, tiles=tiles, patches=patches)


# (the host, arguments of get_image_features or get_video_features, the items it returned) -> the layout of
# each image, in the order of their tokens. An item may be an image, a tile, a frame, or a prompt's images.
LayoutFunction = Callable[["Vision", dict[str, Any], list[Tensor]], list[Layout]]


@dataclass(frozen=True)
class Host:
    """One family. `tower`, `video_tower` and `projector` are attribute paths from the base model.

    model_types what configs call it; its name where none are given
    layout      of images; None where the family has none
    video       of videos; None where the family has none
    features    the field of the features' output that is put into the prompt
    deep        the field with further features of the same tokens, for early decoder layers (DeepStack)
    tiled       an image may become several encoder rows
    latent      tokens are queries of a resampler: no attention or keys of patches belong to them
    cls_last    CLS stands behind the patches, not in front of them
    late        the projector works on the features in forward, when they are put into the prompt
    blocks_everywhere  image tokens see each other in all decoder layers
    slots       sparse decoder layers take positions for places in the cache
    base        path from the model's base to the module that makes the features, where it is another one
    reader      path from the model's base to a decoder of its own that reads what became of the prompt
    memory      images are not in the prompt: layers of cross-attention look at them
    resizable   the tower takes smaller pictures, and the projector works token by token
    """

    name: str
    layout: LayoutFunction | None = None
    video: LayoutFunction | None = None
    model_types: tuple[str, ...] = ()
    tower: str = "vision_tower"
    video_tower: str | None = None
    projector: str = "multi_modal_projector"
    features: str = "pooler_output"
    deep: str | None = None
    tiled: bool = False
    latent: bool = False
    cls_last: bool = False
    late: bool = False
    base: str = ""
    reader: str = ""
    slots: bool = False
    blocks_everywhere: bool = False
    memory: bool = False
    resizable: bool = False

    def __post_init__(self):
        object.__setattr__(self, "model_types", self.model_types or (self.name,))
