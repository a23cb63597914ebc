from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Grid, Resampler
from ..grids import as_map, as_tokens
from ..registry import register_module


@register_module
class LDPv2(Resampler):
    """An MLP for each token, average pooling, and a depthwise convolution added (MobileVLM V2's projector).

    "MobileVLM V2: Faster and Stronger Baseline for Vision Language Model", arXiv:2402.03766; names and shapes
    of the parameters as in github.com/Meituan-AutoML/MobileVLM.

    Input: x (B, N, in_width) of any grid. Output: (B, k, out_width), row by row.

    Departures: the authors' code gives 12 x 12 tokens whatever the grid; here `shapes` are the grids that may
    come out, each (rows, columns), and k chooses among them. The convolution has no size of its own, so that
    one set of weights serves them all. ValueError where a shape is larger than the grid, or two have the same
    number of tokens.
    """

    name = "ldpv2"
    paper = "arXiv:2402.03766"
    weights = "Apache-2.0"
    prefixes = ("model.mm_projector.", "mm_projector.")
    place = "instead"

    @dataclass(frozen=True)
    class Config:
        in_width: int = 1024
        out_width: int = 2560
        shapes: tuple[tuple[int, int], ...] = ((12, 12),)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        self.by_count = {rows * columns: (rows, columns) for rows, columns in c.shapes}
        if not c.shapes or len(self.by_count) < len(c.shapes) or min(map(min, c.shapes)) < 1:
            raise ValueError(
                f"shapes are grids (rows, columns), each of another number of tokens: {c.shapes}"
            )
        mlp = nn.Sequential(
            nn.Linear(c.in_width, c.out_width), nn.GELU(), nn.Linear(c.out_width, c.out_width)
        )
        conv = nn.Conv2d(c.out_width, c.out_width, 3, padding=1, groups=c.out_width)
        # two levels of names, as published
        self.mlp = nn.Sequential(OrderedDict(mlp=mlp))
        self.peg = nn.Sequential(OrderedDict(peg=nn.Sequential(conv)))

    def counts(self, n: int) -> tuple[int, ...]:
        return tuple(sorted(count for count in self.by_count if count <= n))

    def counts_for(self, grid: Grid) -> tuple[int, ...]:
        fitting = [k for k, (a, b) in self.by_count.items() if a <= grid[0] and b <= grid[1]]
        if not fitting:
            raise ValueError(f"no shape of {self.config.shapes} fits into a grid of {grid[0]} x {grid[1]}")
        return tuple(sorted(fitting))

    def shape(self, grid: Grid, k: int) -> Grid:
        return self.by_count[k]

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        k = self.checked(x, grid, k, levels)
        x = as_map(self.mlp(x), grid)  # (B, out_width, rows, columns)
        x = F.adaptive_avg_pool2d(x.float(), self.by_count[k]).to(x.dtype)
        return as_tokens(self.peg(x) + x)
