"""The convolutional blocks of latent diffusion's coder (arXiv:2112.10752) and of those made after it,
parameters named as published."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    """Two convolutions and a residual, (B, start, h, w) to (B, width, h, w)."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.norm1 = norm(start)
        self.conv1 = conv(start, width)
        self.norm2 = norm(width)
        self.conv2 = conv(width, width)
        self.nin_shortcut = nn.Conv2d(start, width, 1) if start != width else None

    def forward(self, x: Tensor) -> Tensor:
        changed = self.conv1(F.silu(self.norm1(x)))
        changed = self.conv2(F.silu(self.norm2(changed)))
        return changed + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """All places of the grid attend to each other, in one head as wide as the grid's channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v)
        )  # (B, h * w, c)
        read = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(read.transpose(1, 2).unflatten(2, x.shape[2:]))


class Middle(nn.Module):
    """What stands between the way down and the way up, at the coarsest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width)
        self.attn_1 = Attention(width)
        self.block_2 = ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def conv(start: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(start, width, 3, padding=1)


def norm(width: int) -> nn.GroupNorm:
    """32 groups, or the most below that divide a small width."""
    return nn.GroupNorm(math.gcd(32, width), width, eps=1e-6)


def res_blocks(start: int, width: int, n: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(start if i == 0 else width, width) for i in range(n))
