"""The baseline that every method must beat: a random subset."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Select, register
from ..tokens import Tokens


@register
@dataclass
class Random(Select):
    """Keeps a random subset of the positions, drawn from a seed.

    Every row of the same grid gets the same subset, so that a batch gives what single runs give; vary the
    seed to average over subsets.
    """

    name = "random"

    seed: int = 0

    def score(self, tokens: Tokens) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(tokens.n, generator=generator).to(tokens.x.device).expand(len(tokens.x), -1)
