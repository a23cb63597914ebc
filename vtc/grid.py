"""Cutting a grid of patches into exactly k regions of about the same size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def low_grid(grid: tuple[int, int], k: int) -> tuple[int, int]:
    """The (rows, cols) of at least k cells in about the shape of `grid` that wastes the fewest cells."""
    rows, cols = grid
    ideal = math.sqrt(k * rows / cols)
    least, most = math.ceil(k / cols), min(rows, k)
    options = {min(max(r, least), most) for r in (math.floor(ideal), math.ceil(ideal))}
    return min(((r, math.ceil(k / r)) for r in options), key=lambda g: (g[0] * g[1], abs(g[0] - ideal)))


def regions(grid: tuple[int, int], k: int, device: torch.device) -> Tensor:
    """The region 0..k-1 of every patch, raster order: (rows * cols,). Regions are rectangles.

    Bands of rows are cut into columns; where k is no multiple of the number of bands, some bands have one
    column less, spread evenly.
    """
    rows, cols = grid
    bands, _ = low_grid(grid, k)
    band = torch.arange(rows, device=device) * bands // rows  # (rows,) band of each row
    edges = torch.arange(bands + 1, device=device) * k // bands  # first region of each band
    width = edges.diff()[band]  # (rows,) how many columns this row's band has
    column = torch.arange(cols, device=device)[None] * width[:, None] // cols  # (rows, cols)
    return (edges[band][:, None] + column).flatten()


def centres(grid: tuple[int, int], k: int, device: torch.device) -> Tensor:
    """The patch nearest to the centre of each of the k regions, ascending: (k,)."""
    rows, cols = grid
    region = regions(grid, k, device)
    place = torch.stack(
        [
            torch.arange(rows, device=device).repeat_interleave(cols),
            torch.arange(cols, device=device).repeat(rows),
        ],
        1,
    ).double()  # (N, 2)
    count = torch.bincount(region, minlength=k)[:, None]
    centre = (
        torch.zeros(k, 2, dtype=torch.float64, device=device).index_add(0, region, place) / count
    )  # (k, 2)
    distance = (place - centre[region]).square().sum(1)  # (N,)
    order = distance.argsort(stable=True)
    order = order[region[order].argsort(stable=True)]  # by region, nearest to its centre first
    first = count[:, 0].cumsum(0) - count[:, 0]
    return order[first].sort().values


def nearest(grid: tuple[int, int], low: tuple[int, int], device: torch.device) -> Tensor:
    """The cell of a coarser grid that lies under each patch: (rows * cols,)."""
    row, col = (torch.arange(n, device=device) * m // n for n, m in zip(grid, low, strict=True))
    return (row[:, None] * low[1] + col).flatten()
