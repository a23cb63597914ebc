"""How far tokens are from means of them, by their features or by their products with each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .pairs import products
from .tokens import gather

_PAIRS = 1 << 23  # products or distances held at once of each row: 32 MiB
SAME = 1e-6  # of the squares of two tokens: a distance that is less is rounding


def distances(x: Tensor) -> Features | Pairs:
    """Of the tokens x (B, N, D). All products are held where they are few, as then Lloyd's algorithm needs
    features no more; that must not depend on the batch, which would round differently."""
    return Pairs(x) if x.shape[1] ** 2 <= _PAIRS else Features(x)


def _square(product: Tensor, lengths: Tensor, others: Tensor) -> Tensor:
    """Square distances (B, K, n) of products, square lengths (B, n) and (B, K). What is below rounding is 0,
    so that equal tokens have none between them, nor from their mean."""
    sums = others[..., None] + lengths[:, None]
    square = torch.sub(sums, product, alpha=2)
    return torch.where(square > SAME * sums, square, 0.0)


def _lengths(x: Tensor) -> Tensor:
    """Squares of lengths: (B, N, D) -> (B, N)."""
    return torch.linalg.vector_norm(x, dim=2).square()


class Features:
    """Tokens by their features, means (B, K, D) by theirs."""

    def __init__(self, x: Tensor):
        x = x.float()
        self.x = x - x.mean(dim=1, keepdim=True)  # distances are the same, rounding is less
        self.lengths = _lengths(self.x)  # (B, N)

    def at(self, index: Tensor) -> Tensor:
        """As means, the tokens at index (B, K)."""
        return gather(self.x, index)

    def means(self, slot: Tensor, size: Tensor, k: int) -> Tensor:
        """Of members, weighted by size. As products, which add in the same order every time."""
        total = sizes = 0.0
        for part in self._parts(k):
            share = _share(slot[:, part], size[:, part], k)
            total, sizes = total + share @ self.x[:, part], sizes + share.sum(dim=2, keepdim=True)
        return total / sizes

    def squares(self, means: Tensor) -> Iterator[Tensor]:
        """Square distances of a few tokens at a time to all means: (B, K, n)."""
        others = _lengths(means)
        for part in self._parts(means.shape[1]):
            yield _square(means @ self.x[:, part].transpose(1, 2), self.lengths[:, part], others)

    def away(self, means: Tensor, slot: Tensor) -> Tensor:
        """Square distance of each token from the mean of its cluster: (B, N)."""
        own = gather(means, slot)
        square = _lengths(self.x - own)
        return torch.where(square > SAME * (self.lengths + _lengths(own)), square, 0.0)

    def _parts(self, k: int) -> Iterator[slice]:
        """A few tokens at a time; never of the batch, as products of another shape round differently."""
        few = max(1, _PAIRS // k)
        return (slice(start, start + few) for start in range(0, self.x.shape[1], few))


class Pairs:
    """Tokens by their products with each other, means by theirs with all tokens (B, K, N) and by their square
    lengths (B, K). A mean's products are the mean of its members' products."""

    def __init__(self, x: Tensor):
        self.all = products(x, centred=True)  # (B, N, N)
        self.lengths = self.all.diagonal(dim1=1, dim2=2).clone()  # (B, N)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return gather(self.all, index), self.lengths.gather(1, index)

    def means(self, slot: Tensor, size: Tensor, k: int) -> tuple[Tensor, Tensor]:
        share = _share(slot, size, k)
        share /= share.sum(dim=2, keepdim=True)
        means = share @ self.all
        return means, (share * means).sum(dim=2)

    def squares(self, means: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        yield _square(means[0], self.lengths, means[1])

    def away(self, means: tuple[Tensor, Tensor], slot: Tensor) -> Tensor:
        return next(self.squares(means)).gather(1, slot[:, None])[:, 0]


def _share(slot: Tensor, size: Tensor, k: int) -> Tensor:
    """(B, K, n) the size of each token in its own cluster, and 0 in all others."""
    size = size.float()[:, None]
    return size.new_zeros(len(slot), k, slot.shape[1]).scatter_(1, slot[:, None], size)
