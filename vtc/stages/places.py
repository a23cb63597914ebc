"""Which tokens of a prompt are which image's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hosts.host import Layout


@dataclass
class Place:
    """One image in a batch of prompts.

    row      the prompt that it is in; the next `copies` - 1 rows are the same prompt (beams)
    columns  (length,) where its tokens are in that prompt, in the image's own order
    """

    row: int
    copies: int
    columns: Tensor
    layout: Layout


def find_places(ids: Tensor, layouts: dict[str, list[Layout]], config: Any) -> list[Place]:
    """Images, then videos, in the order in which they were encoded.

    ids      (B, L) of the prompts
    layouts  by "image" and "video"; their features fill the placeholders of a kind row by row. Where
             generate() has copied prompts, each copy of a prompt has the same images
    """
    places = []
    for kind, own in layouts.items():
        unit, mask = sum(layout.length for layout in own), _placeholders(ids, kind, config)  # (B, L)
        copies, rest = divmod(int(mask.sum()), unit)
        rows, columns = mask[:: max(copies, 1)].nonzero().unbind(dim=1)  # (unit,) each
        if not copies or rest or len(rows) != unit:
            raise ValueError(
                f"the prompt has {int(mask.sum())} tokens of kind {kind!r} where {unit} features were made: "
                "tokens are cut inside of a decoder from prompts in one piece"
            )
        sizes = [layout.length for layout in own]
        for layout, row, where in zip(own, rows.split(sizes), columns.split(sizes)):
            places.append(Place(int(row[0]) * copies, copies, where, layout))
    return places


def _placeholders(ids: Tensor, kind: str, config: Any) -> Tensor:
    """Which tokens stand for features of images or videos, by the names that generate() relies on, too.
    Frames of some families are images to their prompts."""
    found = ids == getattr(config, f"{kind}_token_id")
    if kind == "video" and not bool(found.any()):
        found = ids == config.image_token_id
    return found


def image_columns(places: list[Place], like: Tensor) -> Tensor:
    """Which tokens are of an image, as a mask of the shape of `like` (B, L)."""
    found = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    for place in places:
        found[place.row : place.row + place.copies, place.columns] = True
    return found
