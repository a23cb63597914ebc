"""k-means: tokens become the means of k clusters (Lloyd, IEEE Trans. Inf. Theory 28, 1982)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..means import SAME, Features, Pairs, distances
from ..method import Merge, register
from ..tokens import Reduction, Tokens


@register
@dataclass
class KMeans(Merge):
    """Merges tokens into the means of k clusters, found by Lloyd's algorithm on their features.

    iterations  how often tokens join the nearest mean and means are taken; fewer where nothing changes

    A baseline that no paper on vision tokens stands for: the clustering of the token reduction benchmark
    (arXiv:2308.04657) is k-medoids, with weights. Distances are squared Euclidean, means are weighted by
    size. It starts from the token nearest to the mean of all, then always the one farthest from those chosen;
    nothing is drawn at random. A cluster that loses all of its tokens gets the one farthest from its own
    mean, so that there are always k. The place of a merged token is that of the member nearest to the mean.
    """

    name = "kmeans"
    paper = "Lloyd 1982, doi:10.1109/TIT.1982.1056489"

    iterations: int = 10

    def __post_init__(self):
        if self.iterations != int(self.iterations) or self.iterations < 1:
            raise ValueError(f"iterations is a whole number >= 1, not {self.iterations!r}")

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        x = distances(tokens.x)
        means, before = x.at(_apart(x, k)), None
        for _ in range(int(self.iterations)):
            # (B, N) the nearest mean of each token, the first of equally near ones
            slot = _filled(x, means, torch.cat([some.argmin(dim=1) for some in x.squares(means)], dim=1), k)
            if before is not None and torch.equal(slot, before):
                break
            means, before = x.means(slot, tokens.size, k), slot
        return Reduction(_middle(x, x.away(means, slot), slot, k), slot).ascending()


def _apart(x: Features | Pairs, k: int) -> Tensor:
    """The token nearest to 0, then always the one farthest from those chosen: (B, k)."""
    row = torch.arange(len(x.lengths), device=x.lengths.device)
    pick = x.lengths.argmin(dim=1)
    picks, nearest = [pick], torch.full_like(x.lengths, torch.inf)  # (B, N) to the nearest one chosen
    for _ in range(k - 1):
        square = torch.cat(list(x.squares(x.at(pick[:, None]))), dim=2)[:, 0]
        nearest = torch.minimum(nearest, square)
        nearest[row, pick] = -1.0  # and stays so
        pick = nearest.argmax(dim=1)
        picks.append(pick)
    return torch.stack(picks, dim=1)


def _middle(x: Features | Pairs, away: Tensor, slot: Tensor, k: int) -> Tensor:
    """The first of the members nearest to the mean: (B, K); of an empty cluster it is n. Of two tokens both
    are, but for rounding, which must not decide."""
    n = slot.shape[1]
    least = away.new_full((len(slot), k), torch.inf).scatter_reduce(1, slot, away, "amin")
    position = torch.arange(n, device=slot.device).expand_as(slot)
    least = 1.0001 * least.gather(1, slot) + SAME * x.lengths  # (B, N)
    position = torch.where(away <= least, position, n)
    return torch.full_like(slot[:, :k], n).scatter_reduce(1, slot, position, "amin")


def _filled(x: Features | Pairs, means: Tensor | tuple[Tensor, Tensor], slot: Tensor, k: int) -> Tensor:
    """The same clusters, where each empty one, the first before, has taken the token farthest from its mean.
    The member nearest to a mean stays, so that none becomes empty by it."""
    n = slot.shape[1]
    empty = x.lengths.new_ones(len(slot), k).scatter(1, slot, 0.0)  # (B, K)
    if not bool(empty.any()):
        return slot
    away = x.away(means, slot)
    middle = _middle(x, away, slot, k)  # (B, K)
    away = F.pad(away, (0, 1)).scatter(1, middle, -1.0)[:, :n]
    rank = away.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (B, N)
    taker = empty.argsort(dim=1, descending=True, stable=True).gather(1, rank.clamp_max(k - 1))
    return torch.where(rank < empty.sum(dim=1, keepdim=True), taker, slot)
