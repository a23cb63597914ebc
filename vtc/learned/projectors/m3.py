from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..base import Grid, Resampler, square
from ..grids import as_map, as_tokens
from ..registry import register_module


@register_module
class NestedPool(Resampler):
    """Averages over equal square windows, from every token to one of the whole image (M3).

    "Matryoshka Multimodal Models", arXiv:2405.17430; github.com/mu-cai/matryoshka-mm. It has no parameters:
    the paper trains the model around it, with the language loss averaged over the scales `counts_for` of one
    image, five of them: windows of 1, 2, 4, 8 and 24 on a grid of 24 x 24. It pools what the projector has
    made, not what it is given.

    Input: x (B, N, width). Output: (B, k, width), row by row; k = N is x itself.

    Departures: any common divisor of rows and columns is a window; a number of tokens that no window gives
    raises ValueError, where the authors' code rounds the window down and gives another number.
    """

    name = "m3"
    paper = "arXiv:2405.17430"
    weights = "no parameters"
    place = "behind"

    @dataclass(frozen=True)
    class Config:
        """windows: those to use; none: all that divide the grid."""

        width: int = 4096
        windows: tuple[int, ...] = ()

    @property
    def in_width(self) -> int:
        return self.config.width

    def counts(self, n: int) -> tuple[int, ...]:
        return self.counts_for(square(n))

    def counts_for(self, grid: Grid) -> tuple[int, ...]:
        return tuple(sorted(self._windows(grid)))

    def _windows(self, grid: Grid) -> dict[int, int]:
        """The number of tokens that each window gives, and the window."""
        sides = range(1, (most := math.gcd(*grid)) + 1)
        sides = [side for side in sides if most % side == 0 and side in (self.config.windows or sides)]
        if not sides:
            raise ValueError(f"no window of {self.config.windows} divides a grid of {grid[0]} x {grid[1]}")
        return {grid[0] * grid[1] // side**2: side for side in sides}

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        k = self.checked(x, grid, k, levels)
        side = self._windows(grid)[k]
        if side == 1:
            return x
        return as_tokens(F.avg_pool2d(as_map(x.float(), grid), side)).to(x.dtype)
