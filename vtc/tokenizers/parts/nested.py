"""A convolutional VAE with several exits: one set of weights for grids of several sizes (arXiv:2501.03120).

Level i works at 1 / 2^i of the picture's resolution, with n residual blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .conv_blocks import Middle, ResBlock, conv, norm, res_blocks


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) to latents (B, `channels`, H / 2^i, W / 2^i), with i one of the levels in
    `exits`."""

    def __init__(self, widths: Sequence[int], n: int, channels: int, exits: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = conv(3, widths[0])
        starts = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(res_blocks(a, b, n) for a, b in zip(starts, widths))
        self.shrink = nn.ModuleList(nn.Conv2d(w, w, 3, stride=2) for w in widths[:-1])
        self.match = nn.ModuleDict({str(i): ResBlock(widths[i], widths[-1]) for i in exits})
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], channels)

    def forward(self, x: Tensor, level: int) -> Tensor:
        x = through(self.down[0], self.conv_in(x))
        for i in range(level):
            x = through(self.down[i + 1], self.shrink[i](F.pad(x, (0, 1, 0, 1))))  # right and below only
        x = self.mid(self.match[str(level)](x))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, `channels`, h, w) of one of the levels i in `exits` to pictures (B, 3, h 2^i, w 2^i)."""

    def __init__(self, widths: Sequence[int], n: int, channels: int, exits: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = conv(channels, widths[-1])
        self.mid = Middle(widths[-1])
        starts = [*widths[1:], widths[-1]]
        self.match = nn.ModuleDict({str(i): ResBlock(widths[-1], starts[i]) for i in exits})
        self.up = nn.ModuleList(res_blocks(a, b, n) for a, b in zip(starts, widths))
        self.grow = nn.ModuleList(conv(w, w) for w in widths[1:])
        self.norm_out = norm(widths[0])
        self.conv_out = conv(widths[0], 3)

    def forward(self, z: Tensor, level: int) -> Tensor:
        x = self.match[str(level)](self.mid(self.conv_in(z)))
        for i in range(level, 0, -1):
            x = through(self.up[i], x)
            x = self.grow[i - 1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(through(self.up[0], x))))


def through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x
