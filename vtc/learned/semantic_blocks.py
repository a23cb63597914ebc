"""Blocks that make semantic tokens of windows and read them (STViT, arXiv:2303.08685).

Parameters have the names of the official code, changsn/STViT-R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Grid
from .grids import as_map, as_tokens, from_windows
from .mlp import Mlp
from .proxy_windows import check_tiling, partition
from .replacement import attend

POOLS = {"max": F.adaptive_max_pool2d, "mean": F.adaptive_avg_pool2d}
LAYER_SCALE = 1e-5  # at first


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, T, width) reads y (B, S, width)."""
        return self.proj(attend(self.q(x), *self.kv(y).chunk(2, -1), self.heads))


class SemanticBlock(nn.Module):
    """A pre-norm block whose tokens read those of another set, or themselves; its branches start at 1e-5.

    window: tokens (a square map) read themselves within windows of that side.
    """

    def __init__(
        self, width: int, heads: int, ratio: float, qkv_bias: bool, window: int | None = None
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CrossAttention(width, heads, qkv_bias)
        self.mlp = Mlp(width, int(width * ratio), width)
        self.layer_scale_1 = nn.Parameter(torch.full((width,), LAYER_SCALE))
        self.layer_scale_2 = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, x: Tensor, y: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """x (B, T, width), y (B, S, width); grid: of x, where there are windows."""
        normed = self.norm1(x)
        if self.window is not None:
            windows = partition(normed, grid, self.window)  # (B, P, n, width)
            read = self.attn(windows.flatten(0, 1), windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
            read = from_windows(read, grid, self.window)
        else:
            read = self.attn(normed, normed if y is None else self.norm1(y))
        return self.finish(x + self.layer_scale_1 * read)

    def finish(self, x: Tensor) -> Tensor:
        return x + self.layer_scale_2 * self.mlp(self.norm2(x))


class SemanticAttentionBlock(SemanticBlock):
    """Semantic tokens of windows: pooled tokens that read their window and some tokens around it.

    Each window of window * window tokens gives sample * sample semantic tokens. What they read is themselves
    and an area of `area` * `area` tokens. Areas are spread evenly over the map, the first and last at its
    edges; with 14 x 14 tokens, windows of 7 and areas of 10 they are those of the paper's code.
    """

    def __init__(
        self, width: int, heads: int, ratio: float, qkv_bias: bool, sizes: tuple[int, int, int], pool: str
    ) -> None:
        super().__init__(width, heads, ratio, qkv_bias)
        (self.side, self.sample, self.area), self.pool = sizes, pool
        self.shortcut = True

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, N, width) to (B, windows * sample^2, width), row by row of the semantic tokens' own map."""
        windows = partition(x, grid, self.side)  # (B, P, n, width)
        b, p = windows.shape[:2]
        maps = as_map(windows.flatten(0, 1), (self.side, self.side))
        pooled = as_tokens(POOLS[self.pool](maps, (self.sample, self.sample)))  # (B * P, sample^2, width)
        read = torch.cat([pooled, areas(x, grid, self.side, self.area).flatten(0, 1)], 1)
        told = self.layer_scale_1 * self.attn(self.norm1(pooled), self.norm1(read))
        told = pooled + told if self.shortcut else told
        own = semantic_grid(grid, self.side, self.sample)
        return self.finish(from_windows(told.unflatten(0, (b, p)), own, self.sample))


def semantic_grid(grid: Grid, window: int, sample: int) -> Grid:
    return grid[0] // window * sample, grid[1] // window * sample


def areas(x: Tensor, grid: Grid, window: int, area: int) -> Tensor:
    """(B, N, width) to what each window's semantic tokens read: (B, P, area * area, width)."""
    rows, columns = (_starts(side, window, area, x.device) for side in grid)
    step = torch.arange(area, device=x.device)
    rows, columns = rows[:, None] + step, columns[:, None] + step  # (windows, area)
    place = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]  # (R, C, area, area)
    return x[:, place.flatten(2).flatten(0, 1)]


def check_area(grid: Grid, window: int, area: int) -> None:
    check_tiling(grid, window)
    if min(grid) < area:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} tokens is smaller than an area of {area} x {area}")


def _starts(side: int, window: int, area: int, device: torch.device) -> Tensor:
    """Where the areas of the windows along one side start, in tokens."""
    windows = side // window
    return torch.arange(windows, device=device) * (side - area) // max(windows - 1, 1)
