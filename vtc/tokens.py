"""What a method sees (`Tokens`), what it returns (`Reduction`), and how a budget becomes a count."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Tokens:
    """The patch tokens a method reduces, batch first; CLS, registers and newline tokens are set aside.

    A row is one image, tile or frame. All rows of one `Tokens` share the same grid and budget: the stage
    sorts ragged batches into such groups, so a method never meets padding.

    x          (B, N, D)  features at this point of the model
    grid       (rows, cols) of the patches, in raster order. rows * cols == N, except inside of an encoder
               that reduced tokens in an earlier block already
    place      (B, N)     the place 0..rows*cols-1 in the grid of each token; of a merged one, one of them
    size       (B, N)     how many patches each token stands for
    prefix     how many CLS and register tokens stand in front of the patches in the encoder's own sequence
    layer, depth          the encoder block after whose attention tokens are reduced, and how many blocks
               there are; behind the encoder layer == depth
    group      (B,)       which image of the batch the row belongs to
    thumbnail  (B,)       True where the row is the whole-image view of a tiled image
    lot        (B,)       a number that the picture alone decides, for rules that draw at random: the same
                          picture draws the same lot in any batch
    extras     what the method declared in `needs`, read as attributes: `tokens.cls_attention`; and `cell`
               (B, N) for a method that lowers the resolution: the low-resolution token each patch shows
    """

    x: Tensor
    grid: tuple[int, int]
    size: Tensor | None = None
    group: Tensor | None = None
    thumbnail: Tensor | None = None
    lot: Tensor | None = None
    place: Tensor | None = None
    prefix: int = 0
    layer: int = 1
    depth: int = 1
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        rows, device = self.x.shape[0], self.x.device
        if self.size is None:
            self.size = torch.ones(self.x.shape[:2], device=device)
        if self.group is None:
            self.group = torch.arange(rows, device=device)
        if self.thumbnail is None:
            self.thumbnail = torch.zeros(rows, dtype=torch.bool, device=device)
        if self.place is None:
            self.place = torch.arange(self.n, device=device).expand(rows, -1)
        if self.lot is None:
            self.lot = torch.zeros(rows, dtype=torch.long, device=device)

    @property
    def n(self) -> int:
        return self.x.shape[1]

    def __getattr__(self, name: str) -> Tensor:
        extras = self.__dict__.get("extras", {})
        if name in extras:
            return extras[name]
        raise AttributeError(
            f"tokens carry no '{name}': a method reads only what it declares in `needs` "
            f"(declared here: {sorted(extras) or 'nothing'})"
        )


COMBINE = ("mean", "sum", "mlerp")


@dataclass
class Reduction:
    """Which tokens stay and where the others go; dropping, merging, drawing and counting all derive from it.

    index    (B, K)  positions whose place the kept tokens take; ascending, unless the method says in which
             order they go on
    source   (B, N)  the slot 0..K-1 each input token went into, -1 if it was dropped
    weight   (B, N)  how much each token counts in its slot's average; None: its size
    size     (B, K)  how many patches each slot stands for from now on; None: the sum over its members
    combine  what becomes of a slot's members: "mean"; "sum", weighted but not divided by the sum of weights;
             "mlerp", the direction of their plain mean with the length of the longest (arXiv:2312.01026)
    mix      (B, K, N)  soft merging: how much of each token is in each slot, in the place of all the above;
             `source` is then for drawing
    spread   (B, N, K)  soft un-merging: how much of each slot each token gets back
    new      (B, K, D')  tokens of its own, neither some of those given nor averages of them: what `apply`
             gives. `source` is then for drawing, and for what else is known of the tokens
    pruned   True where no token was merged, so that kept tokens are exact copies
    ordered  True where prompts whose positions are counted anew hold the tokens in the order of `index`, and
             not of their places
    """

    index: Tensor
    source: Tensor
    weight: Tensor | None = None
    size: Tensor | None = None
    combine: str = "mean"
    mix: Tensor | None = None
    spread: Tensor | None = None
    new: Tensor | None = None
    pruned: bool = False
    ordered: bool = False

    @classmethod
    def select(cls, index: Tensor, n: int, ordered: bool = False) -> Reduction:
        """Pruning: the tokens at `index` (B, K) stay, the other n - K are dropped."""
        index = index if ordered else index.sort(dim=1).values
        source = torch.full((index.shape[0], n), -1, dtype=torch.long, device=index.device)
        slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
        return cls(index, source.scatter(1, index, slots), pruned=True, ordered=ordered)

    @classmethod
    def merge(cls, index: Tensor, source: Tensor, weight: Tensor | None = None, **more: Any) -> Reduction:
        """Merging: token n joins the group whose place is the position `source[b, n]`, one of `index[b]`, or
        is dropped where that is -1. `more` are further fields."""
        index = index.sort(dim=1).values  # (B, K)
        slot = torch.searchsorted(index, source.contiguous())
        return cls(index, torch.where(source < 0, -1, slot), weight, **more)

    @property
    def k(self) -> int:
        return self.index.shape[1]

    def ascending(self) -> Reduction:
        """The same groups, in the order of their places."""
        index, order = self.index.sort(dim=1)
        rank = order.argsort(dim=1)  # (B, K) where each slot goes
        source = torch.where(self.source < 0, -1, rank.gather(1, self.source.clamp_min(0)))
        sorted_ = replace(self, index=index, source=source, ordered=False)
        if self.size is not None:
            sorted_.size = self.size.gather(1, order)
        if self.mix is not None:
            sorted_.mix = gather(self.mix, order)
        if self.new is not None:
            sorted_.new = gather(self.new, order)
        if self.spread is not None:
            sorted_.spread = gather(self.spread.transpose(1, 2), order).transpose(1, 2)
        return sorted_

    def apply(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Combines each slot's members: (B, N, D) -> (B, K, D). A slot of one member is its exact copy.

        An average is weighted by `weight`, else by `size` (B, N), else plainly, and summed in float32.
        """
        if self.new is not None:
            return self.new.to(x.dtype)
        if self.mix is not None:
            return (self.mix.float() @ x.float()).to(x.dtype)
        return added(gather(x, self.index), self.change(x, size))

    def change(self, x: Tensor, size: Tensor | None = None) -> Change | None:
        """What combining adds to the tokens at `index`, of x (B, N, D): None where nothing is merged.

        Only tokens that leave their places have to be looked at. Where a token j joins one at place p, the
        mean becomes x_p + sum of w_j / W (x_j - x_p), and the sum x_p + sum of w_j x_j + (w_p - 1) x_p.
        """
        if self.new is not None:
            return self._every, self.new.float() - gather(x, self.index).float()
        if self.mix is None and (self.pruned or self.k == self.source.shape[1]):
            return None
        if self.mix is not None:
            return self._every, self.mix.float() @ x.float() - gather(x, self.index).float()
        if self.combine == "mlerp":
            return self._longest(x)
        ones = torch.ones_like(self.source, dtype=torch.float32)
        weight = self.weight if self.weight is not None else size
        weight = ones if weight is None else weight.float()
        rest = self._rest  # (B, R)
        slot = self.source.gather(1, rest)
        gone, slot = slot < 0, slot.clamp_min(0)
        share = weight.gather(1, rest)
        if self.combine == "sum":
            others = (self._sums(ones) - 1).clamp_min(1)  # (B, K) that join each place
            own = ((weight.gather(1, self.index) - 1) / others).gather(1, slot)
        else:
            share = share / self._sums(weight).clamp_min(1e-12).gather(1, slot)
            own = -share
        share, own = (part.masked_fill(gone, 0) for part in (share, own))
        if rest.shape[1] <= self.k:
            places = self.index.gather(1, slot)
            return slot, gather(x, rest).float() * share[..., None] + gather(x, places).float() * own[
                ..., None
            ]
        # Where most tokens join others it is the places that are few.
        own = own.new_zeros(self.index.shape).scatter_add(1, slot, own)
        joined = gather(x, rest).float().mul_(share[..., None])  # (B, R, D)
        more = (gather(x, self.index).float() * own[..., None]).flatten(0, 1)
        more = more.index_add_(0, _rows(slot, self.k), joined.flatten(0, 1))
        return self._every, more.view(*self.index.shape, -1)

    def _longest(self, x: Tensor) -> Change:
        """Group means with the length of the longest member; where members cancel out, the token whose place
        it is gives the direction."""
        rest = self._rest  # (B, R)
        slot = self.source.gather(1, rest)
        gone, slot = slot < 0, slot.clamp_min(0)
        single = gather(x, self.index).float()  # (B, K, D)
        others = gather(x, rest).float().masked_fill(gone[..., None], 0)
        count = torch.zeros_like(slot[:, :1]).expand_as(self.index).scatter_add(1, slot, (~gone).long())
        total = single.clone()
        total.flatten(0, 1).index_add_(0, _rows(slot, self.k), others.flatten(0, 1))
        mean = total / (count + 1)[..., None]
        longest = single.norm(dim=-1).scatter_reduce(1, slot, others.norm(dim=-1), "amax")[..., None]
        direction = torch.where(mean.norm(dim=-1, keepdim=True) <= 1e-6 * longest, single, mean)
        new = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12) * longest
        return self._every, (new - single).masked_fill(count[..., None] == 0, 0)

    def sizes(self, size: Tensor) -> Tensor:
        """How many patches each slot stands for, where the tokens stood for `size` (B, N): (B, K)."""
        return self._sums(size) if self.size is None else self.size

    def expand(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Un-merging: every member gets its slot's token, a dropped one its row of `dropped` (B, N, D), else
        zeros: (B, K, D) -> (B, N, D)."""
        if self.spread is not None:
            return (self.spread.float() @ y.float()).to(y.dtype)
        full, gone = gather(y, self.source.clamp_min(0)), (self.source < 0)[..., None]
        return full.masked_fill(gone, 0) if dropped is None else torch.where(gone, dropped, full)

    def _sums(self, weight: Tensor) -> Tensor:
        """Sums over each slot's members: (B, N) -> (B, K). Those at `index` lie in order already, so only the
        others are added up."""
        weight, rest = weight.float(), self._rest  # (B, N - K)
        slot = self.source.gather(1, rest)
        slot = torch.where(slot < 0, self.k, slot)  # dropped tokens go to a spare slot K
        out = F.pad(weight.gather(1, self.index), (0, 1))
        return out.scatter_add(1, slot, weight.gather(1, rest))[:, :-1]

    @property
    def _every(self) -> Tensor:
        """All slots: (B, K)."""
        return torch.arange(self.k, device=self.index.device).expand(len(self.index), -1)

    @cached_property
    def _rest(self) -> Tensor:
        """The positions that are in no slot's place: (B, N - K)."""
        kept = torch.zeros_like(self.source).scatter(1, self.index, 1)
        return kept.argsort(dim=1, stable=True)[:, : self.source.shape[1] - self.k]


# Slots (B, R), some several times, and what is added to each (B, R, D).
Change = tuple[Tensor, Tensor]


def added(x: Tensor, change: Change | None) -> Tensor:
    """x (B, K, D), which may be written to, with a change added in float32."""
    if change is None:
        return x
    slot, more = change
    total = x.float().contiguous()
    total.flatten(0, 1).index_add_(0, _rows(slot, x.shape[1]), more.flatten(0, 1))
    return total.to(x.dtype)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, D) at index (B, K): (B, K, D)."""
    if not x.is_contiguous():
        return x[torch.arange(len(x), device=x.device)[:, None], index]
    # On a CPU several times as fast as x.gather().
    return x.flatten(0, 1).index_select(0, _rows(index, x.shape[1])).view(*index.shape, x.shape[2])


def _rows(index: Tensor, n: int) -> Tensor:
    """Positions (B, K) in rows of n as positions in all rows one after the other: (B K,)."""
    return (index + n * torch.arange(len(index), device=index.device)[:, None]).flatten()


Keep = int | float | str


def fraction_of_scores(keep: Any) -> float | None:
    """The p of a budget "p:0.9", None for any other."""
    return float(keep[2:]) if isinstance(keep, str) else None


def check_keep(keep: Keep) -> Keep:
    """Returns the budget as given, or raises in one sentence that says what a budget is."""
    if isinstance(keep, str) and keep.startswith("p:"):
        return _check_fraction_of_scores(keep)
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"keep must be a fraction in (0, 1] or a whole number of tokens >= 1, not {keep!r}")
    if isinstance(keep, Integral):
        if keep < 1:
            raise ValueError(f"keep={keep} would leave no token: give at least 1, or a fraction in (0, 1]")
        return int(keep)
    if not 0 < keep <= 1:  # also catches NaN
        raise ValueError(
            f"keep={keep} is not a fraction in (0, 1]: it is the share of tokens KEPT; "
            "for a number of tokens give a whole number"
        )
    return float(keep)


def _check_fraction_of_scores(keep: str) -> str:
    try:
        if 0 < float(keep[2:]) <= 1:
            return keep
    except ValueError:
        pass
    raise ValueError(f"keep={keep!r} is no share in (0, 1]: 'p:0.9' keeps the tokens with 0.9 of the scores")


def count_kept(keep: Keep, n: int) -> int:
    """The exact number of tokens that stay of `n`: at least 1, at most n, fractions rounded half up. Of a
    fraction of scores, which only the scores can tell, the most."""
    if isinstance(keep, str):
        return n
    return max(1, math.floor(keep * n + 0.5)) if isinstance(keep, float) else min(keep, n)


def share(k: int, sizes: list[int]) -> list[int]:
    """Splits a budget of k tokens over tiles or frames of the given sizes, proportionally and exactly.

    Largest remainders get the odd tokens, earlier tiles first on ties; a tile never gets more than it has.
    """
    total = sum(sizes)
    exact = [k * n / total for n in sizes]
    parts = [math.floor(e) for e in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: k - sum(parts)]:
        parts[i] += 1
    return parts
