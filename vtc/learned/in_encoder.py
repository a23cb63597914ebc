"""Modules that reduce tokens between the blocks of an encoder, too."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ..schedule import Budget, Schedule
from ..tokens import Reduction, Tokens
from .base import Grid
from .method import FromModule


class BetweenBlocks(nn.Module):
    """What a `Resampler` inherits, in front of it, that can work at the encoder stage.

    vtc.compress(model, module, keep=..., stage="encoder", schedule=...)

    It reads what leaves a block, CLS and registers set aside, and the next block gets its tokens in the place
    of these. Gradients flow to the module and to the blocks before it.

    whole_grid  it reads rows and columns, so that it can work once; else at several blocks
    any_number  it makes any number of tokens, so that it needs a budget
    schedule    where it works by default, see `vtc.schedule.counts`
    """

    stages: ClassVar[tuple[str, ...]] = ("features", "encoder")
    whole_grid: ClassVar[bool] = True
    any_number: bool = False
    schedule: Schedule = "once"

    def as_method(self) -> InEncoder:
        """What `vtc.compress()` makes of it."""
        return InEncoder(self)


@dataclass(repr=False)
class InEncoder(FromModule):
    """Tokens that a module makes of features, or of what leaves a block of an encoder."""

    after_block = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.whole_grid = self.needs_grid = self.module.whole_grid
        self.schedule = self.module.schedule

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """The blocks behind which it can work; None: any."""
        return None

    def budget(self, grid: Grid) -> Budget:
        """How many tokens of a grid are left, where nothing is said."""
        return self.module.counts_for(grid)[-1]

    def reduce(self, tokens: Tokens, k: int) -> Reduction:
        if tokens.n != math.prod(tokens.grid):  # some are gone, and what is left is no grid
            tokens = replace(tokens, grid=(1, tokens.n))
        return super().reduce(tokens, k)
