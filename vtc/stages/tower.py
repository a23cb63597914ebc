"""The encoder stage inside of a vision-language model: the tower reduces tokens, and prompts follow it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Vision
from ..hosts.host import Layout
from ..hosts.trunk import open_trunk
from ..method import Merge, Method
from ..record import Record
from ..schedule import Budget, Schedule
from ..tokens import Reduction, Tokens
from .encoder import EncoderStage
from .features import FeaturesStage, Row, whole_rows
from .passage import Passage


class TowerStage:
    """Where the model reads the tower it finds all patches, a merged token in the place of each of its
    members. Of equal tokens the prompt then keeps one, and none of those that were dropped. A token that the
    model makes of several patches stays, so that such models save work in the tower only."""

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
        read = _read(vision, len(trunk.blocks))
        shown = frozenset(read) | {len(trunk.blocks) - 1}
        self.encoder = EncoderStage(
            trunk, method, self._fraction(keep), schedule, None, None, shown, max(read) + 1
        )
        self.following = _Following(vision, self.encoder)

    @property
    def method(self) -> Method:
        return self.encoder.method

    @property
    def keep(self) -> Budget:
        return self.encoder.keep

    @keep.setter
    def keep(self, keep: Budget) -> None:
        self.encoder.keep = self.following.keep = keep

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
        records, rows = self.following.last, self.encoder.last
        if len(records) == len(rows):
            for record, row in zip(records, rows, strict=True):
                record.blocks = row.blocks
        return records

    def install(self) -> None:
        self.encoder.install()
        self.following.install()

    def remove(self) -> None:
        self.following.remove()
        self.encoder.remove()


def _read(vision: Vision, depth: int) -> list[int]:
    """The blocks whose output the model reads."""
    if vision.host.deep or vision.host.features != "pooler_output":
        return list(range(depth))
    layers = getattr(vision.base.config, "vision_feature_layer", -1)
    layers = [layers] if isinstance(layers, int) else list(layers or [-1])
    # Counted over hidden states, of which the first is what enters block 0.
    return [(layer if layer >= 0 else depth + 1 + layer) - 1 for layer in layers]


@dataclass
class _Equal(Merge):
    """Keeps the first of all tokens that are one token of the encoder."""

    name = "equal"

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        rows = [_firsts(group.long()) for group in tokens.group_in_encoder[:, 0]]
        index, source = (torch.stack(parts) for parts in zip(*rows))
        return Reduction(index, source, pruned=True)


def _firsts(group: Tensor) -> tuple[Tensor, Tensor]:
    """group (n,), -1 for none -> the first place of each group, ascending, and each token's slot (n,)."""
    names, member = group.unique(return_inverse=True)
    places = torch.arange(len(group), device=group.device)
    first = places.new_full((len(names),), len(group)).scatter_reduce(0, member, places, "amin")
    first = first[names >= 0]
    index = first.sort().values
    slot = torch.searchsorted(index, first)
    of_name = torch.full((len(names),), -1, device=group.device).masked_scatter(names >= 0, slot)
    return index, of_name[member]


class _Following(FeaturesStage):
    """Shortens prompts to the tokens that have left the tower."""

    def __init__(self, vision: Vision, encoder: EncoderStage):
        self.encoder = encoder
        super().__init__(vision, _Equal(), encoder.keep, "keep", "proportional")

    def check(self, keep: Budget) -> Budget:
        return keep

    def features(self, name: str, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self.encoder.collecting() as self._passages:
            return super().features(name, base, *args, **kwargs)

    def _rows(self, layouts: list[Layout]) -> list[Row]:
        rows = whole_rows(layouts)
        patches = [row.patches for row in rows]
        if any(part is None or part.shape[1] != 1 for part in patches):
            return rows
        groups = self._groups()
        for row in rows:
            group = groups[row.patches[:, 0].to(groups.device)]
            row.k = len(group[group >= 0].unique())
        return rows

    def _extras(self, recording: Any) -> dict[str, Tensor]:
        return {"group_in_encoder": self._groups()[:, None].double()}

    def _groups(self) -> Tensor:
        """The token that each patch of the call has gone into, counted over all rows; -1: dropped. (P,)"""
        found, start = [], 0
        for passage in self._passages:
            source = _source(passage)  # (B, N)
            first = torch.arange(len(source), device=source.device)[:, None] * passage.n + start
            found.append(torch.where(source < 0, -1, source + first).flatten())
            start += source.numel()
        return torch.cat(found)


def _source(passage: Passage) -> Tensor:
    state = passage.state(len(passage.groups[0].left))
    every = torch.arange(passage.n, device=passage.lot.device)
    return every.expand(len(passage.lot), -1) if state is None else state.source
