"""The language model of a host, with the low-rank updates that a module brings along."""

from __future__ import annotations

from typing import Any


class Adapted:
    """The updates rest where the budget is 1.0, which is the bare model. Raises ValueError where a module's
    adapter is one of another language model."""

    def __init__(self, stage: Any):
        self.stage, self.decoder, self.adapter = stage, stage.vision.decoder, stage.method.module.adapter
        self.adapter.check(self.decoder)

    def install(self) -> None:
        self.adapter.install(self.decoder, self._resting)

    def _resting(self) -> bool:
        return isinstance(self.stage.keep, float) and self.stage.keep == 1

    def remove(self) -> None:
        self.adapter.remove()
