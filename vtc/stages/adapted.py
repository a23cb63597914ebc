"""The language model of a host, with the low-rank updates that a module brings along."""

from __future__ import annotations

from torch import nn

from ..hosts import Vision


class Adapted:
    """Raises ValueError where a module's adapter is one of another language model."""

    def __init__(self, vision: Vision, module: nn.Module):
        self.decoder, self.adapter = vision.decoder, module.adapter
        self.adapter.check(self.decoder)

    def install(self) -> None:
        self.adapter.install(self.decoder)

    def remove(self) -> None:
        self.adapter.remove()
