from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...transformer import initialise
from ..base import Grid, LearnedModule, Resampler
from ..grids import PADDINGS, from_windows, windows
from ..registry import register_module


class Residual(nn.Module):
    """x + MLP(norm(x)), the identity when fresh."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


@register_module
class TokenShuffle(Resampler):
    """The tokens of a window, each narrowed, side by side as one token of full width (Token-Shuffle).

    "Token-Shuffle: Towards High-Resolution Image Generation with Autoregressive Models", arXiv:2504.17789.
    `down` narrows a token from in_width to out_width / window²; the tokens of a window side by side pass
    `blocks` residual MLPs (`fuse`). Here it is a projector with few parameters; with `TokenUnshuffle` it is
    undone again.

    Input: x (B, N, in_width). Output: (B, k, out_width), k = ceil(rows / window) * ceil(columns / window),
    row by row.

    No code was published: the names are this project's, `down` is one linear layer, blocks have a norm in
    front, one hidden layer as wide as the token, and start as the identity. A grid that the window does not
    divide is padded at the bottom and at the right.
    ValueError where window² does not divide out_width, and for other numbers of tokens.
    """

    name = "token-shuffle"
    paper = "arXiv:2504.17789"
    place = "instead"

    @dataclass(frozen=True)
    class Config:
        """padding is "edge", last rows and columns again, or "zeros"."""

        in_width: int = 1024
        out_width: int = 4096
        window: int = 2
        blocks: int = 2
        padding: str = "edge"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        _check(c.window, c.out_width, "out_width")
        if c.padding not in PADDINGS:
            raise ValueError(f"padding is one of {', '.join(PADDINGS)}, not {c.padding!r}")
        self.down = nn.Linear(c.in_width, c.out_width // c.window**2)
        self.fuse = nn.Sequential(*(Residual(c.out_width) for _ in range(c.blocks)))
        _initialise(self)

    def counts(self, n: int) -> tuple[int, ...]:
        """For a grid without padding, whatever its shape."""
        return (n // self.config.window**2,)

    def counts_for(self, grid: Grid) -> tuple[int, ...]:
        rows, columns = (-(-side // self.config.window) for side in grid)
        return (rows * columns,)

    def owners(self, x: Tensor, grid: Grid, k: int) -> Tensor:
        row, column = (torch.arange(side) // self.config.window for side in grid)
        cells = row[:, None] * -(-grid[1] // self.config.window) + column
        return cells.flatten().expand(len(x), -1)

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        self.checked(x, grid, k, levels)
        return self.fuse(windows(self.down(x), grid, self.config.window, self.config.padding).flatten(2))


@register_module
class TokenUnshuffle(LearnedModule):
    """The other half of Token-Shuffle: each token becomes those of its window again.

    arXiv:2504.17789. `split`, residual MLPs, then each token cut into window² pieces, which `up` widens.
    Input: (B, k, in_width) and the grid the tokens came from. Output: (B, N, out_width), without padding.
    ValueError where window² does not divide in_width, and for features that do not fit the grid.
    """

    name = "token-unshuffle"
    paper = "arXiv:2504.17789"

    @dataclass(frozen=True)
    class Config:
        in_width: int = 4096
        out_width: int = 4096
        window: int = 2
        blocks: int = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        _check(c.window, c.in_width, "in_width")
        self.split = nn.Sequential(*(Residual(c.in_width) for _ in range(c.blocks)))
        self.up = nn.Linear(c.in_width // c.window**2, c.out_width)
        _initialise(self)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        c = self.config
        k = -(-grid[0] // c.window) * -(-grid[1] // c.window)
        if x.dim() != 3 or x.shape[1:] != (k, c.in_width):
            raise ValueError(
                f"{self.name} takes tokens (B, {k}, {c.in_width}) for a grid of {grid[0]} x {grid[1]}, "
                f"not {tuple(x.shape)}"
            )
        pieces = self.split(x).unflatten(2, (c.window**2, -1))
        return self.up(from_windows(pieces, grid, c.window))


def _check(window: int, width: int, name: str) -> None:
    if window < 1 or width % window**2:
        raise ValueError(f"window is at least 1 and its square divides {name}, not {window} and {width}")


def _initialise(module: nn.Module) -> None:
    initialise(module)
    for part in module.modules():
        if isinstance(part, Residual):
            nn.init.zeros_(part.fc2.weight)
