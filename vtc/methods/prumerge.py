"""PruMerge: outliers of CLS attention stay and take in what is like them (arXiv 2403.15388)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Merge, Need, register
from ..tokens import Reduction, Tokens, gather


@register
@dataclass
class PruMerge(Merge):
    """Keeps what sticks out of CLS attention, with neighbours added to each, and one token of all others.

    adaptive    an image keeps as many tokens as its attention has outliers (beyond the upper quartile by more
                than 1.5 times the distance of the quartiles), at most as many as `keep` says; False: exactly
                as many as `keep` says, by attention
    neighbours  how many other tokens, those with the most similar keys, are added to each one kept
    normalise   False as the official code: what is added weighs as much as CLS attends to it, and is not
                divided by anything; True as the paper: weighted averages of a token and its neighbours
    order       "paper": by falling attention, the token of all the others last; "raster"

    Attention and keys are those of the last block, with all heads taken as one. Kept tokens are neighbours of
    each other too, and a token may be one of several. The last token is the sum of all that are dropped,
    weighted by attention, in the place of the one that has the most; it counts as one of k, so that it is all
    that stays of an image without outliers. Departures: outliers are those of each image (tile, frame), where
    the official code mixes those of the batch and so gives an image another number in another batch; where
    k = n, all tokens stay as they are. For drawing, a dropped token belongs to the kept one that it is most
    like of those it was added to.
    """

    name = "prumerge"
    paper = "arXiv:2403.15388"
    positions = "repack"
    before_projector = True

    adaptive: bool = True
    neighbours: int = 32
    normalise: bool = False
    order: str = "paper"

    def __post_init__(self):
        if self.neighbours != int(self.neighbours) or self.neighbours < 1:
            raise ValueError(f"neighbours is a whole number >= 1, not {self.neighbours!r}")
        if self.order not in ("paper", "raster"):
            raise ValueError(f"order must be 'paper' or 'raster', not {self.order!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return Need("cls_one_head", (-1,)), Need("all_keys", (-1,))

    def count(self, tokens: Tokens, k: int) -> Tensor | None:
        return (self._own(*_ranked(tokens)) + 1).clamp_max(k) if self.adaptive else None

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        batch, n = tokens.x.shape[:2]
        if k == n:
            return Reduction.select(torch.arange(n, device=tokens.x.device).expand(batch, n), n)
        attention, ranked = _ranked(tokens)
        kept = self._kept(attention, ranked, k - 1)  # (B, k - 1)
        stays = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, kept, True)  # (B, N)
        last = attention.masked_fill(stays, -torch.inf).argmax(dim=1, keepdim=True)
        index = torch.cat([kept, last], dim=1)  # (B, k)
        alike = _similar(tokens.all_keys[:, 0], kept)  # (B, k - 1, N)
        near = torch.cat([_nearest(alike, min(int(self.neighbours), n - 1)), ~stays[:, None]], dim=1)
        slots = torch.arange(k, device=index.device).expand_as(index)
        own = attention.gather(1, kept) if self.normalise else attention.new_ones(kept.shape)
        if self.normalise:  # without any attention, plain averages
            attention, own = (part.clamp_min(torch.finfo(part.dtype).tiny) for part in (attention, own))
        mix = attention[:, None] * near  # (B, k, N)
        mix[:, :-1].scatter_(2, kept[..., None], own[..., None])
        if self.normalise:
            mix = mix / mix.sum(dim=2, keepdim=True)
        # No cosine is -2: what is nobody's neighbour is in the last slot only.
        closest = F.pad(alike, (0, 0, 0, 1), value=-2.0).masked_fill(~near, -torch.inf).argmax(dim=1)
        return Reduction(index, closest.scatter(1, index, slots), mix=mix, ordered=self.order == "paper")

    def _own(self, attention: Tensor, ranked: Tensor) -> Tensor:
        """How many tokens stick out: (B,)."""
        return outliers(attention)

    def _kept(self, attention: Tensor, ranked: Tensor, room: int) -> Tensor:
        """Exactly `room` tokens in the order in which they go on: (B, room)."""
        return ranked[:, :room]


def _ranked(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """What CLS attends to and the positions by falling attention: (B, N) each."""
    attention = tokens.cls_one_head[:, 0].float()
    return attention, attention.sort(dim=1, descending=True, stable=True).indices


def outliers(attention: Tensor) -> Tensor:
    """How many tokens stick out: (B, N) -> (B,)."""
    low, high = attention.quantile(attention.new_tensor([0.25, 0.75]), dim=1)[..., None]  # (B, 1) each
    return (attention > high + 1.5 * (high - low)).sum(dim=1)


def _similar(keys: Tensor, kept: Tensor) -> Tensor:
    """Cosines of the tokens kept with all but themselves: (B, K, N)."""
    keys = F.normalize(keys.float(), dim=-1)
    return (gather(keys, kept) @ keys.transpose(1, 2)).scatter(2, kept[..., None], -torch.inf)


def _nearest(alike: Tensor, count: int) -> Tensor:
    """Marks the `count` largest of each line (B, K, N), the earlier of equal ones."""
    least = alike.topk(count, dim=2).values[..., -1:]
    above, equal = alike > least, alike == least
    left = count - above.sum(dim=2, keepdim=True)
    return above | (equal & (equal.cumsum(dim=2, dtype=torch.int32) <= left))
