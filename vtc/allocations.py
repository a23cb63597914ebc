"""Budgets of tiles by what the encoder attends to, as papers have them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .allocate import Allocation, Group, Part, Proportional, allocation, alone, weighted
from .crops import Crops
from .method import Layer, Need
from .record import Box


@allocation
@dataclass(frozen=True)
class Hired(Allocation):
    """The thumbnail has a fixed share, each crop its part of what the thumbnail attends to early.

    As arXiv 2408.10945 shares it; the defaults are the numerics of its official code.

    alpha   the thumbnail's share of the budget, as far as it has tokens
    region  "band": the j-th crop has the j-th of as many equal runs of the thumbnail's tokens, bands of rows,
            as the code; "spatial": what the thumbnail has of the picture that the crop shows, as the paper
    count   "members": a region counts its tokens among the 1 - alpha most attended of the thumbnail; "sum":
            its attention is added up, as the paper
    layer   the block of the thumbnail's CLS attention

    Departures: the code rounds every budget down and lets what exceeds a crop's size lapse. Here the crops'
    odd tokens go to the largest remainders and what exceeds one crop to the others, so that exactly the
    budget is spent. Budgets count the tokens that un-padding leaves. Tokens on the edge of the most attended
    that are attended to alike are members in part. Images without a thumbnail, and frames of a video, have
    budgets by their size.
    """

    name = "hired"

    alpha: float = 0.5
    region: str = "band"
    count: str = "members"
    layer: Layer = 0

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must be a share between 0 and 1")
        if self.region not in ("band", "spatial"):
            raise ValueError(f"region must be 'band' or 'spatial', not {self.region!r}")
        if self.count not in ("members", "sum"):
            raise ValueError(f"count must be 'members' or 'sum', not {self.count!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("cls_attention", (self.layer,)),)

    def split(self, parts: Sequence[Part], k: int) -> list[Group]:
        whole = [number for number, part in enumerate(parts) if part.tile.thumbnail]
        if len(whole) != 1 or len(parts) == 1:
            return Proportional().split(parts, k)
        crops = [number for number in range(len(parts)) if number not in whole]
        sizes = [parts[number].n for number in crops]
        own = max(min(int(k * self.alpha), parts[whole[0]].n), k - sum(sizes))
        claims = self._claims(parts[whole[0]], [parts[number].tile.box for number in crops])
        budgets = weighted(k - own, claims if sum(claims) > 0 else sizes, sizes)
        return [(whole, own), *(([number], budget) for number, budget in zip(crops, budgets, strict=True))]

    def _claims(self, thumbnail: Part, boxes: list[Box]) -> list[float]:
        """How much of what counts in the thumbnail is in the region of each crop."""
        counts = thumbnail.cls_attention[0].cpu().double()  # (n,)
        if self.count == "members":
            counts = _members(counts, int(thumbnail.n * (1 - self.alpha)))
        if self.region == "spatial":
            return _inside(counts, thumbnail, boxes)
        ends = [j * thumbnail.n // len(boxes) for j in range(len(boxes) + 1)]
        return [float(counts[start:end].sum()) for start, end in itertools.pairwise(ends)]


@allocation
@dataclass(frozen=True)
class GlobalCom2(Allocation):
    """Each tile by its size, but crops in which the thumbnail sees more have more (arXiv 2501.05179).

    temperature  of the softmax over what the thumbnail's CLS says of each crop's region. The crop's share is
                 that of its size times 1 + p - mean(p)
    layer        the block that is read
    signal       "cls_logits", before the softmax; or, for encoders without CLS, "mean_attention", what a
                 token receives from all. That sums to one: only temperatures below 1 make a difference

    The regions are those of the code: equal cells of the thumbnail's grid, the last with what is left over,
    padding or not. Departures: odd tokens go to the largest remainders, and what exceeds a crop's size to the
    others, where the code rounds down and lets it lapse, so that exactly the budget is spent. Images whose
    crops make no grid around a thumbnail, and frames of a video, have budgets by their size.
    """

    name = "globalcom2"

    temperature: float = 10.0
    layer: Layer = -1
    signal: str = "cls_logits"

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if self.signal not in ("cls_logits", "mean_attention"):
            raise ValueError(f"signal must be 'cls_logits' or 'mean_attention', not {self.signal!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need(self.signal, (self.layer,)),)

    def split(self, parts: Sequence[Part], k: int) -> list[Group]:
        crops = Crops.of([part.tile for part in parts])
        if crops is None:
            return Proportional().split(parts, k)
        thumbnail = parts[crops.thumbnail]
        seen = getattr(thumbnail, self.signal)[0].cpu().double().view(thumbnail.tile.grid)  # (h, w)
        tall, wide = (_cells(n, count) for n, count in zip(seen.shape, (crops.rows, crops.cols), strict=True))
        sums = torch.stack([seen[tall[row], wide[col]].sum() for row, col in crops.place.values()])
        p = (sums / self.temperature).softmax(dim=0)
        more = dict(zip(crops.place, (1 + p - p.mean()).tolist(), strict=True))
        sizes = [part.n for part in parts]
        return alone(weighted(k, [n * more.get(number, 1.0) for number, n in enumerate(sizes)], sizes))


@allocation
@dataclass(frozen=True)
class Attention(Allocation):
    """Each tile or frame as many tokens as it has among the most attended of the whole picture or video.

    signal  "mean_attention", what a token receives from all of its tile, or "cls_attention", from its CLS
    layer   the block that is read
    """

    name = "attention"

    signal: str = "mean_attention"
    layer: Layer = -2

    def __post_init__(self):
        if self.signal not in ("mean_attention", "cls_attention"):
            raise ValueError(f"signal must be 'mean_attention' or 'cls_attention', not {self.signal!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need(self.signal, (self.layer,)),)

    def split(self, parts: Sequence[Part], k: int) -> list[Group]:
        attention = torch.cat([getattr(part, self.signal)[0] for part in parts]).float().cpu()  # (N,)
        owner = torch.cat([torch.full((part.n,), number) for number, part in enumerate(parts)])
        first = attention.sort(descending=True, stable=True).indices[:k]
        return alone(torch.bincount(owner[first], minlength=len(parts)).tolist())


def _members(scores: Tensor, k: int) -> Tensor:
    """1 for the k highest, 0 for the others; those that tie for the last places share them: (n,) -> (n,)."""
    if k == 0:
        return torch.zeros_like(scores)
    last = scores.sort(descending=True).values[k - 1]
    above, ties = scores > last, scores == last
    return above.double() + ties.double() * (k - above.sum()) / ties.sum()


def _inside(counts: Tensor, thumbnail: Part, boxes: list[Box]) -> list[float]:
    """The sum over the thumbnail's tokens, each by its area in the box: (n,) -> one for each box."""
    picture, (rows, cols) = thumbnail.tile.box, thumbnail.tile.grid
    grid = counts.view(rows, cols)
    found = []
    for box in boxes:
        across, down = (
            _overlap(picture[axis], picture[axis + 2], n, box[axis], box[axis + 2])
            for axis, n in ((0, cols), (1, rows))
        )
        found.append(float(down @ grid @ across))
    return found


def _overlap(start: float, end: float, n: int, low: float, high: float) -> Tensor:
    """How much of each of n equal cells from start to end lies between low and high: (n,)."""
    return torch.linspace(start, end, n + 1, dtype=torch.float64).clamp(low, high).diff()


def _cells(n: int, count: int) -> list[slice]:
    """`count` equal cells of n rows or columns, the last with what is left over."""
    size = n // count
    return [slice(i * size, n if i == count - 1 else (i + 1) * size) for i in range(count)]
