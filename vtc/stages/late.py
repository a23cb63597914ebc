"""Marks on their way through a projector that works on features only when they are put into the prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..threads import ByThread


class LateProjector:
    """Holds NaN back from the projector: its outputs are marked again, and its weights get finite gradients,
    which zero times NaN would not be."""

    def __init__(self, projector: nn.Module):
        self.projector = projector
        self._dropped: ByThread[Tensor] = ByThread()  # (N, 1)
        self._hooks: list[Any] = []

    def install(self) -> None:
        self._hooks = [
            self.projector.register_forward_pre_hook(self._hold),
            self.projector.register_forward_hook(self._mark),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._dropped.clear()

    def _hold(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0]  # (N, D)
        dropped = x[..., :1].isnan()
        self._dropped.set(dropped)
        return (x.masked_fill(dropped, 0),)

    def _mark(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.masked_fill(self._dropped.pop(), float("nan"))
