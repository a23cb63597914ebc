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


@register
@dataclass
class KMeans(Merge):
    """Merges tokens into the means of k clusters, found by Lloyd's algorithm on their features.

    iterations  how often tokens join the nearest mean and means are taken; fewer where nothing changes

    A baseline that no paper on vision tokens stands for: the clustering of the token reduction benchmark
    (arXiv:2308.04657) is k-medoids, with weights. Distances are squared Euclidean, means are weighted by
    size. It starts from k evenly spaced tokens in raster order; nothing is drawn at random. A cluster that
    loses all of its tokens gets the one farthest from its own mean, so that there are always k. The place of
    a merged token is that of the member nearest to the mean.
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
        spaced = (2 * torch.arange(k, device=x.device) + 1) * tokens.n // (2 * k)
        means, before = x[:, spaced], None
        for _ in range(int(self.iterations)):
            slot = _filled(x, means, _join(x, means))  # (B, N)
            if before is not None and torch.equal(slot, before):
                break
            means, before = _means(x, slot, tokens.size, k), slot
        return Reduction(_middle(_away(x, means, slot), slot, k), slot).ascending()


def _chunks(n: int, k: int) -> Iterator[slice]:
    """A few tokens at a time; never of the batch, as products of another shape round differently."""
    few = max(1, _PAIRS // k)
    return (slice(start, start + few) for start in range(0, n, few))


def _join(x: Tensor, means: Tensor) -> Tensor:
    """The nearest mean of each token: (B, N)."""
    length = means.square().sum(dim=2)[:, None]  # (B, 1, K)
    across = means.transpose(1, 2)
    parts = _chunks(x.shape[1], means.shape[1])
    return torch.cat([(length - 2 * x[:, part] @ across).argmin(dim=2) for part in parts], dim=1)


def _means(x: Tensor, slot: Tensor, size: Tensor, k: int) -> Tensor:
    """Means of members weighted by size: (B, K, D). As products, which add in the same order every time."""
    total = x.new_zeros(len(x), k, x.shape[2] + 1)
    weighed = torch.cat([x, torch.ones_like(x[..., :1])], dim=2) * size.float()[..., None]
    for part in _chunks(x.shape[1], k):
        total += F.one_hot(slot[:, part], k).to(x.dtype).transpose(1, 2) @ weighed[:, part]
    return total[..., :-1] / total[..., -1:]


def _away(x: Tensor, means: Tensor, slot: Tensor) -> Tensor:
    """Square distance of each token from the mean of its cluster: (B, N)."""
    return (x - gather(means, slot)).square().sum(dim=2)


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
    away = _away(x, means, slot)
    middle = _middle(away, slot, k)  # (B, K)
    empty = middle == n
    away = F.pad(away, (0, 1)).scatter(1, middle, -1.0)[:, :n]
    rank = away.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (B, N)
    taker = empty.sort(dim=1, descending=True, stable=True).indices.gather(1, rank.clamp_max(k - 1))
    return torch.where(rank < empty.sum(dim=1, keepdim=True), taker, slot)
