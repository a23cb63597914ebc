from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..transformer import initialise
from .base import Grid, LearnedModule, Resampler, square
from .in_encoder import BetweenBlocks
from .registry import register_module
from .replacement import check_grid, check_heads
from .semantic_blocks import POOLS, SemanticAttentionBlock, SemanticBlock, check_area, semantic_grid


class _Semantic(nn.Module):
    """The first two blocks, which make semantic tokens, as parameters `blocks.1` and `blocks.2`."""

    def _make(self, c: Any, width: int) -> None:
        check_heads(width, c.heads)
        if c.pool not in POOLS:
            raise ValueError(f"pool is one of {', '.join(POOLS)}, not {c.pool!r}")
        if not 1 <= c.sample <= c.window <= c.area:
            raise ValueError(
                f"sample is at most window and window at most area, not {c.sample}, {c.window} and {c.area}"
            )
        first = SemanticAttentionBlock(
            width, c.heads, c.ratio, c.qkv_bias, (c.window, c.sample, c.area), c.pool
        )
        first.shortcut = c.shortcut
        second = SemanticBlock(width, c.heads, c.ratio, c.qkv_bias)
        self.blocks = nn.ModuleDict({"1": first, "2": second})
        if c.centres:
            self.semantic_token2 = nn.Parameter(torch.zeros(1, c.centres, width))
            nn.init.trunc_normal_(self.semantic_token2, std=0.02)

    def semantic(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, N, width) to its semantic tokens (B, S, width)."""
        first = self.blocks["1"](x, grid)
        queries = first
        if self.config.centres:
            if first.shape[1] != self.config.centres:
                raise ValueError(
                    f"a grid of {grid[0]} x {grid[1]} gives {first.shape[1]} semantic tokens; there are "
                    f"{self.config.centres} learned centres: make {self.name} with centres for this grid"
                )
            queries = first + self.semantic_token2
        return self.blocks["2"](queries, torch.cat([first, x], 1))


@register_module
class SemanticTokens(BetweenBlocks, Resampler, _Semantic):
    """Pooled tokens of windows, which read what is around them and then all of the image (STViT).

    Semantic tokens (arXiv:2303.08685) as the image's tokens. Starts as pooled tokens to 1e-5, and where there
    are `centres` as pooled tokens plus those. Parameters have the names they have in `Dumbbell`. Gives
    sample^2 / window^2 of the tokens, of grids that windows tile.
    """

    name = "semantic-tokens"
    paper = "arXiv:2303.08685"

    @dataclass(frozen=True)
    class Config:
        """window, sample, area: sides, see `SemanticAttentionBlock`. pool: "max", as in the paper's code, or
        "mean". centres: how many learned centres are added to the semantic tokens, 0 or as many as these.
        shortcut: pooled tokens are added to what they have read, as in the paper; the code's default is not.
        """

        in_width: int = 1024
        heads: int = 16
        window: int = 6
        sample: int = 2
        area: int = 6
        pool: str = "mean"
        ratio: float = 4.0
        qkv_bias: bool = True
        centres: int = 0
        shortcut: bool = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._make(config, config.in_width)
        initialise(self)

    def counts(self, n: int) -> list[int]:
        return self.counts_for(square(n))

    def counts_for(self, grid: Grid) -> list[int]:
        check_area(grid, self.config.window, self.config.area)
        return [math.prod(semantic_grid(grid, self.config.window, self.config.sample))]

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        """(B, k, in_width), row by row of the semantic tokens' own map."""
        self.checked(x, grid, k, levels)
        return self.semantic(x, grid)


@register_module
class Dumbbell(LearnedModule, _Semantic):
    """Semantic tokens that attend to each other and are read by all tokens again (STViT-R's dumbbell unit).

    The unit of arXiv:2303.08685 without its first block: semantic tokens are made, attend within windows and
    globally, and all tokens read them. (B, N, width) in and out. For the place of some layers of an encoder,
    or behind one: starts as the identity to 1e-5 of what is read.

    Parameters are those of the official code (blocks 1 to 5 of a unit of changsn/STViT-R; the first, block 0,
    is one of Swin). `rename` takes a unit's blocks from a published model's third stage; other units than the
    first have no centres.

    Departures: other grids than 14 x 14 can be taken, which need not be square; `conv_pos` and relative
    positions, which are off by default, are left out.
    """

    name = "dumbbell"
    paper = "arXiv:2303.08685"
    weights = "MIT"

    @dataclass(frozen=True)
    class Config:
        """See `SemanticTokens.Config`; the defaults are those of STViT-R-Swin-S as its code runs."""

        width: int = 384
        heads: int = 12
        window: int = 7
        sample: int = 3
        area: int = 10
        pool: str = "max"
        ratio: float = 4.0
        qkv_bias: bool = True
        centres: int = 0
        shortcut: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        self._make(c, c.width)
        for name, window in (("3", c.sample), ("4", None), ("5", None)):
            self.blocks[name] = SemanticBlock(c.width, c.heads, c.ratio, c.qkv_bias, window)
        initialise(self)

    @classmethod
    def rename(cls, state: dict[str, Tensor], unit: int = 0) -> dict[str, Tensor]:
        """The blocks of a unit (0, 1 or 2) of a published model's third stage; a state dict of a unit is as
        it is. The centres are the first unit's."""
        prefix = "layers.2."
        if not any(key.startswith(prefix) for key in state):
            return state
        own = {f"{prefix}blocks.{6 * unit + i}.": f"blocks.{i}." for i in range(1, 6)}
        if unit == 0:
            own[f"{prefix}semantic_token2"] = "semantic_token2"
        return {
            new + key.removeprefix(old): value
            for old, new in own.items()
            for key, value in state.items()
            if key.startswith(old)
        }

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Raises ValueError for a grid that windows do not tile or that is smaller than an area."""
        c = self.config
        check_grid(self.name, x, grid, c.width)
        check_area(grid, c.window, c.area)
        tokens = self.semantic(x, grid)
        tokens = self.blocks["3"](tokens, grid=semantic_grid(grid, c.window, c.sample))
        tokens = self.blocks["4"](tokens)
        return self.blocks["5"](x, tokens)
