from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transformer import initialise
from .base import Grid, Resampler, square
from .grids import as_map, as_tokens
from .in_encoder import BetweenBlocks
from .registry import register_module
from .replacement import (
    AttentionReplacement,
    HostAttention,
    attention_flops,
    check_grid,
    check_heads,
    put,
    zero,
)
from .superpixels import Assignment

REFINES = ("attention", "conv", "none")


class MapAttention(nn.Module):
    """Self-attention of a map's places, by convolutions of 1 x 1. In qkv each head has its q, k and v."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=qkv_bias)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, rows, columns) in and out."""
        return as_map(self.tokens(as_tokens(x)), tuple(x.shape[2:]))

    def tokens(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """(B, T, width) in and out. counts (B, T): how many tokens each stands for in the softmax."""
        qkv = F.linear(x, self.qkv.weight.flatten(1), self.qkv.bias)
        qkv = qkv.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, 3 * d)
        bias = None if counts is None else counts.log()[:, None, None].to(x.dtype)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, -1), bias).transpose(1, 2).flatten(2)
        return F.linear(out, self.proj.weight.flatten(1), self.proj.bias)

    def start_from(self, host: HostAttention) -> None:
        weight = host.qkv.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        put(self.qkv, weight, host.qkv_bias.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten())
        put(self.proj, host.out, host.out_bias)


class _Identity(nn.Module):
    """The nine kernels that the official code folds and unfolds by; only here since its weights hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.eye(9).reshape(9, 1, 3, 3))


@register_module
class SuperTokenAttention(AttentionReplacement):
    """Self-attention among super tokens, mapped back to the tokens (SViT, arXiv:2211.11167).

    Tokens are gathered into super tokens by `Assignment`, those attend to each other, and each token gets
    what its super tokens have found, by its shares. With cells of 1 x 1 it is plain self-attention.

    After `start_from` it is the host's attention among super tokens. That equals the host where all tokens
    that share super tokens are equal.

    Parameters are those of the official code (`attn` of a layer of hhb072/STViT, with `masked` False), which
    holds the kernels it folds by as frozen parameters; here they are buffers that nothing reads.
    """

    name = "super-token-attention"
    paper = "arXiv:2211.11167"

    @dataclass(frozen=True)
    class Config:
        """cell: rows and columns. refine: what super tokens go through, "attention", "conv" or "none".
        masked: see `Assignment`. prefix: tokens in front of the grid's (CLS), which attend to super tokens
        and are seen by them; then each super token counts as often as it has tokens. Not in the paper."""

        width: int = 768
        heads: int = 12
        cell: tuple[int, int] = (2, 2)
        rounds: int = 1
        refine: str = "attention"
        qkv_bias: bool = True
        masked: bool = True
        prefix: int = 0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        check_heads(c.width, c.heads)
        if c.prefix and c.refine != "attention":
            raise ValueError(f"tokens in front take part in refine='attention' only, not {c.refine!r}")
        if c.refine not in REFINES:
            raise ValueError(f"refine is one of {', '.join(REFINES)}, not {c.refine!r}")
        if min(c.cell) < 1 or c.rounds < 1:
            raise ValueError(f"cells and rounds are at least 1, not {c.cell} and {c.rounds}")
        self.unfold, self.fold = _Identity(), _Identity()
        if c.refine == "attention":
            self.stoken_refine = MapAttention(c.width, c.heads, c.qkv_bias)
        elif c.refine == "conv":
            self.stoken_refine = nn.Sequential(
                nn.Conv2d(c.width, c.width, 1),
                nn.Conv2d(c.width, c.width, 5, padding=2, groups=c.width),
                nn.Conv2d(c.width, c.width, 1),
            )
        initialise(self)

    def start_from(self, attention: HostAttention | nn.Module) -> None:
        if self.config.refine != "attention":
            raise ValueError(f"only refine='attention' starts from an attention, not {self.config.refine!r}")
        host = HostAttention.fitting(attention, self.name, self.config.width, self.config.heads)
        host.check(qkv_bias=self.config.qkv_bias)
        self.stoken_refine.start_from(host)

    def flops(self, grid: Grid) -> int:
        c = self.config
        cells = math.prod(-(-side // by) for side, by in zip(grid, c.cell, strict=True))
        kinds = {
            "attention": attention_flops(c.prefix + cells, c.width),
            "conv": 4 * cells * c.width**2 + 50 * cells * c.width,
            "none": 0,
        }
        if tuple(c.cell) == (1, 1):
            return kinds[c.refine]
        # each round shares out and gathers, and what was found is scattered: nine places for each token
        return kinds[c.refine] + (2 * c.rounds + 1) * 18 * cells * math.prod(c.cell) * c.width

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, prefix + N, width), and the same shape out."""
        c = self.config
        check_grid(self.name, x, grid, c.width, c.prefix)
        first, x = x[:, : c.prefix], as_map(x[:, c.prefix :], grid)
        if tuple(c.cell) == (1, 1):
            first, x = self._refined(first, x, None)
            return torch.cat([first, as_tokens(x)], 1)
        assignment = Assignment(x, c.cell, c.rounds, c.masked)
        first, x = self._refined(first, assignment.gather(), assignment.total)
        return torch.cat([first, as_tokens(assignment.scatter(x))], 1)

    def _refined(self, first: Tensor, x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """first (B, prefix, width); x (B, width, R, C), of which each stands for `counts` (B, 1, R, C)."""
        if not self.config.prefix:
            return first, x if self.config.refine == "none" else self.stoken_refine(x)
        joined = torch.cat([first, as_tokens(x)], 1)
        if counts is not None:
            counts = F.pad(counts.flatten(1), (self.config.prefix, 0), value=1.0)
        joined = self.stoken_refine.tokens(joined, counts)
        return joined[:, : self.config.prefix], as_map(joined[:, self.config.prefix :], tuple(x.shape[2:]))


@register_module
class SuperTokens(BetweenBlocks, Resampler):
    """Super tokens as the image's tokens: soft superpixels that then attend to each other (arXiv:2211.11167).

    The sampling of SViT without the way back, which is not in the paper. Starts as the sampling alone, which
    has no parameters, since the output layer of the attention is zero.

    Gives as many tokens as there are cells, which are squares and may stick out on the right and below.
    """

    name = "super-tokens"
    paper = "arXiv:2211.11167"

    @dataclass(frozen=True)
    class Config:
        in_width: int = 1024
        heads: int = 16
        rounds: int = 1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        check_heads(c.in_width, c.heads)
        if c.rounds < 1:
            raise ValueError(f"rounds is at least 1, not {c.rounds}")
        self.norm = nn.LayerNorm(c.in_width)
        self.stoken_refine = MapAttention(c.in_width, c.heads, qkv_bias=True)
        initialise(self)
        zero(self.stoken_refine.proj)

    def counts(self, n: int) -> list[int]:
        return self.counts_for(square(n))

    def counts_for(self, grid: Grid) -> list[int]:
        return sorted(_cells(grid))

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        """(B, k, in_width), row by row of the cells."""
        cell = _cells(grid)[self.checked(x, grid, k, levels)]
        # normalised tokens are shared out, so that shares do not depend on the scale of features
        shares = Assignment(as_map(self.norm(x), grid), (cell, cell), self.config.rounds)
        sampled = as_tokens(shares.gather(as_map(x, grid)))  # (B, k, width)
        refined = self.stoken_refine(as_map(self.norm(sampled), shares.size))
        return sampled + as_tokens(refined)


def _cells(grid: Grid) -> dict[int, int]:
    """The side of a cell by the number of cells."""
    sides = range(max(grid), 0, -1)
    return {math.prod(-(-size // side) for size in grid): side for side in sides}
