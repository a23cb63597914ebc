"""Greedy selections over a batch: tokens far from each other, of a large volume, or that cover all others.

Ties go to the lowest position, no token is chosen twice, and what one row chooses never depends on another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import products
from .tokens import gather

_PAIRS = 1 << 20  # pairs of tokens of a row looked at at once: 4 MiB
_HELD = 8  # times as many are held throughout: 32 MiB
_FEW = 32  # candidates looked at again at once
_SAME = 1e-5  # of a similarity: less is rounding
_EQUAL = 1e-6  # of a sum of them: two tokens most like each other add the same, in exact numbers


class Cosines:
    """Cosine similarities of the tokens x (B, N, D), in float32; those of a token of zeros are zero.

    `then` makes something else of them in place. All pairs are held where they are few, or no more than the
    features themselves, which is fastest. That must not depend on the batch, which would round differently.
    """

    def __init__(self, x: Tensor, then: Callable[[Tensor], Tensor] = lambda cosine: cosine):
        self._then, self.n, self._all = then, x.shape[1], None
        held = self.n <= x.shape[2] or self.n**2 <= _HELD * _PAIRS
        if held:
            product = products(x)  # (B, N, N)
            self.length = product.diagonal(dim1=1, dim2=2).sqrt()  # (B, N)
        else:
            self._x = x.float()
            self.length = torch.linalg.vector_norm(self._x, dim=2)
        self._scale = self.length.clamp_min(1e-12)  # products are divided by it: no second copy of x
        if held:
            self._all = self._divided(product, self._scale)

    def of(self, index: Tensor) -> Tensor:
        """Of the tokens at index (B, c) with all: (B, c, N), which may be written to."""
        if self._all is not None:
            return gather(self._all, index)
        return self._divided(gather(self._x, index) @ self._x.transpose(1, 2), self._scale.gather(1, index))

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """A bounded number of tokens at a time: the first one's position, and what `of` gives, to be read."""
        every = torch.arange(self.n, device=self.length.device).expand(len(self.length), -1)
        first = 0
        for index in every.split(max(1, _PAIRS // self.n), dim=1):
            part = slice(first, first + index.shape[1])
            yield first, self.of(index) if self._all is None else self._all[:, part]
            first = part.stop

    def _divided(self, product: Tensor, scale: Tensor) -> Tensor:
        return self._then(product.div_(self._scale[:, None]).div_(scale[..., None]))


def farthest(x: Tensor, k: int) -> Tensor:
    """The token farthest from its nearest neighbour, then always the one farthest from those chosen, in
    cosine distance: x (B, N, D) -> (B, k) in the order of choice."""
    cosines = Cosines(x)
    row = torch.arange(len(x), device=x.device)
    isolation = []
    for first, cosine in cosines.chunks():
        distance = 1 - cosine
        distance.diagonal(first, dim1=1, dim2=2).fill_(torch.inf)  # from itself
        isolation.append(distance.amin(dim=2))
    pick = torch.cat(isolation, dim=1).argmax(dim=1)  # (B,)
    picks, nearest = [pick], torch.full_like(cosines.length, torch.inf)  # (B, N) distance to the nearest pick
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, 1 - cosines.of(pick[:, None])[:, 0])
        nearest[row, pick] = -torch.inf  # and stays so
        pick = nearest.argmax(dim=1)
        picks.append(pick)
    return torch.stack(picks, dim=1)


def volume(x: Tensor, worth: Tensor, k: int) -> Tensor:
    """The greedy choice of k tokens whose kernel L = diag(worth) cosines diag(worth) has the largest
    determinant, as a determinantal point process's most likely set: worth (B, N) >= 0 -> (B, k) in the order
    of choice.

    Where the chosen span all directions there are, every further determinant is zero: the choice then begins
    anew among the tokens that are left.
    """
    cosines = Cosines(x)
    worth = worth.float()
    row = torch.arange(len(x), device=x.device)
    whole = worth.square() * (cosines.length > 0)  # (B, N) the diagonal, without its rounding
    left = whole.clone()  # (B, N) what a token adds to those chosen: the square of its part that is new
    factor = worth.new_zeros(len(x), k, cosines.n)  # rows of the Cholesky factor
    begin = row.new_zeros(len(x), 1)  # the step at which the choice began, or began anew
    chosen = torch.zeros_like(left, dtype=torch.bool)
    picks = []
    for step in range(k):
        spent = left.amax(dim=1, keepdim=True) <= 0  # (B, 1)
        begin = torch.where(spent, step, begin)
        left = torch.where(spent, whole.masked_fill(chosen, -torch.inf), left)
        pick = left.argmax(dim=1)
        picks.append(pick)
        before = factor[:, :step]  # (B, step, N)
        own = before[row, :, pick] * (torch.arange(step, device=x.device) >= begin)  # (B, step)
        new = worth[row, pick, None] * worth * cosines.of(pick[:, None])[:, 0]  # (B, N)
        new = new - (own[:, None] @ before)[:, 0]
        factor[:, step] = new / left[row, pick, None].clamp_min(1e-30).sqrt()
        left = left - factor[:, step].square()
        left = torch.where(left > _SAME * whole, left, 0.0)
        chosen[row, pick] = True
        left = left.masked_fill(chosen, -torch.inf)
    return torch.stack(picks, dim=1)


def cover(similar: Callable[[Tensor], Tensor], weight: Tensor, worth: Tensor, k: int) -> Tensor:
    """The token that adds most to how well everything is covered, again and again: (B, k) in that order.

    similar  of candidates (B, c): how well each covers each of R things, (B, c, R), at most 1, a new tensor.
             A thing is covered by the best of the chosen, and by 0 at least
    weight   (B, R) how much each thing counts
    worth    (B, N) >= 0 multiplies what a candidate adds

    What a candidate adds never grows as more is covered, so what it added when last looked at is a bound:
    only those are looked at again whose bound is the highest, which gives what looking at all would give.
    """
    batch, n = worth.shape
    row = torch.arange(batch, device=worth.device)
    best = weight.new_zeros(weight.shape)  # (B, R) how well each thing is covered

    def gain(index: Tensor) -> Tensor:
        more = F.threshold_(similar(index).sub_(best[:, None]), _SAME, 0.0)  # (B, c, R)
        # A vector in front: behind it, one row alone would be rounded unlike rows of a batch.
        return (weight[:, None] @ more.transpose(1, 2))[:, 0] * worth.gather(1, index)

    most = max(1, _PAIRS // max(n, weight.shape[1]))
    every = torch.arange(n, device=worth.device).expand(batch, -1)
    bound = torch.cat([gain(part) for part in every.split(most, dim=1)], dim=1)  # (B, N)
    fresh = torch.ones_like(bound, dtype=torch.bool)
    picks = []
    for _ in range(k):
        few = _FEW
        while True:
            top = bound.amax(dim=1, keepdim=True)
            first = bound >= top * (1 - _EQUAL)  # (B, N) of which the lowest position is chosen
            sure = (fresh | ~first).all(dim=1) | (top[:, 0] <= 0)  # (B,)
            if bool(sure.all()):
                break
            # Never the fresh ones again, so that this ends whatever is equal.
            index = bound.masked_fill(fresh, -torch.inf).topk(min(few, most, n), dim=1).indices
            held, known = bound.gather(1, index), fresh.gather(1, index)
            stays = sure[:, None] | known | (held == -torch.inf)
            bound.scatter_(1, index, torch.where(stays, held, gain(index)))
            fresh.scatter_(1, index, known | ~stays)
            few *= 2
        pick = first.float().argmax(dim=1)
        picks.append(pick)
        best = torch.maximum(best, similar(pick[:, None])[:, 0])
        bound[row, pick] = -torch.inf
        fresh = torch.zeros_like(fresh)
    return torch.stack(picks, dim=1)
