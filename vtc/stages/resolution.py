"""For the down-sampled baseline: the encoder sees a smaller picture, its tokens are spread over the grid."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import low_grid, nearest
from ..hosts import Vision
from ..tokens import count_kept


class LowResolution:
    """Shrinks the picture in front of the encoder and copies each projected token to the patches it covers.

    The projector works token by token, so the copies are exact: what follows (un-padding, newline tokens)
    finds the shape it expects, and the features stage then keeps one copy of each low-resolution token.
    """

    def __init__(self, vision: Vision):
        if vision.encoder.tower.config.model_type not in ("clip_vision_model", "siglip_vision_model"):
            raise ValueError(
                f"{type(vision.encoder.tower).__name__} cannot see smaller pictures: use 'pool' or 'uniform'"
            )
        self.vision = vision
        self._hooks: list[Any] = []

    def install(self, stage: Any) -> None:
        self._stage = stage  # its `keep` may change between calls
        self._hooks = [
            self.vision.encoder.tower.register_forward_pre_hook(self._shrink, with_kwargs=True),
            self.vision.projector.register_forward_hook(self._spread),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def check(self, keep: int | float) -> None:
        if self.vision.host.tiled and isinstance(keep, int):
            raise ValueError(
                f"'downsample' on {self.vision.host.name} takes keep as a fraction: its images have "
                "different numbers of tiles, which all go through the encoder at one resolution"
            )

    def _shrink(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]  # (rows, 3, H, W)
        patch = self.vision.encoder.tower.config.patch_size
        self._grid = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        self._low = low_grid(self._grid, count_kept(self._stage.keep, self._grid[0] * self._grid[1]))
        if self._low == self._grid:
            return args, kwargs
        size = self._low[0] * patch, self._low[1] * patch
        small = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
        kwargs = {**kwargs, "pixel_values": small, "interpolate_pos_encoding": True}
        return args[1:] if args else args, kwargs

    def _spread(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self._low == self._grid:
            return output
        first = output.shape[1] - self._low[0] * self._low[1]  # CLS, where the host keeps it
        cell = nearest(self._grid, self._low, output.device)
        return torch.cat([output[:, :first], output[:, first:][:, cell]], dim=1)  # (rows, first + N, D)
