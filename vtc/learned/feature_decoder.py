"""From tokens back to the features they were made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Grid
from .pyramid import Pyramid
from .reading import Reader, mixture, positions, waves


class FeatureDecoder(nn.Module):
    """Places of the grid read tokens, and refine the averages that these start as.

    forward(tokens (B, k, D), valid (B, k), pyramid, grid) -> (B, N, D). size: width, depth and heads.
    """

    def __init__(
        self, in_width: int, tokens: int, size: tuple[int, int, int], ratio: float, order: int
    ) -> None:
        super().__init__()
        self.width, depth, heads = size
        self.order = order
        self.token_proj = nn.Linear(in_width, self.width)
        self.token_position = nn.Parameter(torch.randn(tokens, self.width))
        self.mixture = mixture(tokens, heads, order)
        self.draft_proj = nn.Linear(in_width, self.width)
        self.readers = nn.ModuleList(Reader(self.width, heads, ratio) for _ in range(depth))
        self.out_proj = nn.Linear(self.width, in_width)

    def forward(self, tokens: Tensor, valid: Tensor, pyramid: Pyramid, grid: Grid) -> Tensor:
        draft = pyramid.draft(tokens, valid)  # (B, N, D)
        own = self.token_proj.weight.dtype
        context = self.token_proj(tokens.to(own)) + self.token_position[: tokens.shape[1]]
        x = self.draft_proj(draft.to(own))
        x = x + positions(grid, self.width, x)
        weights = (self.mixture[:, : tokens.shape[1]] @ waves(grid, self.order, x)).transpose(1, 2)
        for reader in self.readers:
            x = reader(x, context, weights, valid)
        return draft + self.out_proj(x).float()
