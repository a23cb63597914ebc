"""The convolutional coder of GigaTok (arXiv:2504.08736): pictures with values in [-1, 1] to a map, and back.

Names of parameters are those of GigaTok's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .conv_blocks import conv, norm, res_blocks


class PixelEncoder(nn.Module):
    """Pictures (B, 3, H, W) to a map (B, `z_channels`, H / s, W / s), s = 2^(levels - 1).

    channels is multiplied by each of `multipliers`, finest first; products are divisible by 32.
    """

    def __init__(self, channels: int, multipliers: Sequence[int], z_channels: int) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = conv(3, channels)
        steps = [*map(_Downsample, widths[:-1]), None]
        self.conv_blocks = nn.ModuleList(
            _Level(start, width, 2, downsample=step)
            for start, width, step in zip([channels, *widths[:-1]], widths, steps)
        )
        self.mid = res_blocks(widths[-1], widths[-1], 2)
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PixelDecoder(nn.Module):
    """A map (B, `z_channels`, h, w) to pictures (B, 3, h * s, w * s); takes what `PixelEncoder` takes.

    In front of each resolution, channels are normalised and given the statistics of the map (MAGVIT-v2,
    arXiv:2310.05737).
    """

    def __init__(self, channels: int, multipliers: Sequence[int], z_channels: int) -> None:
        super().__init__()
        widths = [channels * m for m in reversed(multipliers)]  # coarsest first
        starts = [widths[0], *widths[:-1]]
        self.conv_in = conv(z_channels, widths[0])
        self.mid = res_blocks(widths[0], widths[0], 2)
        steps = [*map(_Upsample, widths[:-1]), None]
        self.conv_blocks = nn.ModuleList(
            _Level(start, width, 3, upsample=step) for start, width, step in zip(starts, widths, steps)
        )
        self.adaptive = nn.ModuleList(_AdaptiveNorm(z_channels, start) for start in starts)
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in self.mid:
            x = block(x)
        for adapt, level in zip(self.adaptive, self.conv_blocks):
            x = level(adapt(x, z))
        return self.conv_out(F.silu(self.norm_out(x)))


class _Level(nn.Module):
    """The residual blocks of one resolution, and where there is one the step to the next."""

    def __init__(
        self,
        start: int,
        width: int,
        n: int,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.res = res_blocks(start, width, n)
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.res, self.downsample, self.upsample):
            x = x if layer is None else layer(x)
        return x


class _Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class _Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = conv(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)  # (B, 4 * width, h, w), channels ordered by place in the 2 x 2 cell first
        return F.pixel_shuffle(x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)


class _AdaptiveNorm(nn.Module):
    def __init__(self, z_channels: int, width: int) -> None:
        super().__init__()
        self.gn = nn.GroupNorm(32, width, eps=1e-6, affine=False)
        self.gamma = nn.Linear(z_channels, width)
        self.beta = nn.Linear(z_channels, width)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        z = z.flatten(2)
        mean = z.mean(2, keepdim=True)
        variance = (z - mean).square().sum(2) / (z.shape[2] - 1)
        scale, shift = self.gamma((variance + 1e-6).sqrt()), self.beta(mean[..., 0])  # (B, width)
        return self.gn(x) * scale[..., None, None] + shift[..., None, None]
