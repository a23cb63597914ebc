"""The transformers of GigaTok (arXiv:2504.08736) between a picture's map and its tokens, with the redundant
tokens of ReToK (arXiv:2601.01535).

Names of parameters are those of their checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import Attention
from ..bottlenecks import VQ, Code


class Reader(nn.Module):
    """The map of a picture to tokens: queries read it, that start as averages of it, coarse to fine.

    size      width, depth and heads
    channels  of the map, and of what a query has read
    grid      the map's side, a power of two
    tokens    how many queries there are, a power of two
    padding   how many more stand behind them, which start as the last ones
    causal    a query attends to none behind it
    """

    def __init__(
        self, size: tuple[int, int, int], channels: int, grid: int, tokens: int, padding: int, causal: bool
    ) -> None:
        super().__init__()
        width, depth, heads = size
        self.tokens, self.padding, self.causal = tokens, padding, causal
        self.encoder_embed = nn.Linear(channels, width)
        self.ln_pre = nn.LayerNorm(channels)
        self.positional_embedding = _places(grid**2, width)
        self.latent_token_positional_embedding = _places(tokens, width)
        self.latent_token_positional_embedding_comp = _places(padding, width)
        self.global_proj = nn.Linear(width, width)
        self.transformer = nn.ModuleList(QueryBlock(width, heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, channels, 1)

    def forward(self, grid: Tensor, n: int) -> Tensor:
        """(B, channels, h, w) to what the first n queries have read: (B, channels, n)."""
        memory = self.encoder_embed(self.ln_pre(grid.flatten(2).transpose(1, 2)))  # (B, h * w, width)
        x = self.queries(memory.transpose(1, 2).unflatten(2, grid.shape[2:]))[:, :n]
        place, memory_place = _token_places(self)[:n], self.positional_embedding[:, 0]
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril() if self.causal else None
        for block in self.transformer:
            x = block(x, memory, place, memory_place, mask)
        return self.conv_out(self.ln_post(x).transpose(1, 2)[:, :, None])[:, :, 0]

    def queries(self, grid: Tensor) -> Tensor:
        """What the queries start as, from the embedded map (B, width, h, w): (B, tokens + padding, width)."""
        x = pooled(grid, self.tokens)
        return self.global_proj(torch.cat([x, x[:, self.tokens - self.padding :]], 1))


class Painter(nn.Module):
    """Tokens to the map of a picture. Its queries all start as the first token.

    size, channels, grid, tokens and padding are those of `Reader`.

    inner     (depth, width) of a head that says features of `width` numbers, from what the queries are after
              `depth` blocks; None: no head
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        channels: int,
        grid: int,
        tokens: int,
        padding: int,
        inner: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        width, depth, heads = size
        self.grid = grid
        self.inner_depth = inner[0] if inner else None
        self.decoder_embed = nn.Linear(channels, width)
        self.ln_pre = nn.LayerNorm(channels)
        self.positional_embedding = _places(grid**2, width)
        self.latent_token_positional_embedding = _places(tokens, width)
        self.latent_token_positional_embedding_comp = _places(padding, width)
        self.transformer = nn.ModuleList(QueryBlock(width, heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        if inner:
            hidden = 4 * width
            layers = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
            self.distill_mlp = nn.Sequential(*layers, nn.Linear(hidden, inner[1]))

    def forward(self, tokens: Tensor, index: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, k, channels), their places (B, k) and which are there (B, 1, k) to a map (B, channels,
        h, w), and the features that the head says (B, h * w, width) or None."""
        memory = self.decoder_embed(self.ln_pre(tokens))  # (B, k, width)
        place, memory_place = self.positional_embedding[:, 0], _token_places(self)[index.clamp(min=0)]
        x, inner = memory[:, :1].expand(-1, self.grid**2, -1), None
        for depth, block in enumerate(self.transformer, 1):
            x = block(x, memory, place, memory_place, memory_mask=mask)
            if depth == self.inner_depth:
                inner = self.distill_mlp(x)
        return self.conv_out(self.ln_post(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))), inner


def pooled(grid: Tensor, n: int) -> Tensor:
    """The map (B, C, h, w) as n = 2^l averages, coarse to fine: (B, n, C).

    Twice the whole, then 2 halves, 4 quarters and so on to n / 2 parts, split left from right first; the
    parts of a level row by row.
    """
    levels = [grid.mean((2, 3), keepdim=True)]
    for level in range(n.bit_length() - 1):
        rows, columns = 2 ** (level // 2), 2 ** ((level + 1) // 2)
        levels.append(F.avg_pool2d(grid, (grid.shape[2] // rows, grid.shape[3] // columns)))
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)


def _places(n: int, width: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(n, 1, width))


def _token_places(module: Reader | Painter) -> Tensor:
    """Of all tokens, the redundant ones last: (tokens + padding, width)."""
    places = (module.latent_token_positional_embedding, module.latent_token_positional_embedding_comp)
    return torch.cat(places)[:, 0]


class QueryBlock(nn.Module):
    """A pre-norm block of DETR's decoder (arXiv:2005.12872): queries attend to each other, then to a memory
    that is not normalised. Positions are added to what is compared, not to what is read."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = _Attention(width, heads)
        self.multihead_attn = _Attention(width, heads)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        place: Tensor,
        memory_place: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """x and place (B, Q, width); memory and memory_place (B, T, width); mask (Q, Q); memory_mask (B, 1,
        T)."""
        normed = self.norm1(x)
        x = x + self.self_attn(normed + place, normed + place, normed, mask)
        x = x + self.multihead_attn(self.norm2(x) + place, memory + memory_place, memory, memory_mask)
        return x + self.linear2(F.gelu(self.linear1(self.norm3(x))))


class _Attention(Attention):
    """Queries, keys and values of different tokens."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, d)
            for x, weight, bias in zip((query, key, value), weights, biases)
        )
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class RotatedVQ(VQ):
    """A codebook of which gradients reach the latent through the rotation that takes it to its entry, instead
    of straight through (rotation trick, arXiv:2410.06424). For entries of length 1, to which `VQ` adds
    nothing."""

    def __init__(self, size: int, dim: int, beta: float = 0.25) -> None:
        super().__init__(size, dim, l2=True, beta=beta)

    def forward(self, z: Tensor) -> Code:
        code = super().forward(z)
        with torch.autocast(z.device.type, enabled=False):
            z, entry = self._scaled(z.float()), code.values.detach()
            middle = F.normalize(z + entry, dim=-1).detach()
            along, turned = (z * middle).sum(-1, keepdim=True), (z * z.detach()).sum(-1, keepdim=True)
            return code._replace(values=z - 2 * along * middle + 2 * turned * entry)
