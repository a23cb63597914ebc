"""The convolutional coder of MaskGIT's VQGAN: pictures to a grid of latents, and back (arXiv:2202.04200).

Names of parameters are those of the PyTorch port that TiTok and its descendants have in their checkpoints.
There is no attention, so any picture size is taken. All convolutions have stride 1 and an odd kernel, and
then "SAME" padding, as TensorFlow has it, is half a kernel on every side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLIERS = (1, 1, 2, 2, 4)


class Encoder(nn.Module):
    """Pictures (B, `channels`, H, W) to latents (B, `z_channels`, H / s, W / s), s = 2^(levels - 1).

    hidden        the channels that `multipliers`, one for each level, finest first, multiply; each product
                  must be divisible by the 32 groups of the norms
    res_blocks    residual blocks of each level, and in the middle
    """

    def __init__(
        self,
        hidden: int = 128,
        multipliers: Sequence[int] = MULTIPLIERS,
        res_blocks: int = 2,
        z_channels: int = 256,
        channels: int = 3,
    ) -> None:
        super().__init__()
        widths = [hidden * m for m in multipliers]
        self.conv_in = _conv(channels, hidden, 3, bias=False)
        starts = [hidden, *widths[:-1]]
        self.down = nn.ModuleList(map(_Level, starts, widths, [res_blocks] * len(widths)))
        self.mid = _res_blocks(widths[-1], widths[-1], res_blocks)
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv(widths[-1], z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else F.avg_pool2d(x, 2))
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, `z_channels`, h, w) to pictures (B, `channels`, h * s, w * s), s = 2^(levels - 1).

    Takes what `Encoder` takes.
    """

    def __init__(
        self,
        hidden: int = 128,
        multipliers: Sequence[int] = MULTIPLIERS,
        res_blocks: int = 2,
        z_channels: int = 256,
        channels: int = 3,
    ) -> None:
        super().__init__()
        widths = [hidden * m for m in multipliers]
        self.conv_in = _conv(z_channels, widths[-1], 3)
        self.mid = _res_blocks(widths[-1], widths[-1], res_blocks)
        starts = [*widths[1:], widths[-1]]
        enlarges = [i > 0 for i in range(len(widths))]
        self.up = nn.ModuleList(map(_Level, starts, widths, [res_blocks] * len(widths), enlarges))
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv(widths[0], channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):  # numbered from the finest
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _Level(nn.Module):
    """The residual blocks of one resolution; with `enlarges`, then twice that resolution."""

    def __init__(self, start: int, width: int, res_blocks: int, enlarges: bool = False) -> None:
        super().__init__()
        self.block = _res_blocks(start, width, res_blocks)
        self.upsample_conv = _conv(width, width, 3) if enlarges else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.upsample_conv is not None:
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class _ResBlock(nn.Module):
    """Two convolutions and a residual.

    Where the number of channels changes, `nin_shortcut` is applied to what the convolutions give, not to what
    they were given, and the block's input is lost: weights are trained so, and it must stay.
    """

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(start)
        self.conv1 = _conv(start, width, 3, bias=False)
        self.norm2 = _norm(width)
        self.conv2 = _conv(width, width, 3, bias=False)
        self.nin_shortcut = _conv(width, width, 1, bias=False) if start != width else None

    def forward(self, x: Tensor) -> Tensor:
        changed = self.conv1(F.silu(self.norm1(x)))
        changed = self.conv2(F.silu(self.norm2(changed)))
        return changed + (x if self.nin_shortcut is None else self.nin_shortcut(changed))


class SoftCodes(nn.Module):
    """The codebook of the VQGAN, read softly: logits of its codes to the mixture of its entries."""

    def __init__(self, size: int = 1024, dim: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, size, h, w) to (B, dim, h, w)."""
        return torch.einsum("bchw,cd->bdhw", logits.softmax(1), self.embedding.weight)


def _conv(start: int, width: int, kernel: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(start, width, kernel, padding=kernel // 2, bias=bias)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def _res_blocks(start: int, width: int, n: int) -> nn.ModuleList:
    return nn.ModuleList(_ResBlock(start if i == 0 else width, width) for i in range(n))
