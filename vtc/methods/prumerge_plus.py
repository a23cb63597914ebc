"""PruMerge+: PruMerge with evenly spaced tokens beside the outliers (arXiv 2403.15388)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import register
from .prumerge import PruMerge, outliers


@register
@dataclass
class PruMergePlus(PruMerge):
    """PruMerge with evenly spaced tokens beside the outliers, about three for each.

    Of m outliers among n tokens every (n // m // 3)-th token is kept too, from the first on, never the last;
    they follow in raster order. The options are those of `prumerge`. With adaptive=False, and where its own
    number exceeds the budget, m is the largest number of tokens with the most attention that leaves room for
    the spaced ones, and the next in attention fill up. Four tokens or fewer are all by attention; and where
    more than half of the tokens stay, many, as there is no spacing between 2 and 1. Departures: those of
    `prumerge`; and without outliers nothing is spaced, where the official code divides by zero.
    """

    name = "prumerge+"

    def _own(self, attention: Tensor, ranked: Tensor) -> Tensor:
        return _with_spaced(ranked).gather(1, outliers(attention)[:, None])[:, 0]

    def _kept(self, attention: Tensor, ranked: Tensor, room: int) -> Tensor:
        n = ranked.shape[1]
        rank = torch.arange(n, device=ranked.device)
        fits = _with_spaced(ranked) <= room  # (B, N)
        if self.adaptive:
            fits = fits & (rank <= outliers(attention)[:, None])
        most = torch.where(fits, rank, 0).amax(dim=1, keepdim=True)  # (B, 1)
        spaced = _spaced(ranked, _spacing(n, most)) & (rank >= most) & (most > 0)  # in the order of `ranked`
        taken = torch.where((rank < most) | spaced, rank, n + rank).argsort(dim=1)[:, :room]
        goes = torch.where(spaced, n + ranked, rank).gather(1, taken).argsort(dim=1)
        return ranked.gather(1, taken.gather(1, goes))


def _spacing(n: int, most: Tensor) -> Tensor:
    return (n // most.clamp_min(1) // 3).clamp_min(1)


def _spaced(position: Tensor, spacing: Tensor) -> Tensor:
    return (position % spacing == 0) & (position < position.shape[-1] - 1)


def _with_spaced(ranked: Tensor) -> Tensor:
    """How many the first m of `ranked` (B, N) and the tokens spaced for them are, m = 0 to N - 1: (B, N)."""
    n = ranked.shape[1]
    most = torch.arange(n, device=ranked.device)
    spacing, which = _spacing(n, most).unique(return_inverse=True)  # at most about 2 sqrt(N / 3)
    spaced = _spaced(ranked[:, None], spacing[:, None])  # (B, spacings, N)
    after = (~spaced).cumsum(dim=2)  # of the first m, those that are not spaced
    new = F.pad(after, (1, 0))[:, which, most]  # (B, N)
    return (spaced.sum(dim=2)[:, which] + new).masked_fill(most == 0, 0)
