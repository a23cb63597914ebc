"""HoloV: a budget for every part of the picture, spent where CLS attends to (arXiv 2510.02912)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import regions
from ..method import Layer, Need, Select, register
from ..tokens import Reduction, Tokens, gather

_PAIRS = 1 << 20  # pairs of tokens of a part looked at at once: 4 MiB


@register
@dataclass
class HoloV(Select):
    """Keeps what CLS attends to in each part of the picture, so many as the part is attended to and varied.

    A token's score is its attention and alpha times the variance of its cosine similarities in its part; a
    part's share of the budget is by the mean score of its tokens. Inside of a part attention decides.

    alpha   how much variance counts. As in the official code it is scaled to each part's own attention, so
            that it multiplies all parts by nearly the same number and shares follow attention
    parts   how many parts there are
    crops   "runs" of the sequence of tokens as in the official code, 1.5 rows each of 24 x 24 in 16; or
            "squares" as the paper says: rectangles of the grid, tile by tile
    order   "paper": a prompt whose positions are counted anew holds the tokens part by part, of each the
            most attended first, but a part that stays whole in its own order; or "raster"
    layer   whose attention counts: the one that LLaVA reads
    signal  "cls_attention", or "mean_attention" for encoders without CLS

    All tiles of an image are one sequence, where `crops` allows it. Departures: what a part cannot hold is
    shared by the others in the same way, where the official code fills up with zeros; a part of one token is
    scored like others.
    """

    name = "holov"
    paper = "arXiv:2510.02912"
    positions = "repack"

    alpha: float = 0.09
    parts: int = 16
    crops: str = "runs"
    order: str = "paper"
    layer: Layer = -2
    signal: str = "cls_attention"

    def __post_init__(self):
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha} must be a number of at least 0")
        if self.parts != int(self.parts) or self.parts < 1:
            raise ValueError(f"parts must be a whole number of at least 1, not {self.parts!r}")
        if self.crops not in ("runs", "squares"):
            raise ValueError(f"crops must be 'runs' or 'squares', not {self.crops!r}")
        if self.order not in ("paper", "raster"):
            raise ValueError(f"order must be 'paper' or 'raster', not {self.order!r}")
        if self.signal not in ("cls_attention", "mean_attention"):
            raise ValueError(f"signal must be 'cls_attention' or 'mean_attention', not {self.signal!r}")

    @property
    def needs_grid(self) -> bool:
        return self.crops == "squares"

    @property
    def allocate(self) -> str:
        return "proportional" if self.needs_grid else "joint"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need(self.signal, (self.layer,)),)

    def reduce(self, tokens: Tokens, k: int) -> Reduction:
        return Reduction.select(self.select(tokens, k), tokens.n, ordered=self.order == "paper")

    def select(self, tokens: Tokens, k: int) -> Tensor:
        attention = getattr(tokens, self.signal)[:, 0].float()  # (B, N)
        place, size = self._parts(tokens.grid, tokens.n, attention.device)  # (P, S) and (P,)
        inside = torch.arange(place.shape[1], device=place.device) < size[:, None]  # (P, S)
        attention = attention[:, place].masked_fill(~inside, -torch.inf)  # (B, P, S)
        mean = 1000 * attention.masked_fill(~inside, 0).sum(dim=2) / size  # (B, P)
        varied = _variance(tokens.x, place, inside)
        budget = _share(mean * (1 + self.alpha * varied / (varied + 1e-6)), size, k)[..., None]  # (B, P, 1)
        order = attention.sort(dim=2, descending=True, stable=True).indices
        rank = torch.arange(place.shape[1], device=place.device).expand_as(order)
        order = torch.where(budget < size[:, None], order, rank)
        kept = (rank < budget).flatten(1).long().sort(dim=1, descending=True, stable=True).indices[:, :k]
        return place.expand_as(order).gather(2, order).flatten(1).gather(1, kept)

    def _parts(self, grid: tuple[int, int], n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The positions of each part's tokens, filled up to the longest part, and how many they are."""
        parts = min(int(self.parts), n)
        if self.crops == "squares":
            part = regions(grid, parts, device)
        else:
            sizes = n // parts + (torch.arange(parts, device=device) < n % parts).long()
            part = torch.arange(parts, device=device).repeat_interleave(sizes)
        size = part.bincount()
        first, within = size.cumsum(0) - size, torch.arange(int(size.max()), device=device)
        return part.argsort(stable=True)[(first[:, None] + within).clamp_max(n - 1)], size


def _variance(x: Tensor, place: Tensor, inside: Tensor) -> Tensor:
    """The mean over a part's tokens of how their similarities to it vary, each one's own counted as 0: of
    parts at place (P, S) in x (B, N, D): (B, P)."""
    size = inside.sum(dim=1)  # (P,)
    others = (size - 1).clamp_min(1)[:, None]
    x = gather(x, place.expand(len(x), *place.shape).flatten(1)).unflatten(1, place.shape).float()
    scale = inside / torch.linalg.vector_norm(x, dim=3).clamp_min(1e-12)  # (B, P, S)
    total, few = 0, max(1, _PAIRS // place.numel())
    for first in range(0, place.shape[1], few):
        part = slice(first, first + few)
        cosine = x[:, :, part] @ x.transpose(2, 3) * scale[:, :, part, None] * scale[:, :, None]
        cosine.diagonal(first, dim1=2, dim2=3).fill_(0)
        from_mean = cosine - (cosine.sum(dim=3) / others)[..., None]  # (B, P, few, S)
        squares = from_mean.square() * inside[:, None] * inside[:, part, None]
        total = total + squares.sum(dim=(2, 3))
    return total / others[:, 0] / size


def _share(score: Tensor, size: Tensor, k: int) -> Tensor:
    """Exactly k tokens over parts, by score and none above its size: (B, P) -> (B, P)."""
    given = torch.zeros_like(score, dtype=torch.long)
    rest = given.new_full((len(score), 1), k)
    while bool(rest.any()):  # each time around a part is full, or it ends
        free = given < size
        weight = torch.where(free, score, 0)
        weight = torch.where(weight.sum(dim=1, keepdim=True) > 0, weight, free.float())
        weight = weight / weight.sum(dim=1, keepdim=True)
        more = (weight * rest).floor().long()
        heaviest = torch.where(free, weight, -1).sort(dim=1, descending=True, stable=True).indices
        odd = torch.arange(score.shape[1], device=score.device) < rest - more.sum(dim=1, keepdim=True)
        more = (more + torch.zeros_like(more).scatter(1, heaviest, odd.long())) * free
        given = torch.minimum(given + more, size.expand_as(given))
        rest = k - given.sum(dim=1, keepdim=True)
    return given
