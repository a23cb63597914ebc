"""What was recorded in one call of the encoder, handed out tile by tile."""

from __future__ import annotations

from torch import Tensor

from ..capture import AROUND, Recording
from ..crops import Crops
from ..hosts.host import Layout
from ..method import Need
from .rows import Extras


class Evidence:
    """What methods and allocations need of each tile of each image of a call.

    vision  for each image, for each of its tiles what the projector was given (n, D'); None where the
            features themselves are to stand for it
    """

    def __init__(
        self,
        recording: Recording,
        layouts: list[Layout],
        features: tuple[Tensor, ...],
        vision: list[list[Tensor]] | None,
    ):
        self._recording, self._layouts, self._features, self._vision = recording, layouts, features, vision
        self._read: dict[str, Tensor] = {}  # (patches, layers, ...)

    def of(self, needs: tuple[Need, ...], image: int) -> list[Extras]:
        """One dict for each tile of an image: (layers, n, ...), "vision" (n, D')."""
        found: list[Extras] = [{} for _ in self._layouts[image].tiles]
        for need in needs:
            if need.kind != "text":  # which belongs to no token
                for extras, value in zip(found, self._values(need, image), strict=True):
                    extras[need.name] = value
        return found

    def _values(self, need: Need, image: int) -> list[Tensor]:
        layout = self._layouts[image]
        if need.kind == "vision":
            if self._vision is not None:
                return self._vision[image]
            return [self._features[image][tile.slots] for tile in layout.tiles]
        key = f"{need.kind} {need.layers}"
        if key not in self._read:
            self._read[key] = self._recording.read(need)
        extra = self._read[key]
        own = [_by_token(extra, patches) for patches in layout.patches]
        return _from_thumbnail(layout, own) if need.view == "thumbnail" else own


def _by_token(extra: Tensor, patches: Tensor) -> Tensor:
    """From patches (P, layers, ...) to tokens made of patches (n, m): (layers, n, ...)."""
    return extra[patches.to(extra.device)].mean(dim=1).transpose(0, 1)


def _from_thumbnail(layout: Layout, own: list[Tensor]) -> list[Tensor]:
    crops = Crops.of(layout.tiles)
    if crops is None:
        return own
    seen = crops.cut(layout.tiles, own[crops.thumbnail])
    return [seen.get(number, value) for number, value in enumerate(own)]


def around(needs: tuple[Need, ...], kind: str) -> bool:
    """Whether a kind of AROUND is among the needs."""
    assert kind in AROUND
    return any(need.kind == kind for need in needs)
