from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..schedule import Budget
from ..tokens import Reduction, Tokens
from .base import Grid, Resampler
from .in_encoder import BetweenBlocks, InEncoder
from .registry import build, get_module, register_module


@register_module
class Staged(BetweenBlocks, Resampler):
    """A module for each of several blocks of an encoder, as DynamicViT and SiT have them.

    DynamicViT's scorers (arXiv:2106.02034), or SiT's token slimming modules (arXiv:2111.12624):

        build("staged", module="learned-scorer", blocks=(2, 5, 8), options=({"in_width": 384},))
        sizes = tuple({"in_width": 320, "tokens": k} for k in (98, 49, 24))
        build("staged", module="token-slimming", blocks=(0, 1, 2), options=sizes)

    These are the places of DeiT-S and SiT-T: in front of blocks 3, 6 and 9 is behind blocks 2, 5 and 8.

    Each reads what leaves its block. Where their numbers of tokens are fixed no budget is given. Published
    weights of either load: score_predictor.0, ... and tsm.0, ....
    """

    name = "staged"
    paper = "arXiv:2106.02034, arXiv:2111.12624"
    weights = "as of its modules"
    stages = ("encoder",)
    whole_grid = False

    @dataclass(frozen=True)
    class Config:
        """module: the name of one that works on tokens that are no grid. blocks: ascending. options: of the
        module for each block, or of all where there is one."""

        module: str = "learned-scorer"
        blocks: tuple[int, ...] = (2, 5, 8)
        options: tuple[dict[str, Any], ...] = field(default=({},))

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, kind = config, get_module(config.module)
        if not issubclass(kind, BetweenBlocks) or kind.whole_grid or kind is Staged:
            raise ValueError(f"'{c.module}' cannot work at several blocks, behind which there is no grid")
        if not c.blocks or list(c.blocks) != sorted(set(c.blocks)) or c.blocks[0] < 0:
            raise ValueError(f"blocks are ascending numbers from 0 on, not {c.blocks}")
        if len(c.options) not in (1, len(c.blocks)):
            raise ValueError(f"give options for each of the {len(c.blocks)} blocks, or once for all")
        each = c.options if len(c.options) > 1 else c.options * len(c.blocks)
        self.parts = nn.ModuleList(build(c.module, **options) for options in each)
        self.schedule, self.any_number = tuple(c.blocks), kind.any_number

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {re.sub(r"^(score_predictor|tsm)\.(?=\d)", "parts.", key): key for key in state}
        return {new: state[old] for new, old in found.items() if new.startswith("parts.")}

    @property
    def in_width(self) -> int:
        return self.parts[0].in_width

    @property
    def out_width(self) -> int:
        return self.parts[-1].out_width

    def counts(self, n: int) -> Sequence[int]:
        return self.parts[-1].counts(n)

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        """What the last of them makes of x, without blocks in between."""
        return self.parts[-1](x, grid, k, levels)

    def as_method(self) -> InStages:
        return InStages(self)


@dataclass(repr=False)
class InStages(InEncoder):
    """The modules of a `Staged`, each behind its block."""

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(self.module.config.blocks)

    def budget(self, grid: Grid) -> Budget:
        parts = zip(self.blocks, self.module.parts, strict=True)
        return {block: part.counts_for(grid)[-1] for block, part in parts}

    def reduce(self, tokens: Tokens, k: int) -> Reduction:
        return InEncoder(self.module.parts[self.blocks.index(tokens.layer)]).reduce(tokens, k)
