"""Tokens of a grid as a map, and its windows: cut out, put back, averaged."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

PADDINGS = {"edge": "replicate", "zeros": "constant"}


def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, D) to (B, D, rows, columns)."""
    return x.transpose(1, 2).unflatten(2, grid)


def as_tokens(x: Tensor) -> Tensor:
    """(B, D, rows, columns) to (B, N, D), row by row."""
    return x.flatten(2).transpose(1, 2)


def windows(x: Tensor, grid: tuple[int, int], side: int, padding: str = "edge") -> Tensor:
    """Tokens (B, N, D), row by row, to their windows of side x side: (B, M, side * side, D).

    Windows are in row-major order, and so are the tokens of each. A grid that `side` does not divide is
    padded at the bottom and at the right, with its last rows and columns ("edge") or with "zeros".
    """
    rows, columns = grid
    x = x.unflatten(1, grid)  # (B, rows, columns, D)
    if rows % side or columns % side:
        x = x.permute(0, 3, 1, 2)
        x = F.pad(x, (0, -columns % side, 0, -rows % side), mode=PADDINGS[padding]).permute(0, 2, 3, 1)
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, rows', side, columns', side, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The inverse of `windows`: (B, M, side * side, D) to the tokens (B, N, D) without padding."""
    rows, columns = grid
    x = x.unflatten(2, (side, side)).unflatten(1, (-(-rows // side), -(-columns // side)))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, rows and padding, columns and padding, D)
    return x[:, :rows, :columns].flatten(1, 2)


def pool(x: Tensor, grid: tuple[int, int], k: int) -> Tensor:
    """Averages of tokens (B, N, D), row by row, over k cells of the grid: (B, k, D), summed in float32.

    The grid is cut into bands of rows, as many as make cells about as wide as high, and each band into its
    share of the k cells. Where k = n * n and the grid is square, that is adaptive average pooling to n x n:
    neighbouring cells share tokens where n does not divide the side, and the mean of the cells is the mean of
    the tokens where it does. For other k some bands have one cell more. k = N gives the tokens themselves.
    """
    rows, columns = grid
    if k == rows * columns:
        return x
    shares = _shares(grid, k)
    bands = len(shares)
    y = as_map(x.float(), grid)  # (B, D, rows, columns)
    if k % bands == 0:
        y = F.adaptive_avg_pool2d(y, (bands, k // bands)).flatten(2)
    else:
        y = F.adaptive_avg_pool2d(y, (bands, columns))
        y = torch.cat([F.adaptive_avg_pool1d(y[:, :, i], n) for i, n in enumerate(shares)], 2)
    return y.transpose(1, 2).to(x.dtype)


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # what is kept here may be needed in training later
def spread(grid: tuple[int, int], k: int, shape: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """k places spread over a grid, row by row: (k,), each in the middle of its cell, and the cell that each
    token is in: (N,). Cells are those of a grid of this shape, or of `pool`, and share no tokens."""
    rows, columns = grid
    shares = _shares(grid, k) if shape is None else [shape[1]] * shape[0]
    bands = torch.arange(rows) * len(shares) // rows  # (rows,)
    first = torch.tensor([0, *shares]).cumsum(0)
    cells = torch.stack(
        [first[band] + torch.arange(columns) * shares[band] // columns for band in bands.tolist()]
    )
    middles = []
    for cell in range(k):
        row, column = (places.unique() for places in (cells == cell).nonzero().unbind(1))
        middles.append(int(row[(len(row) - 1) // 2]) * columns + int(column[(len(column) - 1) // 2]))
    return torch.tensor(middles), cells.flatten()


def _shares(grid: tuple[int, int], k: int) -> list[int]:
    """How many of k cells each band of rows has."""
    rows, columns = grid
    bands = min(rows, k, max(1, -(-k // columns), round(math.sqrt(k * rows / columns))))
    return [(i + 1) * k // bands - i * k // bands for i in range(bands)]
