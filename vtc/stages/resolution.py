"""For the down-sampled baseline: the encoder sees a smaller picture, its tokens are spread over the grid."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import low_grid, nearest
from ..hosts import Vision
from ..threads import ByThread
from ..tokens import count_kept


class LowResolution:
    """Shrinks the picture in front of the encoder and copies each projected token to the patches it covers.

    The projector works token by token, so the copies are exact: what follows (un-padding, newline tokens)
    finds the shape it expects, and the features stage then keeps one copy of each low-resolution token.
    """

    def __init__(self, vision: Vision, stage: Any):
        if not vision.encoder.resizable:
            raise ValueError(
                f"{type(vision.encoder.tower).__name__} cannot see smaller pictures: use 'pool' or 'uniform'"
            )
        self.vision, self._stage = vision, stage  # its `keep` may change between calls
        self._sizes: ByThread[tuple[tuple[int, int], tuple[int, int]]] = ByThread()  # full and low grid
        self._hooks: list[Any] = []

    def install(self) -> None:
        self._hooks = [
            self.vision.encoder.tower.register_forward_pre_hook(self._shrink, with_kwargs=True),
            self.vision.projector.register_forward_hook(self._spread),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._sizes.clear()

    def check(self, keep: int | float) -> None:
        if self.vision.host.tiled and isinstance(keep, int):
            raise ValueError(
                f"'downsample' on {self.vision.host.name} takes keep as a fraction: its images have "
                "different numbers of tiles, which all go through the encoder at one resolution"
            )

    def forget(self) -> None:
        """The picture of this thread is done with."""
        self._sizes.pop()

    def cells(self, patches: Tensor) -> Tensor:
        """The low-resolution token under each patch (rows, n), counted over an encoder row."""
        grid, low = self._sizes.get()
        return nearest(grid, low, patches.device)[patches % (grid[0] * grid[1])]

    def _shrink(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]  # (rows, 3, H, W)
        patch = self.vision.encoder.tower.config.patch_size
        grid = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        low = low_grid(grid, count_kept(self._stage.keep, grid[0] * grid[1]))
        self._sizes.set((grid, low))
        if low == grid:
            return args, kwargs
        size = low[0] * patch, low[1] * patch
        small = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
        kwargs = {**kwargs, "pixel_values": small, "interpolate_pos_encoding": True}
        return args[1:] if args else args, kwargs

    def _spread(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # Without sizes no picture is under way: a projector copied alone has a copy of this hook.
        grid, low = self._sizes.get() or (None, None)
        if low == grid:
            return output
        first = output.shape[1] - low[0] * low[1]  # CLS, where the host keeps it
        cell = nearest(grid, low, output.device)
        return torch.cat([output[:, :first], output[:, first:][:, cell]], dim=1)  # (rows, first + N, D)
