"""The baseline that every method must beat: a random subset."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Select, register
from ..tokens import Tokens


@register
@dataclass
class Random(Select):
    """Keeps a random subset, another one for every picture and every seed.

    The same picture always gets the same subset under the same seed, in any batch. Inside an encoder every
    block goes by the same draw, so that whichever blocks remove tokens, the same ones are left in the end.
    """

    name = "random"
    stages = ("features", "encoder", "decoder")
    schedule = "staged"

    seed: int = 0

    def __post_init__(self):
        if self.seed != int(self.seed):
            raise ValueError(f"seed is a whole number, not {self.seed!r}")

    def score(self, tokens: Tokens) -> Tensor:
        rows, places = [], tokens.grid[0] * tokens.grid[1]
        for lot in tokens.lot.tolist():
            generator = torch.Generator().manual_seed((lot * 1_000_003 + int(self.seed)) % (1 << 63))
            rows.append(torch.rand(places, generator=generator))
        return torch.stack(rows).to(tokens.x.device).gather(1, tokens.place)  # (B, N)
