"""Windows of a grid and the proxies that stand for them."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Grid
from .grids import windows as windows_of

POOLS = ("strided_mean", "block_mean", "first", "random")


def partition(x: Tensor, grid: Grid, window: int) -> Tensor:
    """(B, N, width) to (B, P, window * window, width), windows and their tokens row by row. The inverse is
    `grids.from_windows`.

    Raises ValueError for a grid that windows do not tile.
    """
    check_tiling(grid, window)
    return windows_of(x, grid, window)


def pooled(windows: Tensor, window: int, proxies: int, pool: str, training: bool = False) -> Tensor:
    """(B, P, window * window, width) to (B, P, proxies * proxies, width); see `ProxyAttention.Config`."""
    step = window // proxies
    if pool in ("strided_mean", "first"):
        x = windows.unflatten(2, (step, proxies, step, proxies)).transpose(3, 4)  # (B, P, i, j, y, z, width)
        x = x.flatten(4, 5).flatten(2, 3)  # (B, P, step^2, proxies^2, width)
        return x.mean(2) if pool == "strided_mean" else x[:, :, 0]
    x = windows.unflatten(2, (proxies, step, proxies, step)).transpose(3, 4)  # (B, P, y, z, i, j, width)
    x = x.flatten(4, 5).flatten(2, 3)  # (B, P, proxies^2, step^2, width)
    if pool == "block_mean" or not training:
        return x.mean(3)
    chosen = torch.randint(step * step, (*x.shape[:3], 1, 1), device=x.device)
    return x.gather(3, chosen.expand(-1, -1, -1, 1, x.shape[4]))[:, :, :, 0]


def check_windows(window: int, proxies: int, pool: str) -> None:
    if pool not in POOLS:
        raise ValueError(f"pool is one of {', '.join(POOLS)}, not {pool!r}")
    if not 1 <= proxies <= window or window % proxies:
        raise ValueError(f"proxies divides window; {proxies} does not divide {window}")


def check_tiling(grid: Grid, window: int) -> None:
    if grid[0] % window or grid[1] % window:
        raise ValueError(
            f"windows of {window} x {window} do not tile a grid of {grid[0]} x {grid[1]} tokens: choose "
            "another window"
        )
