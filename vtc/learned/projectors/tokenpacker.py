from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import initialise
from ..base import Grid, Resampler
from ..grids import as_map, as_tokens, windows
from ..registry import register_module


@register_module
class TokenPacker(Resampler):
    """A coarse token for each window of patches, which attends to the patches of its window (TokenPacker).

    "TokenPacker: Efficient Visual Projector for Multimodal LLM", arXiv:2407.02392; names and shapes of the
    parameters as in github.com/CircleRadon/TokenPacker. The queries are the features resized bilinearly to
    rows / window x columns / window; keys and values are those of several layers side by side. As in the
    authors' code, and unlike what the paper draws, the query is not added to what it has read.

    Input: x (B, N, in_width), the last layer but one of the encoder without CLS, and `levels`, one (B, N,
    in_width) for each of `layers`. Output: (B, N / window², out_width), row by row.

    Departures: the authors' code knows 24 x 24 tokens of 1024 numbers, 4 layers and a language model of 4096
    numbers; here each is an option, and the grid may be any that the window divides. Without `layers`, keys
    and values are those of x alone, the paper's ablation. Cutting images into slices is the host's business.
    ValueError where the window does not divide the grid, and for other numbers of tokens than one a window.
    """

    name = "tokenpacker"
    paper = "arXiv:2407.02392"
    weights = "Apache-2.0 by its pyproject.toml; the repository has no licence file"
    prefixes = ("model.mm_projector.", "mm_projector.")
    place = "instead"

    @dataclass(frozen=True)
    class Config:
        """layers are indices of transformers' hidden_states; width is that of the attention."""

        in_width: int = 1024
        out_width: int = 4096
        window: int = 2
        layers: tuple[int, ...] = (12, 16, 22, 23)
        width: int = 1024
        heads: int = 8

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.window < 1 or c.width % c.heads:
            raise ValueError("window is at least 1, and heads must divide width")
        several = c.in_width * max(1, len(c.layers))
        self.q_proj_1 = nn.Linear(c.in_width, c.width, bias=False)
        self.k_proj_1 = _mlp(several, c.width)
        self.v_proj_1 = _mlp(several, c.width)
        self.ln_q_1 = nn.LayerNorm(c.width, eps=1e-6)
        self.ln_k_1 = nn.LayerNorm(c.width, eps=1e-6)
        self.ln_v_1 = nn.LayerNorm(c.width, eps=1e-6)
        self.clip_attn = nn.MultiheadAttention(c.width, c.heads, batch_first=True)
        self.mlp = _mlp(c.width, c.out_width)
        initialise(self)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.config.layers

    def counts(self, n: int) -> tuple[int, ...]:
        return (n // self.config.window**2,)

    def counts_for(self, grid: Grid) -> tuple[int, ...]:
        if grid[0] % self.config.window or grid[1] % self.config.window:
            raise ValueError(
                f"{self.name} needs a grid that windows of {self.config.window} divide, "
                f"not {grid[0]} x {grid[1]}"
            )
        return self.counts(grid[0] * grid[1])

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        k = self.checked(x, grid, k, levels)
        side = self.config.window
        coarse = F.interpolate(as_map(x.float(), grid), (grid[0] // side, grid[1] // side), mode="bilinear")
        q = self.ln_q_1(self.q_proj_1(as_tokens(coarse).to(x.dtype)))  # (B, k, width)
        read = torch.cat([*levels], 2) if levels else x
        key = windows(self.ln_k_1(self.k_proj_1(read)), grid, side)  # (B, k, side², width)
        value = windows(self.ln_v_1(self.v_proj_1(read)), grid, side)
        # each window is a sequence of its own
        q, key, value = q.flatten(0, 1)[:, None], key.flatten(0, 1), value.flatten(0, 1)
        out = self.clip_attn(q, key, value, need_weights=False)[0]  # (B * k, 1, width)
        return self.mlp(out.view(len(x), k, -1))


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
