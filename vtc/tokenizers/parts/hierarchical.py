"""Levels of tokens from coarse to fine, each the residual of the coarser ones (ResTok, arXiv:2601.03955).

Names of parameters are those of ResTok's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of normalised queries and keys, rotated by their places. Keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.q_norm = nn.LayerNorm(width // heads)
        self.k_norm = nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, d)
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm block with a learned scale on each branch, which may merge tokens between the two."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.gamma_1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.gamma_2 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None = None, merged: int = 0) -> Tensor:
        """x (B, T, width); mask (T, T), True where a row sees a column; the first `merged` are merged."""
        x = x + self.gamma_1 * self.attn(self.norm1(x), rotation, mask)
        if merged:
            x = torch.cat([*merge(x[:, :merged]), x[:, merged:]], 1)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


def merge(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, D) as every second of them (B, N / 2, D), and what is left when each of these is taken
    off itself and its right neighbour (B, N, D)."""
    coarse = x[:, ::2]
    return coarse, x - coarse.repeat_interleave(2, 1)


def residual_pool(x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """A map (B, D, H, W) as the tokens of several grids, coarse to fine: (B, sum of h * w, D).

    Each grid has the means of what the coarser ones, enlarged to the map, leave of it.
    """
    levels = []
    for grid in grids:
        pooled = F.interpolate(x, size=grid, mode="area")
        x = x - F.interpolate(pooled, size=x.shape[2:], mode="nearest")
        levels.append(pooled.flatten(2).transpose(1, 2))
    return torch.cat(levels, 1)


def level_mask(sizes: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Tokens of each level see their own level and all before it: (T, T), T the sum of sizes."""
    level = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
    return level[:, None] >= level


def grid_places(h: int, w: int) -> Tensor:
    """Row and column of each cell, in reading order: (h * w, 2)."""
    return torch.cartesian_prod(torch.arange(h), torch.arange(w))


def line_places(n: int) -> Tensor:
    """Tokens of a sequence are on the diagonal: (n, 2)."""
    return torch.arange(n)[:, None].expand(n, 2)


def rotations(places: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines of rotary embedding (arXiv:2104.09864) at places (T, 2): (2, T, dim / 2), float32.

    The first half of the angles is from the row, the other from the column.
    """
    exponent = torch.arange(0, dim // 2, 2, dtype=torch.float64) / (dim // 2)
    angles = (places[..., None] * base**-exponent).flatten(1)  # (T, 2 * dim / 4)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns each pair of neighbouring numbers of x (..., T, dim); rotation as `rotations` gives it."""
    cos, sin = rotation
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
