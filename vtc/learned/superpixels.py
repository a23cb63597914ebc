from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Grid


class Assignment:
    """To which super tokens the tokens belong, softly (super token sampling, arXiv:2211.11167).

    Super tokens start as the means of cells. Each token is shared out among those of its own cell and the
    eight around it by a softmax of scaled dot products; `shares` (B, cells, tokens of a cell, 9) is without
    gradient. The map is padded on the right and below to whole cells.

    masked: super tokens outside of the map get nothing and padding counts for nothing. The official code
    gives both a part, and its models are trained so: then mapping a constant back does not give
    it at borders.
    """

    def __init__(self, x: Tensor, cell: Grid, rounds: int = 1, masked: bool = True) -> None:
        """x (B, width, rows, columns); rounds: how often shares are computed."""
        self.grid, self.cell = tuple(x.shape[2:]), cell
        self.size = tuple(-(-side // by) for side, by in zip(self.grid, cell, strict=True))  # of super tokens
        self.tokens = self._cells(x)  # (B, cells, n, width)
        real = self._cells(x.new_ones(1, 1, *self.grid)) if masked else x.new_ones(1, 1, 1, 1)
        there = neighbours(x.new_ones(1, 1, *self.size))[:, :, 0]  # (1, cells, 9)
        with torch.no_grad():
            count = real.sum(2) if masked else self.tokens.shape[2]
            means = ((self.tokens * real).sum(2) / count).transpose(1, 2).unflatten(2, self.size)
            for last in range(rounds - 1, -1, -1):
                logits = self.tokens @ neighbours(means) * x.shape[1] ** -0.5  # (B, cells, n, 9)
                if masked:
                    logits = logits.masked_fill(there[:, :, None] == 0, -torch.inf)
                self.shares = logits.softmax(-1)
                self.given = self.shares * real
                self.total = from_neighbours(self.given.sum(2)[:, :, None], self.size) + 1e-12
                means = self.gather() if last else means

    def gather(self, values: Tensor | None = None) -> Tensor:
        """The super tokens, (B, width, rows, columns): means of tokens weighted by their shares.

        values: what to take the means of instead, (B, any width, rows, columns).
        """
        tokens = self.tokens if values is None else self._cells(values)
        return from_neighbours(tokens.transpose(2, 3) @ self.given, self.size) / self.total

    def scatter(self, super_tokens: Tensor) -> Tensor:
        """Super tokens mapped back onto all tokens, (B, width, rows, columns)."""
        x = self.shares @ neighbours(super_tokens).transpose(2, 3)  # (B, cells, n, width)
        x = x.unflatten(2, self.cell).unflatten(1, self.size)  # (B, R, C, h, w, width)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return x[:, :, : self.grid[0], : self.grid[1]]

    def _cells(self, x: Tensor) -> Tensor:
        (h, w), (rows, columns) = self.cell, self.size
        x = F.pad(x, (0, columns * w - x.shape[3], 0, rows * h - x.shape[2]))
        x = x.unflatten(3, (columns, w)).unflatten(2, (rows, h))  # (B, width, R, h, C, w)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def neighbours(x: Tensor) -> Tensor:
    """Of each place of a map (B, width, R, C) the nine around it, zero outside: (B, R * C, width, 9)."""
    return F.unfold(x, 3, padding=1).unflatten(1, (-1, 9)).permute(0, 3, 1, 2)


def from_neighbours(x: Tensor, size: Grid) -> Tensor:
    """The reverse of `neighbours`: (B, R * C, width, 9) summed at the places they belong to."""
    return F.fold(x.permute(0, 2, 3, 1).flatten(1, 2), size, 3, padding=1)
