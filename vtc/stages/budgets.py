"""Budgets that depend on the picture: what a method finds it worth, or what holds a share of its scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..allocate import Allocation, get_allocation
from ..method import Method, Select, scores
from ..tokens import Keep, Tokens
from .rows import Row

MakeTokens = Callable[[list[Row]], Tokens]


def check_share_of_scores(keep: Keep, method: Method, allocate: Allocation) -> None:
    """Raises ValueError where such a budget cannot be one."""
    if not getattr(method, "scored", False):
        raise ValueError(
            f"keep={keep!r} is a share of scores, but '{method.name}' does not choose by scores "
            "of tokens: give a share of tokens such as 0.25, or a number"
        )
    if allocate != get_allocation(method.allocate):
        raise ValueError(f"keep={keep!r} itself says what each tile or frame keeps: leave allocate out")


def groups(rows: list[Row]) -> list[list[Row]]:
    """Rows that a method can be given as one batch: of one grid, one budget, one side of the projector."""
    found: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.tile.grid, row.n, row.k, row.in_front].append(row)
    return list(found.values())


def count_own(method: Method, rows: list[Row], tokens: MakeTokens) -> None:
    """Lets a method that chooses its own number lower the budgets of the rows.

    Raises RuntimeError for a number that is out of range.
    """
    if type(method).count is Method.count:
        return
    for group in groups([row for row in rows if row.k]):
        given, k = tokens(group), group[0].k  # made outside, as gradients flow through what it keeps
        with torch.no_grad():
            counts = method.count(given, k)
        if counts is None:
            return  # it does not choose with these options
        counts = torch.as_tensor(counts)
        if counts.shape != (len(group),) or int(counts.min()) < 1 or int(counts.max()) > k:
            raise RuntimeError(
                f"method '{method.name}' returned counts that are not 1 to {k}: mend its count()"
            )
        for row, count in zip(group, counts.tolist()):
            row.k = int(count)


def spend(p: float, method: Select, rows: list[Row], tokens: MakeTokens) -> None:
    """Gives each image the smallest set of tokens, over all its rows, whose scores sum to a share p of all.

    Scores count from 0, or from the lowest of an image where that is below; where all are equal, a share p of
    the tokens stays.
    """
    found: dict[int, Tensor] = {}
    for group in groups(rows):
        given = tokens(group)
        with torch.no_grad():
            own = scores(method, given).double()
        found |= {id(row): score for row, score in zip(group, own)}
    for image in dict.fromkeys(row.image for row in rows):
        own = [row for row in rows if row.image == image]
        for row, count in zip(own, _shares(p, [found[id(row)] for row in own])):
            row.k = count


def _shares(p: float, parts: list[Tensor]) -> list[int]:
    """How many of the smallest set are in each part."""
    score = torch.cat(parts)
    score = score - score.min().clamp_max(0)
    if not float(score.sum()) or bool((score == score[0]).all()):
        score = torch.ones_like(score)
    ranked = score.sort(descending=True, stable=True)
    share = ranked.values.cumsum(0) / ranked.values.sum()
    count = min(1 + int((share < p - 1e-9).sum()), len(score))  # up to rounding
    chosen = torch.zeros_like(score).index_fill_(0, ranked.indices[:count], 1)
    return [int(part.sum()) for part in chosen.split([len(part) for part in parts])]
