"""The language model of a host, with the low-rank updates that a module brings along."""

from __future__ import annotations

from typing import Any

from torch import nn


class Adapted:
    """The updates rest where the budget of a stage is 1.0, which is the bare model. Raises ValueError where a
    module's adapter is one of another language model."""

    def __init__(self, stage: Any, module: nn.Module):
        self.stage, self.decoder, self.adapter = stage, stage.vision.decoder, module.adapter
        self.adapter.check(self.decoder)
        self._hooks: list[Any] = []

    @classmethod
    def of(cls, stage: Any, module: nn.Module | None) -> Adapted | None:
        """None for a module that brings none along."""
        return cls(stage, module) if getattr(module, "adapter", None) is not None else None

    def install(self) -> None:
        self._hooks = self.adapter.install(self.decoder, self._resting)

    def _resting(self) -> bool:
        return isinstance(self.stage.keep, float) and self.stage.keep == 1

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
