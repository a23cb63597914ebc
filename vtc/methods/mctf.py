"""MCTF: fusion by similarity, information and size at once (arXiv 2403.10030)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..method import Merge, Need, register
from ..tokens import Reduction, Tokens
from .tome import in_rounds, parity

_LEAST = 1e-12  # attention and similarity below it count as much


@register
@dataclass
class MCTF(Merge):
    """Merges similar tokens that receive little attention and are small, from even to odd and back.

    A pair's score is the product of ((cosine + 1) / 2) ** (1 / similarity), (1 / both attentions) ** (1 /
    information) and (1 / both sizes) ** (1 / sizes). Half of the tokens to remove go from even positions to
    odd ones, as in ToMe but judged by features; the others go from odd ones into the even ones left, by the
    same scores, with what they received just now. Averages are weighted by attention received times size.
    Departures: tokens are fused behind the block's attention, whose map gives the attention received; the
    paper computes the next block's map one step ahead, fuses its rows and columns too, and leaves the first
    block alone. k may be less than ten. No attention at all is taken as next to none.

    similarity, information, sizes  temperatures of the three criteria; 0 leaves one out
    forth                           the share of them that goes from even to odd positions; 1.0: as in ToMe
    proportional                    whether later blocks attend to a merged token as to its members
    """

    name = "mctf"
    paper = "arXiv:2403.10030"
    stages = ("encoder",)

    similarity: float = 1.0
    information: float = 20.0
    sizes: float = 40.0
    forth: float = 0.5
    proportional: bool = True

    def __post_init__(self):
        for name in ("similarity", "information", "sizes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is a temperature, 0 or more, not {getattr(self, name)!r}")
        if not 0 <= self.forth <= 1:
            raise ValueError(f"forth is a share between 0 and 1, not {self.forth!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("mean_attention", (-2,)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        received = tokens.mean_attention[:, 0].float().clamp_min(_LEAST)  # (B, N)
        weight = received * tokens.size

        def step(now: Reduction, r: int) -> Reduction:
            x = tokens.x.float()
            if now.k < tokens.n:
                x = replace(now, weight=weight).apply(x)
            even, odd = parity(now.k, tokens.prefix, x.device)
            first = tokens.prefix % 2
            cosine = _cosines(x[:, first::2], x[:, 1 - first :: 2])  # (B, even, odd)
            score = _power((cosine + 1) / 2, self.similarity)  # its logarithm, without what all pairs share
            for quantity, temperature in ((received, self.information), (tokens.size, self.sizes)):
                alone = _power(now.sizes(quantity), temperature)
                score = score - alone[:, even, None] - alone[:, None, odd]
            return _both_ways(score, even, odd, r, int(r * self.forth), tokens.prefix)

        return replace(in_rounds(tokens, k, step), weight=weight)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Of all pairs of x (B, N, D) and y (B, M, D), 0 for vectors of length zero: (B, N, M)."""
    inverse = [1 / torch.linalg.vector_norm(v, dim=2).clamp_min(1e-12) for v in (x, y)]
    return (x @ y.transpose(1, 2)) * inverse[0][:, :, None] * inverse[1][:, None]


def _power(x: Tensor, temperature: float) -> Tensor:
    """The logarithm of x ** (1 / temperature); a temperature of 0 leaves the criterion out."""
    return x.clamp_min(_LEAST).log() / temperature if temperature else torch.zeros_like(x)


def _both_ways(score: Tensor, even: Tensor, odd: Tensor, r: int, there: int, prefix: int) -> Reduction:
    """`there` even tokens go into odd ones, then r - there odd ones into the even ones left."""
    batch, n = len(score), len(even) + len(odd)
    merged, partner, rest = _best(score, there)
    if prefix:
        rest = rest.sort(dim=1).values
    goes = torch.arange(n, device=score.device).repeat(batch, 1)  # (B, N) the token each goes into
    goes = goes.scatter(1, even[merged], odd[partner])
    stay = odd.expand(batch, -1)
    if r > there:
        left = score.gather(1, rest[:, :, None].expand(-1, -1, len(odd)))
        merged, partner, others = _best(left.transpose(1, 2), r - there)
        goes = goes.scatter(1, odd[merged], even[rest.gather(1, partner)])
        goes, stay = goes.gather(1, goes), odd[others]  # what an odd token received goes with it
    index = torch.cat([even[rest], stay], dim=1)  # (B, N - r)
    slot = torch.arange(n - r, device=score.device).expand(batch, -1)
    return Reduction(index, torch.empty_like(goes).scatter(1, index, slot).gather(1, goes))


def _best(score: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows of score (B, N, M): the r with the highest entry, their columns, the others in turn."""
    best, column = score.max(dim=2)
    ranked = best.sort(dim=1, descending=True, stable=True).indices
    return ranked[:, :r], column.gather(1, ranked[:, :r]), ranked[:, r:]
