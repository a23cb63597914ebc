"""Queries that read other tokens: cross-attention, and positions and waves on a grid of any size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Reader(nn.Module):
    """Cross-attention and an MLP.

    Keys are normalised and values are not, and beside what attention weighs, values are read with fixed
    weights that may be negative. So what is read has a linear part, with which differences between places are
    learned in few steps; attention alone, whose weights are positive, needs pairs of heads for each.
    """

    def __init__(self, width: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.heads = heads
        self.ln_query, self.ln_key, self.ln_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        hidden = int(width * ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, context: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, width) reads context (B, S, width), also with weights (heads, T, S); mask (B, S), True for
        those that are there."""
        q, k = self._split(self.query(self.ln_query(x))), self._split(self.key(self.ln_key(context)))
        v = self._split(self.value(context))
        if mask is not None:
            v, mask = v * mask[:, None, :, None], mask[:, None, None]
        read = F.scaled_dot_product_attention(q, k, v, mask) + weights @ v
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_mlp(x))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, d)


def waves(grid: tuple[int, int], order: int, like: Tensor) -> Tensor:
    """The first order * order functions of the two-dimensional cosine transform, coarse to fine:
    (order * order, N) in the dtype of `like`, each of mean square 1, or zero where a grid is too small."""
    sides = []
    for n in grid:
        frequency = torch.arange(order, device=like.device)
        at = (torch.arange(n, device=like.device) + 0.5) / n
        wave = (math.pi * frequency[:, None] * at).cos() * (frequency[:, None] < n)
        sides.append(wave / wave.square().mean(1, keepdim=True).clamp(min=1e-6).sqrt())
    row, column = sides
    first, second = zigzag(order)
    return (row[first, :, None] * column[second, None]).flatten(1).to(like.dtype)


def zigzag(order: int) -> tuple[list[int], list[int]]:
    """Frequencies along rows and columns, the coarsest first: two lists of order * order."""
    pairs = sorted(((a, b) for a in range(order) for b in range(order)), key=lambda p: (sum(p), p))
    return [a for a, _ in pairs], [b for _, b in pairs]


def positions(grid: tuple[int, int], width: int, like: Tensor) -> Tensor:
    """Sines and cosines of rows and columns, (N, width) in the dtype of `like`. The longer side of the grid
    is one unit long, whatever the number of tokens, so that grids of other sizes look alike.

    width is a multiple of 4. Frequencies go from half a period to 32 periods a side.
    """
    rows, columns = grid
    steps = torch.linspace(0, math.log(64), width // 4, device=like.device)
    angles = math.pi * steps.exp()
    row, column = (
        (torch.arange(n, device=like.device) + 0.5)[:, None] / max(grid) * angles for n in (rows, columns)
    )
    row = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(-1, columns, -1)
    column = torch.cat([column.sin(), column.cos()], 1)[None].expand(rows, -1, -1)
    return torch.cat([row, column], 2).flatten(0, 1).to(like.dtype)


def mixture(tokens: int, heads: int, order: int) -> nn.Parameter:
    """Of which waves each token is made in each head: at first of one, the coarsest first."""
    one = torch.arange(tokens)[:, None] % order**2 == torch.arange(order**2)
    return nn.Parameter(one.float().repeat(heads, 1, 1))  # (heads, tokens, order * order)
