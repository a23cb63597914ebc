"""What a stage of training makes small: what all kinds have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..api import Handle
from ..learned.base import Grid, LearnedModule
from .config import Stage


class Objective(nn.Module):
    """What `Trainer` trains: its only child is the module; the host is held beside it, frozen, and goes along
    to the device. `attach()` puts it into the host, `detach()` takes everything off again.

    grid   of a picture
    where  what else `compress()` is told of the module

    forward(**batch) gives {"loss": the sum, and each part by its name}.
    """

    accepts_loss_kwargs = False  # its loss is a mean over the batch, which Trainer is to divide

    def __init__(
        self,
        module: LearnedModule,
        model: nn.Module,
        stage: Stage,
        seed: tuple[int, ...],
        grid: Grid,
        where: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.module, self.stage, self.seed = module, stage, seed
        self.grid, self.where = grid, where or {}
        self._host = (model,)  # in a tuple: a child would be trained, saved and put into training mode
        self.rank = 0
        self.step = self.micro = 0

    @property
    def host(self) -> nn.Module:
        return self._host[0]

    def to(self, *args: Any, **kwargs: Any) -> Objective:
        self.host.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def begin(self, step: int) -> None:
        """A step of the optimizer begins; its forwards are counted."""
        self.step, self.micro = step, 0

    def generator(self, shared: bool = False) -> torch.Generator:
        """Numbers that the step alone decides, so that a training that is resumed draws the same; shared: by
        all processes."""
        words = [*self.seed, self.step, self.micro, 0 if shared else 1 + self.rank]
        state = int(np.random.SeedSequence(words).generate_state(1)[0])
        return torch.Generator().manual_seed(state)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        losses = self.losses(batch)
        self.micro += 1
        return {"loss": sum(losses.values()), **{name: value.detach() for name, value in losses.items()}}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def taught(self, error: str) -> None:
        """Notes what the halting head learns in this stage: nothing, where the tokens change under it."""
        if hasattr(self.module.config, "error"):
            self.module.config = replace(self.module.config, error=error)

    def attach(self) -> None:
        raise NotImplementedError

    def detach(self) -> None:
        raise NotImplementedError


@contextmanager
def all_tokens(handle: Handle) -> Iterator[None]:
    """The host as it is without the module."""
    before, handle.keep = handle.keep, 1.0
    try:
        yield
    finally:
        handle.keep = before
