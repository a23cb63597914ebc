"""Stages that look at features of images, without a question."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api import compress
from ..learned.base import Grid
from .features import Features, behind, told_to_decoder
from .objective import Objective, all_tokens


class OnFeatures(Objective):
    """Images only. Several grids of one batch count by how many rows they have.

    Raises ValueError where the module is to work inside of the encoder.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.where.get("stage") == "encoder":
            raise ValueError(
                "it would learn from what leaves the encoder, and compress.stage puts the module inside of "
                "it: leave this stage out"
            )

    def attach(self) -> None:
        self.taught("")
        self.features = Features(self.host, behind(self.host, self.module))

    def detach(self) -> None:
        self.features.remove()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        found = self.features(batch["vision"])
        rows, generator = sum(len(x) for x, _ in found), self.generator()
        total: dict[str, Tensor] = {}
        for x, grid in found:
            for name, value in self.of(x.float(), grid, generator).items():
                total[name] = total.get(name, 0) + value * (len(x) / rows)
        return total

    def of(self, x: Tensor, grid: Grid, generator: torch.Generator) -> dict[str, Tensor]:
        return self.module.training_loss(x, grid, generator)


class Length(OnFeatures):
    """The halting head, of as many lengths of each picture as the stage says."""

    def attach(self) -> None:
        super().attach()
        self.taught("features")

    def of(self, x: Tensor, grid: Grid, generator: torch.Generator) -> dict[str, Tensor]:
        counts = torch.tensor(self.module.counts_for(grid))
        drawn = torch.randint(len(counts), (len(x), self.stage.lengths), generator=generator)
        return {"halting": self.module.halting_loss(x, grid, counts[drawn].to(x.device))}


class Imitate(Objective):
    """What the language model is told of images with replaced attention as with the host's own: the mean
    square difference, by the variance of the host's."""

    def attach(self) -> None:
        self.handle = compress(self.host, self.module, **self.where)

    def detach(self) -> None:
        self.handle.remove()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        with torch.no_grad(), all_tokens(self.handle):
            wanted = told_to_decoder(self.host, batch["vision"])  # (M, D)
        found = told_to_decoder(self.host, batch["vision"])
        return {"features": (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()}
