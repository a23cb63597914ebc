from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import initialise
from ..base import Grid, Resampler
from ..grids import as_map, as_tokens, pool
from ..registry import register_module


class GatedMLP(nn.Module):
    """Layer norm and SwiGLU, with biases."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        self.f1 = nn.Linear(width, hidden)  # the gate
        self.f2 = nn.Linear(width, hidden)
        self.g = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layernorm(x)
        return self.g(F.silu(self.f1(x)) * self.f2(x))


@register_module
class TokenFlex(Resampler):
    """Averages over the cells of a grid, then a gated MLP: one set of weights for any number of tokens.

    "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference", arXiv:2504.03154: adaptive average
    pooling to n x n tokens, layer norm, SwiGLU. Names and shapes of the parameters are those of Ristretto
    (huggingface.co/LiAutoAD/Ristretto-3B), a model of the same laboratory with this projector. In training
    `draw` gives one number of tokens for a step, one of `train_counts` with `train_probs`.

    Input: x (B, N, in_width) of any grid. Output: (B, k, out_width), 1 <= k <= N, row by row; see
    `vtc.learned.grids.pool` for the cells, which overlap where n does not divide the side of the grid.
    With `resize`, as Ristretto's code has it, the grid is first enlarged bilinearly (corners on corners) to
    the next multiple of n; its weights want that. Then k = n * n, and n is at most the shorter side.

    Departures: numbers of tokens that are no n * n and grids that are not square, which the paper does not
    have; probabilities are equal unless given. The paper trains with 64, 144 and 256 of 1024 tokens: quality
    is not to be expected much below or above what was trained.
    ValueError for other numbers of tokens, and where none of `train_counts` fits a grid.
    """

    name = "tokenflex"
    paper = "arXiv:2504.03154"
    weights = "Apache-2.0"
    prefixes = ("projector.",)
    place = "instead"

    @dataclass(frozen=True)
    class Config:
        """hidden: of the gated MLP; None: 3 * in_width. train_probs: none for equal ones."""

        in_width: int = 1152
        out_width: int = 2048
        hidden: int | None = None
        resize: bool = False
        train_counts: tuple[int, ...] = (64, 144, 256)
        train_probs: tuple[float, ...] = ()

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if not c.train_counts or len(c.train_probs) not in (0, len(c.train_counts)):
            raise ValueError("train_probs are as many as train_counts, or none")
        if any(p < 0 for p in c.train_probs) or (c.train_probs and sum(c.train_probs) <= 0):
            raise ValueError("train_probs are not negative and not all zero")
        self.mlp = GatedMLP(c.in_width, c.hidden or 3 * c.in_width, c.out_width)
        initialise(self)

    def counts(self, n: int) -> Sequence[int]:
        """Of a square grid, or of the largest square in n tokens."""
        if self.config.resize:
            return tuple(side * side for side in range(1, math.isqrt(n) + 1))
        return range(1, n + 1)

    def counts_for(self, grid: Grid) -> Sequence[int]:
        return self.counts(min(grid) ** 2 if self.config.resize else grid[0] * grid[1])

    def shape(self, grid: Grid, k: int) -> Grid | None:
        return (math.isqrt(k), math.isqrt(k)) if self.config.resize else None

    def draw(self, grid: Grid, generator: torch.Generator | None = None) -> int:
        c, counts = self.config, self.counts_for(grid)
        probs = c.train_probs or (1.0,) * len(c.train_counts)
        fitting = [(k, p) for k, p in zip(c.train_counts, probs) if k in counts and p > 0]
        if not fitting:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} gives none of train_counts {c.train_counts}")
        drawn = torch.multinomial(torch.tensor([p for _, p in fitting]), 1, generator=generator)
        return fitting[int(drawn)][0]

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        k = self.checked(x, grid, k, levels)
        return self.mlp(_resized_pool(x, grid, k) if self.config.resize else pool(x, grid, k))


def _resized_pool(x: Tensor, grid: Grid, k: int) -> Tensor:
    """Averages over n x n equal windows, k = n * n, of the grid enlarged to multiples of n."""
    n = math.isqrt(k)
    size = [-(-side // n) * n for side in grid]
    y = as_map(x.float(), grid)  # (B, D, rows, columns)
    if size != [*grid]:
        y = F.interpolate(y, size, mode="bilinear", align_corners=True)
    return as_tokens(F.adaptive_avg_pool2d(y, n)).to(x.dtype)
