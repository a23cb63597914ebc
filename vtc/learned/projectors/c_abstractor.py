from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import initialise
from ..base import Grid, Resampler
from ..grids import as_map, as_tokens
from ..registry import register_module


@register_module
class CAbstractor(Resampler):
    """Convolutions, average pooling to n x n, convolutions, an MLP (Honeybee's C-Abstractor).

    "Honeybee: Locality-enhanced Projector for Multimodal LLM", arXiv:2312.06742; names and shapes of the
    parameters as in github.com/khanrc/honeybee with timm's RegNet stages.

    Input: x (B, N, in_width). Output: (B, n * n + eos_tokens, out_width), row by row and the end tokens, n
    at most the shorter side of the grid; the authors' published n are 12, 16 and 24. The number of tokens is
    in no weight, so that one set of them gives any.

    Departures: grids need not be square (where there are no `positions`), features are not changed in place
    as they are by the authors' code, published position embeddings that have one of CLS in front lose it.
    ValueError for a grid of another size than `positions`, and for other numbers of tokens.
    """

    name = "c-abstractor"
    paper = "arXiv:2312.06742"
    weights = "CC-BY-NC-4.0"
    prefixes = ("model.abstractor.", "abstractor.")
    place = "instead"

    @dataclass(frozen=True)
    class Config:
        """positions: of how many tokens there are position embeddings; 0: none are added.
        prenorm: a layer norm in front. depth: blocks of a stage; 0: pooling and the MLP alone."""

        in_width: int = 1024
        out_width: int = 4096
        width: int = 1024
        depth: int = 3
        mlp_depth: int = 2
        positions: int = 576
        prenorm: bool = False
        eos_tokens: int = 0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.mlp_depth < 1 or min(c.depth, c.positions, c.eos_tokens) < 0:
            raise ValueError("mlp_depth is at least 1; depth, positions and eos_tokens are not negative")
        width = c.width if c.depth else c.in_width
        if c.depth:
            # place 1 is the pooling, which has no parameters
            self.net = nn.ModuleDict(
                {"0": stage(c.in_width, width, c.depth), "2": stage(width, width, c.depth)}
            )
        layers: list[nn.Module] = [nn.Linear(width, c.out_width)]
        for _ in range(c.mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(c.out_width, c.out_width)]
        self.readout = nn.Sequential(*layers)
        if c.positions:
            self.pos_emb = nn.Parameter(torch.randn(1, c.positions, c.in_width) * 0.02)
        if c.prenorm:
            self.prenorm = nn.LayerNorm(c.in_width, eps=1e-6)
        if c.eos_tokens:
            self.eos_tokens = nn.Parameter(torch.randn(1, c.eos_tokens, c.out_width) * 0.02)
        initialise(self.readout)

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = super().rename(state)
        places = state.get("pos_emb")
        if places is not None and math.isqrt(places.shape[1] - 1) ** 2 == places.shape[1] - 1:
            state = state | {"pos_emb": places[:, 1:]}  # the first was of CLS
        return state

    def counts(self, n: int) -> tuple[int, ...]:
        """Of a square grid, or of the largest square in n tokens."""
        return tuple(side * side + self.config.eos_tokens for side in range(1, math.isqrt(n) + 1))

    def counts_for(self, grid: Grid) -> tuple[int, ...]:
        return self.counts(min(grid) ** 2)

    def shape(self, grid: Grid, k: int) -> Grid | None:
        side = math.isqrt(k - self.config.eos_tokens)
        return None if self.config.eos_tokens else (side, side)

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        c, k = self.config, self.checked(x, grid, k, levels)
        side = math.isqrt(k - c.eos_tokens)
        if c.prenorm:
            x = self.prenorm(x)
        if c.positions:
            if c.positions != x.shape[1]:
                raise ValueError(
                    f"{self.name} has positions of {c.positions} tokens, not of {x.shape[1]}: make it with "
                    f"positions={x.shape[1]}"
                )
            x = x + self.pos_emb
        x = as_map(x, grid)  # (B, in_width, rows, columns)
        if c.depth:
            x = self.net["0"](x)
        x = F.adaptive_avg_pool2d(x.float(), side).to(x.dtype)
        if c.depth:
            x = self.net["2"](x)
        x = self.readout(as_tokens(x))
        return torch.cat([x, self.eos_tokens.expand(len(x), -1, -1)], 1) if c.eos_tokens else x


def stage(width: int, out: int, depth: int) -> nn.Sequential:
    """A RegNet stage without stride: blocks b1, b2, ..., the first of which changes the width."""
    return nn.Sequential(OrderedDict((f"b{i + 1}", Block(out if i else width, out)) for i in range(depth)))


class Block(nn.Module):
    """RegNet's bottleneck with depthwise convolution: narrow, look around, weigh channels, widen, add."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = NormedConv(width, out, 1)
        self.conv2 = NormedConv(out, out, 3, groups=out)
        self.se = SqueezeExcite(out, round(width * 0.25))
        self.conv3 = NormedConv(out, out, 1)
        self.downsample = NormedConv(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        return F.silu(self.conv3(self.se(y)) + self.downsample(x))


class NormedConv(nn.Module):
    def __init__(self, width: int, out: int, size: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, size, padding=size // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(out)  # of channels; the name is timm's

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.silu(self.fc1(y))).sigmoid()
