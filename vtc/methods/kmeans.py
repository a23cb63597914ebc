"""k-means: tokens become the means of k clusters (Lloyd, IEEE Trans. Inf. Theory 28, 1982)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Merge, register
from ..tokens import Reduction, Tokens, gather

_PAIRS = 1 << 22  # distances held at once of each row: 16 MiB
_SAME = 1e-6  # of the squares of two tokens: a distance that is less is rounding


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
        x = tokens.x.float()
        x = x - x.mean(dim=1, keepdim=True)  # distances are the same, rounding is less
        means, before = gather(x, _apart(x, k)), None
        for _ in range(int(self.iterations)):
            slot = _filled(x, means, _join(x, means))  # (B, N)
            if before is not None and torch.equal(slot, before):
                break
            means, before = _means(x, slot, tokens.size, k), slot
        return Reduction(_middle(_away(x, means, slot), slot, k), slot).ascending()


def _lengths(x: Tensor) -> Tensor:
    """Squares of lengths: (B, N, D) -> (B, N)."""
    return torch.linalg.vector_norm(x, dim=2).square()


def _squares(x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    """Square distances of x (B, N, D) to y (B, K, D): (B, K, N). What is below rounding is 0, so that equal
    tokens have none between them, nor from their mean."""
    sums = _lengths(y)[..., None] + lengths[:, None]
    square = torch.baddbmm(sums, y, x.transpose(1, 2), alpha=-2)
    return torch.where(square > _SAME * sums, square, 0.0)


def _apart(x: Tensor, k: int) -> Tensor:
    """The token nearest to 0, then always the one farthest from those chosen: (B, k)."""
    row = torch.arange(len(x), device=x.device)
    lengths = _lengths(x)
    pick = lengths.argmin(dim=1)
    picks, nearest = [pick], torch.full_like(lengths, torch.inf)  # (B, N) to the nearest one chosen
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, _squares(x, lengths, x[row, pick][:, None])[:, 0])
        nearest[row, pick] = -1.0  # and stays so
        pick = nearest.argmax(dim=1)
        picks.append(pick)
    return torch.stack(picks, dim=1)


def _chunks(n: int, k: int) -> Iterator[slice]:
    """A few tokens at a time; never of the batch, as products of another shape round differently."""
    few = max(1, _PAIRS // k)
    return (slice(start, start + few) for start in range(0, n, few))


def _join(x: Tensor, means: Tensor) -> Tensor:
    """The nearest mean of each token, the first of equally near ones: (B, N)."""
    lengths, parts = _lengths(x), _chunks(x.shape[1], means.shape[1])
    return torch.cat([_squares(x[:, part], lengths[:, part], means).argmin(dim=1) for part in parts], dim=1)


def _means(x: Tensor, slot: Tensor, size: Tensor, k: int) -> Tensor:
    """Means of members weighted by size: (B, K, D). As products, which add in the same order every time."""
    total, sizes = x.new_zeros(len(x), k, x.shape[2]), x.new_zeros(len(x), k, 1)
    for part in _chunks(x.shape[1], k):
        where = slot[:, None, part]  # (B, 1, n)
        share = x.new_zeros(len(x), k, where.shape[2]).scatter_(1, where, size.float()[:, None, part])
        total = torch.baddbmm(total, share, x[:, part])
        sizes += share.sum(dim=2, keepdim=True)
    return total / sizes


def _away(x: Tensor, means: Tensor, slot: Tensor) -> Tensor:
    """Square distance of each token from the mean of its cluster: (B, N)."""
    own = gather(means, slot)
    square = _lengths(x - own)
    return torch.where(square > _SAME * (_lengths(x) + _lengths(own)), square, 0.0)


def _middle(away: Tensor, slot: Tensor, k: int) -> Tensor:
    """The first of the members nearest to the mean: (B, K); of an empty cluster it is n. Of two tokens both
    are, but for rounding, which must not decide."""
    n = slot.shape[1]
    least = away.new_full((len(slot), k), torch.inf).scatter_reduce(1, slot, away, "amin")
    position = torch.arange(n, device=slot.device).expand_as(slot)
    position = torch.where(away <= 1.0001 * least.gather(1, slot), position, n)
    return torch.full_like(slot[:, :k], n).scatter_reduce(1, slot, position, "amin")


def _filled(x: Tensor, means: Tensor, slot: Tensor) -> Tensor:
    """The same clusters, where each empty one, the first before, has taken the token farthest from its mean.
    The member nearest to a mean stays, so that none becomes empty by it."""
    n, k = slot.shape[1], means.shape[1]
    empty = torch.ones_like(means[..., 0]).scatter(1, slot, 0.0)  # (B, K)
    if not bool(empty.any()):
        return slot
    away = _away(x, means, slot)
    middle = _middle(away, slot, k)  # (B, K)
    away = F.pad(away, (0, 1)).scatter(1, middle, -1.0)[:, :n]
    rank = away.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (B, N)
    taker = empty.argsort(dim=1, descending=True, stable=True).gather(1, rank.clamp_max(k - 1))
    return torch.where(rank < empty.sum(dim=1, keepdim=True), taker, slot)
