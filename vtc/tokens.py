"""What a method sees (`Tokens`), what it returns (`Reduction`), and how a budget becomes a count."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor


@dataclass
class Tokens:
    """The patch tokens a method reduces, batch first; CLS, registers and newline tokens are set aside.

    A row is one image, tile or frame. All rows of one `Tokens` share the same grid and budget: the stage
    sorts ragged batches into such groups, so a method never meets padding.

    x          (B, N, D)  features at this point of the model
    grid       (rows, cols) with rows * cols == N; tokens are in raster order
    size       (B, N)     how many patches each token stands for
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
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        rows, device = self.x.shape[0], self.x.device
        if self.size is None:
            self.size = torch.ones(self.x.shape[:2], device=device)
        if self.group is None:
            self.group = torch.arange(rows, device=device)
        if self.thumbnail is None:
            self.thumbnail = torch.zeros(rows, dtype=torch.bool, device=device)
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


@dataclass
class Reduction:
    """Which tokens stay and where the others go; dropping, merging, drawing and counting all derive from it.

    index   (B, K)  ascending positions whose place the kept tokens take
    source  (B, N)  the slot 0..K-1 each input token went into, -1 if it was dropped
    weight  (B, N)  how much each token counts in its slot's average; None: its size
    pruned  True where no token was merged, so that kept tokens are exact copies
    """

    index: Tensor
    source: Tensor
    weight: Tensor | None = None
    pruned: bool = False

    @classmethod
    def select(cls, index: Tensor, n: int) -> Reduction:
        """Pruning: the tokens at `index` (B, K) stay, the other n - K are dropped."""
        index = index.sort(dim=1).values
        source = torch.full((index.shape[0], n), -1, dtype=torch.long, device=index.device)
        slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
        return cls(index, source.scatter(1, index, slots), pruned=True)

    @classmethod
    def merge(cls, index: Tensor, source: Tensor, weight: Tensor | None = None) -> Reduction:
        """Merging: token n joins the group whose place is the position `source[b, n]`, one of `index[b]`."""
        index = index.sort(dim=1).values  # (B, K)
        return cls(index, torch.searchsorted(index, source.contiguous()), weight)

    @property
    def k(self) -> int:
        return self.index.shape[1]

    def apply(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Averages each slot's members: (B, N, D) -> (B, K, D). A slot of one member is its exact copy.

        The average is weighted by `weight`, else by `size` (B, N), else plainly, and summed in float32.
        """
        single = gather(x, self.index)  # (B, K, D)
        if self.pruned:
            return single
        weight = self.weight if self.weight is not None else size
        weight = torch.ones_like(self.source, dtype=torch.float32) if weight is None else weight.float()
        total = self.sizes(weight)  # (B, K)
        mean = self._sum(x.float() * weight[..., None]) / total[..., None].clamp_min(1e-12)
        alone = self.sizes(torch.ones_like(weight)) == 1  # (B, K)
        return torch.where(alone[..., None], single, mean.to(x.dtype))

    def sizes(self, size: Tensor) -> Tensor:
        """The summed size of each slot's members: (B, N) -> (B, K)."""
        return self._sum(size.float()[..., None])[..., 0]

    def expand(self, y: Tensor) -> Tensor:
        """Un-merging: every member gets its slot's token, a dropped one zeros: (B, K, D) -> (B, N, D)."""
        return gather(y, self.source.clamp_min(0)) * (self.source >= 0)[..., None]

    def _sum(self, x: Tensor) -> Tensor:
        slot = torch.where(self.source < 0, self.k, self.source)  # dropped tokens go to a spare slot K
        out = x.new_zeros(x.shape[0], self.k + 1, x.shape[2])
        return out.scatter_add(1, slot[..., None].expand_as(x), x)[:, :-1]  # (B, K, D)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, D) at index (B, K): (B, K, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def check_keep(keep: int | float) -> int | float:
    """Returns the budget as given, or raises in one sentence that says what a budget is."""
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


def count_kept(keep: int | float, n: int) -> int:
    """The exact number of tokens that stay of `n`: at least 1, at most n, fractions rounded half up."""
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
