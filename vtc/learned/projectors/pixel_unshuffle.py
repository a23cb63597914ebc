from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...transformer import initialise
from ..base import Grid, Resampler
from ..grids import PADDINGS, from_windows, windows
from ..registry import register_module

HEADS = ("mlp", "linear")


@register_module
class PixelUnshuffle(Resampler):
    """The tokens of a window side by side, projected (pixel unshuffle of InternVL and Idefics3).

    InternVL 1.5 and later (arXiv:2404.16821, github.com/OpenGVLab/InternVL): head="mlp", the parameters
    `mlp1` with their published names. Idefics3 (arXiv:2408.12637) and SmolVLM: head="linear", one matrix.
    Published weights are read in the names of the authors and in those of transformers.

    Input: x (B, N, in_width). Output: (B, k, out_width) with k = ceil(rows / ratio) * ceil(columns / ratio).
    The channels of a cell are those of its tokens, row by row; `convert_linear_order` turns the weights of a
    layer behind torch's `pixel_unshuffle`, which has the channels outside, into this order and back.

    `transposed`, InternVL's ps_version v1, gives the cells column by column. Departure: a grid that ratio
    does not divide is padded at the bottom and at the right, where published code fails.
    ValueError for other options and other numbers of tokens.
    """

    name = "pixel-unshuffle"
    paper = "arXiv:2404.16821, arXiv:2408.12637"
    weights = "MIT (InternVL), Apache-2.0 (Idefics3, SmolVLM)"
    prefixes = (
        "mlp1.", "model.multi_modal_projector.", "multi_modal_projector.",
        "model.connector.modality_projection.", "connector.modality_projection.",
    )  # fmt: skip
    place = "instead"

    @dataclass(frozen=True)
    class Config:
        """padding is "edge", last rows and columns again, or "zeros"."""

        in_width: int = 1024
        out_width: int = 4096
        ratio: int = 2
        head: str = "mlp"
        transposed: bool = False
        padding: str = "edge"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.head not in HEADS or c.padding not in PADDINGS or c.ratio < 1:
            raise ValueError(
                f"head is one of {', '.join(HEADS)}, padding one of {', '.join(PADDINGS)}, ratio at least 1"
            )
        cell = c.in_width * c.ratio**2
        if c.head == "linear":
            self.proj = nn.Linear(cell, c.out_width, bias=False)
        else:
            self.mlp1 = nn.Sequential(
                nn.LayerNorm(cell),
                nn.Linear(cell, c.out_width),
                nn.GELU(),
                nn.Linear(c.out_width, c.out_width),
            )
        initialise(self)

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}  # names in transformers
        renamed = {}
        for key, value in super().rename(state).items():
            first, _, rest = key.partition(".")
            first = theirs.get(first, first)
            renamed[f"mlp1.{first}.{rest}" if first.isdigit() else key] = value
        return renamed

    def counts(self, n: int) -> tuple[int, ...]:
        """For a grid without padding, whatever its shape."""
        return (n // self.config.ratio**2,)

    def counts_for(self, grid: Grid) -> tuple[int, ...]:
        rows, columns = (-(-side // self.config.ratio) for side in grid)
        return (rows * columns,)

    def owners(self, x: Tensor, grid: Grid, k: int) -> Tensor:
        ratio, transposed = self.config.ratio, self.config.transposed
        row, column = (torch.arange(side) // ratio for side in grid)
        high, wide = (-(-side // ratio) for side in grid)
        cells = column * high + row[:, None] if transposed else row[:, None] * wide + column
        return cells.flatten().expand(len(x), -1)

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        self.checked(x, grid, k, levels)
        c = self.config
        x = unshuffle(x, grid, c.ratio, c.transposed, c.padding)
        return self.proj(x) if c.head == "linear" else self.mlp1(x)


def unshuffle(x: Tensor, grid: Grid, ratio: int, transposed: bool = False, padding: str = "edge") -> Tensor:
    """Tokens (B, N, D), row by row, to cells (B, k, ratio² * D), row by row or, transposed, by column."""
    cells = windows(x, grid, ratio, padding).flatten(2)
    if transposed:
        cells = cells.unflatten(1, (-(-grid[0] // ratio), -1)).transpose(1, 2).flatten(1, 2)
    return cells


def shuffle(cells: Tensor, grid: Grid, ratio: int, transposed: bool = False) -> Tensor:
    """The inverse of `unshuffle`: cells (B, k, ratio² * D) to the tokens (B, N, D) of the grid, without its
    padding."""
    if transposed:
        cells = cells.unflatten(1, (-(-grid[1] // ratio), -1)).transpose(1, 2).flatten(1, 2)
    return from_windows(cells.unflatten(2, (ratio**2, -1)), grid, ratio)


def convert_linear_order(weight: Tensor, ratio: int, channels: int, inverse: bool = False) -> Tensor:
    """The weight (out, ratio² * channels) of a layer behind torch's `pixel_unshuffle` for cells as here:
    inputs ordered (channel, place in the window) become (place, channel). `inverse`: the way back."""
    shape = (ratio**2, channels) if inverse else (channels, ratio**2)
    return weight.unflatten(1, shape).transpose(1, 2).flatten(1)
