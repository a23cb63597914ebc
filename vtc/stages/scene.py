"""A prompt in front of the decoder layer where tokens are cut, and as methods see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..hosts import Vision
from ..method import Method, Need
from ..taps import refusal
from ..tokens import Tokens
from .places import Place, image_columns
from .rows import Row

KINDS = ("keys", "all_keys", "text", "text_keys")


@dataclass
class Scene:
    """What can be known of a prompt in front of the layer where tokens are cut.

    hidden  (B, L, D) what leaves the layer before
    keys    (B, L, heads, d) of that layer, rotated; None where nobody asked for them
    real    (B, L) False for padding
    places  where its images are
    """

    hidden: Tensor
    keys: Tensor | None
    real: Tensor
    places: list[Place]


class View:
    """A prompt in front of the layer as methods see it."""

    def __init__(self, decoder: nn.Module, layer: int, needs: set[str], scene: Scene):
        with torch.no_grad():
            self.x = decoder.norm(scene.hidden.detach())  # (B, L, D)
        self.keys, self.needs = scene.keys, needs
        self.layer, self.depth = layer, len(decoder.layers)
        self.text = scene.real & ~image_columns(scene.places, scene.real)  # (B, L)

    def tokens(self, group: list[tuple[Row, Place]]) -> Tokens:
        rows, places = zip(*group)
        device = self.x.device
        where = [place.columns[row.tile.slots] for row, place in group]  # (n,) each
        return Tokens(
            torch.stack([self.x[place.row, own] for place, own in zip(places, where)]),  # (R, n, D)
            grid=rows[0].tile.grid,
            group=torch.tensor([row.image for row in rows], device=device),
            lot=torch.stack([row.lot for row in rows]).to(device),
            thumbnail=torch.tensor([row.tile.thumbnail for row in rows], device=device),
            layer=self.layer,
            depth=self.depth,
            extras={**self._keys(places, where), **self._text(places)},
        )

    def _keys(self, places: tuple[Place, ...], where: list[Tensor]) -> dict[str, Tensor]:
        if not {"keys", "all_keys"} & self.needs:
            return {}
        keys = torch.stack([self.keys[p.row, own] for p, own in zip(places, where)])[:, None]
        found = {"keys": keys.mean(dim=3), "all_keys": keys.flatten(3)}  # keys (R, 1, n, heads, d)
        return {kind: found[kind] for kind in found.keys() & self.needs}

    def _text(self, places: tuple[Place, ...]) -> dict[str, Tensor]:
        found = {}
        where = [self.text[place.row].nonzero()[:, 0] for place in places]  # (T,) each
        if "text" in self.needs:
            after = [own > place.columns[-1] for own, place in zip(where, places)]
            found["text"] = _padded([self.x[place.row, own] for place, own in zip(places, where)])
            found["text_mask"] = _padded([torch.ones_like(own) for own in after])
            found["text_after"] = _padded([own if bool(own.any()) else ~own for own in after])
        if "text_keys" in self.needs:
            keys = [self.keys[place.row, own].flatten(1) for place, own in zip(places, where)]
            found["text_keys"] = _padded(keys)[:, None]  # (R, 1, T, heads * d)
        return found


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)  # with zeros


def needed(vision: Vision, method: Method, layer: int) -> set[str]:
    """The kinds that the method needs here. Raises ValueError for one that does not exist."""
    own = getattr(method, "decoder_needs", None)
    needs: tuple[Need, ...] = method.needs if own is None else own
    unknown = sorted({need.kind for need in needs if need.kind not in KINDS or need.view != "own"})
    if unknown or method.lowers_resolution:
        what = ", ".join(unknown) or "a picture of lower resolution"
        raise ValueError(
            f"method '{method.name}' needs {what}, which does not exist inside of a decoder: use "
            "stage='features', or a method that needs nothing but features"
        )
    kinds = {need.kind for need in needs}
    if kinds - {"text"} and (reason := refusal(vision.decoder.layers[layer - 1].self_attn)):
        raise ValueError(f"method '{method.name}' needs keys of decoder layer {layer - 1}: {reason}")
    return kinds
