"""How many tokens are kept in training: nested dropout (Rippel et al., arXiv:1402.0915)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("uniform", "pow2", "uniform_pow2", "levels", "full")


@dataclass(frozen=True)
class DropSchedule:
    """Draws how many of K tokens are kept.

    kind     "uniform"       1 to K, equally often (One-D-Piece)
             "pow2"          1, 2, 4, ... K, equally often (FlexTok)
             "uniform_pow2"  1 to K rounded up to a power of two: half of the draws are K (FlexTok)
             "levels"        one of `levels`, with `weights` (ResTok)
             "full"          K
    shared   one draw for the whole batch instead of one for each image
    """

    kind: str = "uniform"
    levels: Sequence[int] = ()
    weights: Sequence[float] = ()
    shared: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a drop schedule is one of {', '.join(KINDS)}, not {self.kind!r}")
        if (self.kind == "levels") != bool(self.levels) or (
            self.weights and len(self.weights) != len(self.levels)
        ):
            raise ValueError(
                "a schedule of levels takes levels, and as many weights or none; others take neither"
            )

    def draw(self, k: int, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """(batch,) int64 between 1 and k."""
        n = 1 if self.shared else batch
        if self.kind == "levels":
            weights = torch.tensor(self.weights or [1.0] * len(self.levels))
            chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
            kept = torch.tensor(self.levels)[chosen]
        elif self.kind == "pow2":
            kept = 2 ** torch.randint(0, (k - 1).bit_length() + 1, (n,), generator=generator)
        elif self.kind == "full":
            kept = torch.full((n,), k)
        else:
            kept = torch.randint(1, k + 1, (n,), generator=generator)
            if self.kind == "uniform_pow2":
                powers = 2 ** torch.arange((k - 1).bit_length() + 1)
                kept = powers[torch.searchsorted(powers, kept)]
        return kept.clamp(max=k).expand(batch).clone()
