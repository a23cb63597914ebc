"""Features in units in which each channel is about 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Grid


class Calibrated(nn.Module):
    """What a module inherits, in front of its kind, that knows mean and deviation of its features."""

    def _uncalibrated(self, width: int) -> None:
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def begin(self, found: Sequence[tuple[Tensor, Grid]], projector: nn.Module | None) -> None:
        self.calibrate(torch.cat([x.flatten(0, 1) for x, _ in found]))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Takes mean and standard deviation of each channel from features (..., D) of many images."""
        x = x.flatten(0, -2).float()
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0).clamp(min=1e-4 * float(x.std()) + 1e-8))

    def units(self, x: Tensor) -> Tensor:
        """Features in calibrated units, float32."""
        return (x.float() - self.mean.float()) / self.std.float()
