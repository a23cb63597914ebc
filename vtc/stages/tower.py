"""The encoder stage inside of a vision-language model: the tower reduces tokens, and prompts follow it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..allocate import Proportional
from ..hosts import Vision
from ..hosts.host import Layout
from ..hosts.trunk import open_trunk
from ..method import Merge, Method
from ..record import Record
from ..schedule import Budget, Schedule
from ..threads import ByThread
from ..tokens import Reduction, Tokens
from .adapted import Adapted
from .encoder import EncoderStage
from .features import FeaturesStage
from .passage import Passage
from .rows import Row, whole_rows


class TowerStage:
    """Where the model reads the tower it finds all patches, a merged token in the place of each of its
    members. Of the members the prompt then keeps the one whose place the token has, and none of those that
    were dropped. An image whose tokens are made of several patches stays whole, so that models that make
    them of all images save work in the tower only."""

    name = "encoder"

    def __init__(
        self,
        vision: Vision,
        method: Method,
        keep: Budget,
        schedule: Schedule,
        restore: str | None,
        carry: str | None,
    ):
        if restore or carry:
            given = f"restore={restore!r}" if restore else f"carry={carry!r}"
            raise ValueError(f"{given} is for an encoder alone: a vision-language model reads all patches")
        if vision.video_encoder is not vision.encoder:
            raise ValueError(f"{vision.host.name} has a tower of its own for videos: use stage='features'")
        self.vision = vision
        trunk = open_trunk(vision.encoder.tower)
        read = _read(vision, len(trunk.blocks), _layers(vision))
        shown = frozenset(read) | {len(trunk.blocks) - 1}
        self.encoder = _Tower(trunk, method, self._fraction(keep), schedule, None, None, shown, max(read) + 1)
        self.encoder.pooled = not vision.host.resizable
        self.following = _Following(vision, self.encoder)
        self.adapted = Adapted.of(self, method.module)

    @property
    def method(self) -> Method:
        return self.encoder.method

    @property
    def keep(self) -> Budget:
        return self.encoder.keep

    @keep.setter
    def keep(self, keep: Budget) -> None:
        self.encoder.keep = keep

    def check(self, keep: Budget) -> Budget:
        return self.encoder.check(self._fraction(keep))

    def _fraction(self, keep: Budget) -> Budget:
        if self.vision.host.tiled and isinstance(keep, int):
            raise ValueError(
                f"the encoder stage takes keep as a fraction on {self.vision.host.name}: its images have "
                "different numbers of tiles, each of which is reduced by itself"
            )
        return keep

    @property
    def settings(self) -> dict[str, Any]:
        return self.encoder.settings

    @property
    def spent(self) -> float:
        return self.encoder.spent + self.following.spent

    @property
    def left_blocks(self) -> str:
        return self.encoder.left_blocks

    @property
    def last(self) -> list[Record]:
        """Images of the last forward; with what each block did where an image is one row of the tower."""
        records, passage = self.following.singles
        if passage is not None and passage is self.encoder.finished:
            for record, row in zip(records, self.encoder.last, strict=True):
                record.blocks, record.depth = row.blocks, row.depth
        return self.following.last

    def install(self) -> None:
        self.encoder.install()
        self.following.install()
        if self.adapted:
            self.adapted.install()

    def remove(self) -> None:
        if self.adapted:
            self.adapted.remove()
        self.following.remove()
        self.encoder.remove()


Layers = int | list[int] | tuple[int, ...]


def _layers(vision: Vision) -> Layers:
    """The hidden states of the tower that the model reads unless it is called otherwise."""
    return getattr(vision.base.config, "vision_feature_layer", -1)


def _read(vision: Vision, depth: int, layers: Layers) -> list[int]:
    """The blocks whose output the model reads."""
    if vision.host.deep or vision.host.features != "pooler_output":
        return list(range(depth))
    layers = [layers] if isinstance(layers, int) else layers
    # Counted over hidden states, of which the first is what enters block 0.
    return [(layer if layer >= 0 else depth + 1 + layer) - 1 for layer in layers]


class _Tower(EncoderStage):
    """Where patches are put together behind it, dropped ones are among them as they last were. So that it is
    known how that was, all patches are shown from the first block on that drops any.

    pooled  whether tokens may be made of several patches
    """

    pooled = True

    def install(self) -> None:
        self._dropping: dict[tuple[int, int, int], bool] = {}  # (block, tokens before and after)
        super().install()

    def shows(self, passage: Passage, block: int) -> bool:
        if super().shows(passage, block):
            return True
        return self.pooled and (block - 1 in passage.shown or self._drops(passage, block))

    def _drops(self, passage: Passage, block: int) -> bool:
        if block not in passage.states:
            return False
        reduction = passage.states[block].reduction
        key = (block, reduction.source.shape[1], reduction.k)
        if key not in self._dropping:  # once, since a GPU would have to wait
            self._dropping[key] = reduction.pruned or bool((reduction.source < 0).any())
        return self._dropping[key]


@dataclass
class _Equal(Merge):
    """Of all tokens that are one token of the encoder, keeps the one whose place that has."""

    name = "equal"

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        rows = zip(tokens.place_in_encoder, tokens.patch)
        index, source = (torch.stack(parts) for parts in zip(*(_standing(*row) for row in rows)))
        return Reduction(index, source, pruned=True)


def _standing(place: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
    """For each token the patch that it is, and the patch whose place its group has, -1 for none, both (n,) ->
    the tokens that stay, ascending, and each token's slot (n,). Where un-padding has cut off the place of a
    group its first member stays."""
    n = len(place)
    groups, member = place.unique(return_inverse=True)
    order = torch.arange(n, device=place.device)
    order = torch.where(place == patch, order - n, order)  # in front of all other members
    first = order.new_full(groups.shape, n).scatter_reduce(0, member, order, "amin") % n
    first = first[groups >= 0]
    index = first.sort().values
    slot = torch.searchsorted(index, first)
    slots = torch.full_like(groups, -1).masked_scatter(groups >= 0, slot)
    return index, slots[member]


class _Following(FeaturesStage):
    """Shortens prompts to the tokens that have left the tower.

    singles  the records of the last call of the tower and what it was, where each image is one row of it
    """

    def __init__(self, vision: Vision, encoder: EncoderStage):
        self.encoder = encoder
        self.singles: tuple[list[Record], Passage | None] = ([], None)
        self._passages: ByThread[list[Passage]] = ByThread()
        # All of what has left the tower: that is known without recording anything.
        super().__init__(vision, _Equal(), 1.0, "keep", Proportional())

    def features(self, name: str, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._passages.get() is not None:  # videos may go through the method for images
            return super().features(name, base, *args, **kwargs)
        self._check_layers(inspect.signature(self.sources[name].original).bind(base, *args, **kwargs))
        with self.encoder.collecting() as passages:
            self._passages.set(passages)
            try:
                return super().features(name, base, *args, **kwargs)
            finally:
                self._passages.pop()

    def _check_layers(self, given: inspect.BoundArguments) -> None:
        asked = given.arguments.get("vision_feature_layer")
        asked = _layers(self.vision) if asked is None else asked
        blocks = _read(self.vision, len(self.encoder.sites), asked)
        if not self.encoder.shown.issuperset(blocks):
            raise ValueError(
                f"vision_feature_layer={asked} is not what the model read when its tower was compressed: set "
                "it in model.config, then call compress() with replace=True"
            )

    def _reduce(
        self, features: tuple[Tensor, ...], layouts: list[Layout], *more: Any
    ) -> tuple[list[Tensor], list[Record]]:
        reduced, records = super()._reduce(features, layouts, *more)
        passages = self._passages.get()
        single = len(passages) == 1 and len(passages[0].lot) == len(records)
        self.singles = (records, passages[0]) if single else ([], None)
        return reduced, records

    def _rows(self, layouts: list[Layout], *more: Any) -> list[Row]:
        rows = whole_rows(layouts)
        whole = {row.image for row in rows if row.patches is None or row.patches.shape[1] > 1}
        places = self._places()
        for row in rows:
            if row.image not in whole:
                patch = row.patches[:, 0].to(places.device)
                own = places[patch]  # (n,)
                row.k = len(own[own >= 0].unique())
                row.extras = {"place_in_encoder": own, "patch": patch}
        return rows

    def _places(self) -> Tensor:
        """For each patch of the call the one whose place the token has that it has gone into, both counted
        over all rows of the tower; -1: dropped. (P,)"""
        found, start = [], 0
        for passage in self._passages.get():
            place = _place(passage)  # (B, N)
            first = torch.arange(len(place), device=place.device)[:, None] * passage.n + start
            found.append(torch.where(place < 0, -1, place + first).flatten())
            start += place.numel()
        return torch.cat(found)


def _place(passage: Passage) -> Tensor:
    state = passage.state(len(passage.groups[0].left))
    if state is None:
        return torch.arange(passage.n, device=passage.lot.device).expand(len(passage.lot), -1)
    return torch.where(state.source < 0, -1, state.index.gather(1, state.source.clamp_min(0)))
