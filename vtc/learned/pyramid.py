"""Averages of a grid of features from coarse to fine: what ordered tokens start from."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

KINDS = ("residual", "mean")


class Pyramid:
    """The first k cells of a grid that is divided ever finer: 1, 1, 2, 4, 8, ... cells in a level.

    Each level halves the cells of the one before along their longer side; the two first are the whole grid,
    as in ReToK (arXiv:2601.01535) and ResTok (arXiv:2601.03955). A place belongs to one cell of every level,
    also where the grid does not divide evenly, so that averages are projections and the error that the first
    k leave is known without computing it from them.

    kind "residual"  a cell holds the average of what the levels before left over (ResTok)
         "mean"      it holds the average of the features, so that it looks like one of them

    The second cell of a residual pyramid is thus zero. A cell without places, where there are more cells
    than rows or columns, holds zero, or the average of the cell that it divides.
    """

    def __init__(self, grid: tuple[int, int], k: int, kind: str = "residual") -> None:
        if kind not in KINDS:
            raise ValueError(f"a pyramid is one of {', '.join(KINDS)}, not {kind!r}")
        self.grid, self.k, self.kind = grid, k, kind

    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, N, D) to the cells (B, k, D), and the mean square that the first 1, ... k of them do
        not explain (B, k); both float32."""
        left = x.float()
        whole = left.square().sum((1, 2))[:, None]  # (B, 1)
        told = torch.zeros_like(left)
        cells, explained = [], []
        for member, places, centre in _levels(*self.grid, self.k, x.device):
            residual = _average(left, member, places)  # (B, cells, D)
            explained.append(residual.square().sum(2) * places)
            cells.append(residual if self.kind == "residual" else residual + told[:, centre])
            spread = residual[:, member]  # (B, N, D)
            left, told = left - spread, told + spread
        unexplained = whole - torch.cat(explained, 1)[:, : self.k].cumsum(1)
        return torch.cat(cells, 1)[:, : self.k], unexplained.clamp(min=0) / x[0].numel()

    def finest(self, device: torch.device) -> Tensor:
        """The last of the cells that each place belongs to: (N,)."""
        found = torch.zeros(self.grid[0] * self.grid[1], dtype=torch.long, device=device)
        first = 0
        for member, places, _ in _levels(*self.grid, self.k, device):
            found = torch.where(member + first < self.k, member + first, found)
            first += len(places)
        return found

    def draft(self, cells: Tensor, valid: Tensor) -> Tensor:
        """The features that cells (B, k, D) tell of, where valid (B, k): (B, N, D), in their dtype."""
        out = cells.new_zeros(len(cells), self.grid[0] * self.grid[1], cells.shape[2])
        first = 0
        for member, places, _ in _levels(*self.grid, self.k, cells.device):
            held = cells[:, first : first + len(places)]
            if not held.shape[1]:
                break
            known = valid[:, first : first + len(places)]
            first += len(places)
            here = member.clamp(max=held.shape[1] - 1)
            known = (known[:, here] & (member < held.shape[1]))[..., None]  # (B, N, 1)
            spread = held[:, here]
            out = out + spread.where(known, 0) if self.kind == "residual" else torch.where(known, spread, out)
        return out


def _average(x: Tensor, member: Tensor, places: Tensor) -> Tensor:
    sums = x.new_zeros(len(x), len(places), x.shape[2]).index_add(1, member, x)
    return sums / places.clamp(min=1)[:, None]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept here may be needed in training later
def _levels(
    rows: int, columns: int, k: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Of each level which cell every place is in (N,), how many places a cell has and the place in its
    middle (both one for each cell)."""
    down = across = 1
    cells, levels = 0, []
    while cells < k:
        if len(levels) > 1:  # the two first are the whole grid
            down, across = (2 * down, across) if rows * across > columns * down else (down, 2 * across)
        row = torch.arange(rows) * down // rows
        column = torch.arange(columns) * across // columns
        member = (row[:, None] * across + column).flatten()
        places = torch.bincount(member, minlength=down * across)
        middle = (2 * torch.arange(down) + 1) * rows // (2 * down)
        centre = middle[:, None] * columns + (2 * torch.arange(across) + 1) * columns // (2 * across)
        levels.append(tuple(part.to(device) for part in (member, places, centre.flatten())))
        cells += down * across
    return tuple(levels)
