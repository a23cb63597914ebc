from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import initialise
from ..base import Grid, Resampler
from ..registry import register_module


@register_module
class MatryoshkaQueries(Resampler):
    """Learned queries of which the first k are used, any k (MQT).

    "Matryoshka Query Transformer for Large Vision-Language Models", arXiv:2405.19315; names and shapes of the
    parameters as in github.com/gordonhu608/MQT-LLaVA, a descendant of Qwen-VL's resampler. As in the authors'
    code, and unlike what the paper writes, keys are positions only: what a query attends to is the same in
    every image, so that the module is a learned linear pooling over places for each head (`pooling`). With
    `content_keys` keys are image features plus positions; published weights are without.

    Input: x (B, N, in_width) of any grid. Output: (B, k, out_width), 1 <= k <= min(queries, N); the first
    k of more tokens are the tokens of k. In training `draw` gives even numbers, each equally often; the
    authors' first stage takes them all.

    Departures: positions are kept in the type of the other weights (the authors' in half precision, which
    rounds them by up to 5e-4) and their embedding is interpolated to the grid at hand (the authors' to
    24 x 24). Keys are made once for a batch.
    ValueError for options that do not fit each other, and for other numbers of tokens.
    """

    name = "mqt"
    paper = "arXiv:2405.19315"
    weights = "Apache-2.0"
    prefixes = ("model.mm_projector.", "mm_projector.")
    ordered = True
    place = "instead"

    @dataclass(frozen=True)
    class Config:
        """queries is a square number: they have the positions of a square grid."""

        in_width: int = 1024
        out_width: int = 4096
        queries: int = 256
        heads: int = 16
        content_keys: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.in_width % c.heads or c.in_width % 4:
            raise ValueError("heads and 4 must divide in_width")
        side = math.isqrt(c.queries)
        if side * side != c.queries or not side:
            raise ValueError(f"queries is a square number, not {c.queries}")
        self.register_buffer("pos_embed", sines(side, c.in_width))
        self.query = nn.Parameter(torch.empty(c.queries, c.in_width))
        self.attn = nn.MultiheadAttention(c.in_width, c.heads, batch_first=True)
        self.ln_q = nn.LayerNorm(c.in_width, eps=1e-6)
        self.ln_k = nn.LayerNorm(c.in_width, eps=1e-6)
        self.ln_v = nn.LayerNorm(c.in_width, eps=1e-6)
        self.proj = nn.Parameter(c.out_width**-0.5 * torch.randn(c.in_width, c.out_width))
        initialise(self)
        nn.init.trunc_normal_(self.query, std=0.02)

    def counts(self, n: int) -> range:
        return range(1, min(self.config.queries, n) + 1)

    def draw(self, grid: Grid, generator: torch.Generator | None = None) -> int:
        evens = self.counts_for(grid)[1::2] or (1,)
        return evens[int(torch.randint(len(evens), (), generator=generator))]

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        k = self.checked(x, grid, k, levels)
        keys = x if self.config.content_keys else None
        width, weight, bias = self.in_width, self.attn.in_proj_weight, self.attn.in_proj_bias
        v = F.linear(self.ln_v(x), weight[2 * width :], bias[2 * width :])
        v = v.unflatten(2, (self.config.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        out = self.pooling(grid, k, keys) @ v  # (B, heads, k, d)
        return self.attn.out_proj(out.transpose(1, 2).flatten(2)) @ self.proj

    @torch.no_grad()
    def owners(self, x: Tensor, grid: Grid, k: int) -> Tensor:
        """The query that takes most from a place."""
        weights = self.pooling(grid, k, x if self.config.content_keys else None).mean(1)  # (1 or B, k, N)
        return weights.argmax(1).expand(len(x), -1)

    def pooling(self, grid: Grid, k: int, x: Tensor | None = None) -> Tensor:
        """How much each of k queries takes from each place, for each head: (1, heads, k, N).

        x (B, N, in_width), only with `content_keys`: (B, heads, k, N).
        """
        width, weight, bias = self.in_width, self.attn.in_proj_weight, self.attn.in_proj_bias
        place = self.places(grid)[None]
        q = self.ln_q(self.query[:k] + self.pos_embed[:k])[None]
        key = self.ln_k(place if x is None else x + place)
        q, key = (
            F.linear(y, weight[i * width : (i + 1) * width], bias[i * width : (i + 1) * width])
            .unflatten(2, (self.config.heads, -1))
            .transpose(1, 2)
            for i, y in enumerate((q, key))
        )  # (1, heads, k, d) and (1 or B, heads, N, d)
        return (q @ key.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)

    def places(self, grid: Grid) -> Tensor:
        """The embedding of the positions of the queries, interpolated to the grid: (N, in_width)."""
        side = math.isqrt(self.config.queries)
        embed = self.pos_embed.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
        embed = F.interpolate(embed, grid, mode="bicubic")
        return embed[0].flatten(1).T.to(self.pos_embed.dtype)


def sines(side: int, width: int) -> Tensor:
    """Positions of a square grid: (side * side, width), sines and cosines of the column, then of the row."""
    rates = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates  # (side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], 1).float()  # (side, width / 2)
    column = line[None].expand(side, -1, -1)
    row = line[:, None].expand(-1, side, -1)
    return torch.cat([column, row], 2).flatten(0, 1)
