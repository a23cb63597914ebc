"""A baseline that keeps everything a little: area pooling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import centres, regions
from ..method import Merge, register
from ..tokens import Reduction, Tokens


@register
@dataclass
class Pool(Merge):
    """Averages the tokens of k about equal rectangles.

    Where tokens are missing from the grid, as in an encoder that reduced them in an earlier block, k compact
    groups of about the same number of tokens, by halving them again and again across their longer side.
    """

    name = "pool"
    stages = ("features", "encoder")
    needs_grid = True

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        device, batch = tokens.x.device, len(tokens.x)
        if tokens.n < tokens.grid[0] * tokens.grid[1]:
            index, group = compact(tokens.place, tokens.grid, k)
            return Reduction.merge(index, index.gather(1, group))
        centre, region = centres(tokens.grid, k, device), regions(tokens.grid, k, device)
        place = centre.new_empty(k).scatter(0, region[centre], centre)  # (k,) centre of each region
        return Reduction.merge(centre.expand(batch, k), place[region].expand(batch, -1))


def compact(place: Tensor, grid: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """k compact groups of tokens at `place` (B, N): the token in the middle of each (B, k), and the group of
    each token (B, N).

    A group of k parts is cut at the longer side of the rows and columns that it spans (the rows, if equal)
    into two whose numbers of tokens and of parts go together. How many tokens are where in the order depends
    on N and k only, so that one sort for each level of cuts serves all groups of all rows of the batch.
    """
    batch, n = place.shape
    row, col = place // grid[1], place % grid[1]
    order = place.argsort(dim=1, stable=True)  # (B, N) groups lie one after the other in it
    parts = [(n, k)]  # tokens and parts of each group
    while any(k > 1 for _, k in parts):
        group = _numbered([n for n, _ in parts], place.device).expand(batch, n)  # in the order
        by_row, by_col = row.gather(1, order), col.gather(1, order)
        across = _extent(by_row, group, len(parts)) >= _extent(by_col, group, len(parts))
        across = across.gather(1, group)  # (B, N)
        first, second = torch.where(across, by_row, by_col), torch.where(across, by_col, by_row)
        key = (group * max(grid) + first) * max(grid) + second
        order = order.gather(1, key.argsort(dim=1, stable=True))
        parts = [half for part in parts for half in _halves(*part)]
    group = torch.empty_like(order).scatter(
        1, order, _numbered([n for n, _ in parts], place.device).expand(batch, n)
    )
    return _middles(row, col, group, k), group


def _halves(n: int, k: int) -> list[tuple[int, int]]:
    return [(n, k)] if k == 1 else [(n * (k // 2) // k, k // 2), (n - n * (k // 2) // k, k - k // 2)]


def _numbered(sizes: list[int], device: torch.device) -> Tensor:
    """The group of each token where groups lie one after the other: (N,)."""
    groups, counts = torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device)
    return groups.repeat_interleave(counts, output_size=sum(sizes))


def _extent(coordinate: Tensor, group: Tensor, groups: int) -> Tensor:
    """How far each group reaches in one direction: (B, groups)."""
    empty = coordinate.new_zeros(len(coordinate), groups)
    low, high = (
        empty.scatter_reduce(1, group, coordinate, how, include_self=False) for how in ("amin", "amax")
    )
    return high - low


def _middles(row: Tensor, col: Tensor, group: Tensor, k: int) -> Tensor:
    """The token nearest to the mean place of each group, the first of equals, in whole numbers: (B, k)."""
    distance, count = 0, group[0].bincount(minlength=k)
    for at in (row, col):
        total = at.new_zeros(len(at), k).scatter_add(1, group, at)
        distance = distance + (at * count[group] - total.gather(1, group)).square()
    nearest = distance.argsort(dim=1, stable=True)  # (B, N)
    nearest = nearest.gather(1, group.gather(1, nearest).argsort(dim=1, stable=True))  # by group
    return nearest[:, count.cumsum(0) - count]
