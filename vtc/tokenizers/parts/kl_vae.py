"""The convolutional coder of latent diffusion's KL-VAE: pictures to a grid of moments, and back
(arXiv:2112.10752).

Names of parameters are the published ones. Attention is where the f16 model with 16 channels of MAR
(arXiv:2406.11838) has it: in the middle, and in the encoder's coarsest level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .conv_blocks import Attention, Middle, conv, norm, res_blocks

MULTIPLIERS = (1, 1, 2, 2, 4)


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) to moments (B, 2 * `z_channels`, H / s, W / s), s = 2^(levels - 1).

    hidden        the channels that `multipliers`, one for each level, finest first, multiply
    """

    def __init__(
        self, hidden: int = 128, multipliers: Sequence[int] = MULTIPLIERS, z_channels: int = 16
    ) -> None:
        super().__init__()
        widths = [hidden * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = conv(3, hidden)
        self.down = nn.ModuleList()
        for i, (start, width) in enumerate(zip([hidden, *widths], widths)):
            level = nn.Module()
            level.block = res_blocks(start, width, 2)
            level.attn = nn.ModuleList(Attention(width) for _ in range(2 if i == last else 0))
            if i < last:
                level.downsample = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], 2 * z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            for j, block in enumerate(level.block):
                x = block(x)
                if len(level.attn):
                    x = level.attn[j](x)
            if i < len(self.down) - 1:
                x = level.downsample["conv"](F.pad(x, (0, 1, 0, 1)))  # right and below only
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, `z_channels`, h, w) to pictures (B, 3, h * s, w * s), s = 2^(levels - 1)."""

    def __init__(
        self, hidden: int = 128, multipliers: Sequence[int] = MULTIPLIERS, z_channels: int = 16
    ) -> None:
        super().__init__()
        widths = [hidden * m for m in multipliers]
        self.conv_in = conv(z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, (start, width) in enumerate(zip([*widths[1:], widths[-1]], widths)):
            level = nn.Module()
            level.block = res_blocks(start, width, 3)
            if i > 0:
                level.upsample = nn.ModuleDict({"conv": conv(width, width)})
            self.up.append(level)
        self.norm_out = norm(widths[0])
        self.conv_out = conv(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for i, level in reversed(list(enumerate(self.up))):  # numbered from the finest
            for block in level.block:
                x = block(x)
            if i > 0:
                x = level.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))
