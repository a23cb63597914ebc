from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transformer import initialise
from .base import Grid, Resampler
from .grids import from_windows
from .proxy_injection import Injection, ProjectedAttention
from .proxy_windows import check_tiling, check_windows, partition, pooled
from .registry import register_module
from .replacement import (
    AttentionReplacement,
    HostAttention,
    attention_flops,
    check_grid,
    check_heads,
    zero,
)


@register_module
class ProxyAttention(AttentionReplacement, Injection):
    """Attention within windows, and between them through proxy tokens (PT-DiT, arXiv:2409.04005).

    For the place of a trained encoder's self-attention; the whole block of the paper is `ProxyBlock`. The
    parameters have the names they have there. `start_from` gives all three attentions the host's weights, and
    what proxies tell the tokens goes through zeros at first.

    In the paper windows are trained along with proxies. Cut down to windows, a host that was trained without
    them is far from itself, so with `joint` tokens also attend, in the same softmax, to the pooled tokens of
    all other windows, each of which counts as many times as it has tokens. It then starts as the host with
    pooled keys and values outside of each token's window: with a proxy for each token it is the host.

    What proxies tell costs three projections of all tokens more, which pays where there are a few times as
    many tokens as channels: 12 x 12 tokens of width 128 in windows of 4 take 1.6 times the operations of
    plain attention. `inject` False leaves it out. Then there are always fewer than of plain attention, and
    proxies are read as the pooled tokens of `joint` only.

    Departures beside these: tokens lie row by row, not window by window; what proxies say is added to the
    output, not to what the windows read, since there is one residual connection only.
    """

    name = "proxy-attention"
    paper = "arXiv:2409.04005"

    @dataclass(frozen=True)
    class Config:
        """Each window of window * window tokens has proxies * proxies proxies.

        pool     a proxy is "strided_mean", of the tokens at every proxies-th place of the window, as in the
                 code of Ascend/MindSpeed-MM; "block_mean", of a block of the window; "first", the tokens in
                 the window's corner; "random", in training one token of each block, else the block's mean
        joint    tokens attend to the pooled tokens of other windows along with those of their own; False:
                 to their own window only, as in the paper
        inject   proxies attend to each other and all tokens read them, as in the paper
        prefix   tokens in front of the grid's (CLS), which attend to all tokens and are seen by all
        """

        width: int = 768
        heads: int = 12
        window: int = 8
        proxies: int = 2
        pool: str = "block_mean"
        bias: bool = True
        joint: bool = True
        inject: bool = True
        prefix: int = 0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not (config.joint or config.inject):
            raise ValueError(f"{self.name} with neither joint nor inject would read no proxies")
        self._make(config, config.inject)
        initialise(self)
        self._start()

    def _start(self) -> None:
        if self.config.inject:
            zero(self.linear_1_visual)

    def start_from(self, attention: HostAttention | nn.Module) -> None:
        host = HostAttention.fitting(attention, self.name, self.config.width, self.config.heads)
        host.check(bias=self.config.bias)
        for part in self.children():
            if isinstance(part, ProjectedAttention):
                part.start_from(host)
        self._start()

    def fits(self, grid: Grid) -> None:
        check_tiling(grid, self.config.window)

    def flops(self, grid: Grid) -> int:
        c, n = self.config, grid[0] * grid[1]
        proxies = n // c.window**2 * c.proxies**2
        seen = c.prefix + c.window**2 + proxies * c.joint
        count = 8 * (c.prefix + n) * c.width**2 + 4 * n * seen * c.width
        count += 4 * c.prefix * (c.prefix + n) * c.width
        if c.inject:
            count += attention_flops(proxies, c.width)
            count += 6 * n * c.width**2 + 4 * proxies * c.width**2 + 4 * n * proxies * c.width
        return count

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, prefix + N, width), and the same shape out. Raises ValueError for a grid that windows do not
        tile."""
        c = self.config
        check_grid(self.name, x, grid, c.width, c.prefix)
        q, k, v = self.attn1.projected(x)
        kv = torch.cat([k, v], 2)  # (B, prefix + N, 2 * width)
        first, read = kv[:, : c.prefix], partition(kv[:, c.prefix :], grid, c.window)
        windows = partition(q[:, c.prefix :], grid, c.window)  # (B, P, n, width)
        b, p = windows.shape[:2]
        bias = None
        if c.joint:
            # Pools are averages or choices, so pooled keys are the keys of pooled tokens.
            means = pooled(read, c.window, c.proxies, c.pool, self.training).flatten(1, 2)
            read = torch.cat([read, means[:, None].expand(-1, p, -1, -1)], 2)
            bias = self._counts(windows).repeat(b, 1)[:, None, None]  # (B * P, 1, 1, prefix + S)
        read = torch.cat([first[:, None].expand(-1, p, -1, -1), read], 2).flatten(0, 1)
        out = self.attn1.attended(windows.flatten(0, 1), *read.chunk(2, -1), bias).unflatten(0, (b, p))
        out = from_windows(out, grid, c.window)
        if c.prefix:
            out = torch.cat([self.attn1.attended(q[:, : c.prefix], k, v), out], 1)
        out = self.attn1.to_out[0](out)
        if not c.inject:
            return out
        told = self.injected(x[:, c.prefix :], grid)
        return out + F.pad(told, (0, 0, c.prefix, 0))

    def _counts(self, windows: Tensor) -> Tensor:
        """For each window the log of how many tokens each of those stands for, -inf for its own pooled
        tokens: (P, prefix + n + P * proxies^2)."""
        c, (p, n) = self.config, windows.shape[1:3]
        own = torch.eye(p, dtype=torch.bool, device=windows.device).repeat_interleave(c.proxies**2, 1)
        others = windows.new_full(own.shape, 2 * math.log(c.window / c.proxies))
        return torch.cat([windows.new_zeros(p, c.prefix + n), others.masked_fill(own, -torch.inf)], 1)


@register_module
class ProxyProjector(Resampler):
    """Proxies alone as the image's tokens: pooled, attended to each other, projected to the language model.

    The first half of proxy-token attention (PT-DiT, arXiv:2409.04005; proxy_norm1 and proxy_attn1 are its
    parameters) and a projector of two layers. Not in the paper, where all tokens stay. Starts as the
    projector of pooled features, since the attention's output layer is zero; `start_from` takes over a
    trained projector, which then sees pooled tokens.

    n tokens give n * proxies^2 / window^2, for grids that windows tile.
    """

    name = "proxy-projector"
    paper = "arXiv:2409.04005"
    place = "instead"

    @dataclass(frozen=True)
    class Config:
        """pool: see `ProxyAttention.Config`; with "strided_mean" the proxies of a window hardly differ."""

        in_width: int = 1024
        out_width: int = 4096
        heads: int = 16
        window: int = 4
        proxies: int = 2
        pool: str = "block_mean"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        check_heads(c.in_width, c.heads)
        check_windows(c.window, c.proxies, c.pool)
        self.proxy_norm1 = nn.LayerNorm(c.in_width)
        self.proxy_attn1 = ProjectedAttention(c.in_width, c.heads, bias=True)
        self.projector = nn.Sequential(
            nn.Linear(c.in_width, c.out_width), nn.GELU(), nn.Linear(c.out_width, c.out_width)
        )
        initialise(self)
        zero(self.proxy_attn1.to_out)

    def begin(self, found: Sequence[tuple[Tensor, Grid]], projector: nn.Module | None) -> None:
        """Starts from the host's projector where that has two layers of the same shapes."""
        parts = [] if projector is None else projector.modules()
        layers = [part for part in parts if isinstance(part, nn.Linear)]
        shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in layers]
        own = [{name: p.shape for name, p in self.projector[i].named_parameters()} for i in (0, 2)]
        if shapes == own:
            self.start_from(*layers)

    @torch.no_grad()
    def start_from(self, first: nn.Linear, second: nn.Linear) -> None:
        """From the two layers of a projector with GELU between them, as LLaVA 1.5 has it."""
        if first.weight.shape != self.projector[0].weight.shape or first.out_features != second.out_features:
            raise ValueError(
                f"{self.name} projects {self.in_width} to {self.out_width}, not "
                f"{first.in_features} to {second.out_features}"
            )
        self.projector[0].load_state_dict(first.state_dict())
        self.projector[2].load_state_dict(second.state_dict())

    def counts(self, n: int) -> list[int]:
        per = self.config.window**2
        return [n // per * self.config.proxies**2] if n % per == 0 else []

    def counts_for(self, grid: Grid) -> list[int]:
        check_tiling(grid, self.config.window)
        return self.counts(grid[0] * grid[1])

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        """(B, k, out_width), row by row of the proxies' own grid where `pool` is "block_mean"."""
        c = self.config
        self.checked(x, grid, k, levels)
        windows = partition(x, grid, c.window)  # (B, P, window^2, width)
        proxies = pooled(windows, c.window, c.proxies, c.pool, self.training)  # (B, P, proxies^2, width)
        rows, columns = (side // c.window * c.proxies for side in grid)
        proxies = from_windows(proxies, (rows, columns), c.proxies)  # (B, k, width)
        return self.projector(proxies + self.proxy_attn1(self.proxy_norm1(proxies)))
