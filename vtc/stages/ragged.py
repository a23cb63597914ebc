"""Batches of pictures of several sizes, padded to one length: each size is reduced by itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import Change, Reduction, Tokens, gather
from .passage import Group


def of_group(tokens: Tokens, group: Group, block: int) -> Tokens:
    """The pictures of one size, without the padding behind them."""
    rows, n, m = group.rows, group.found(block), tokens.prefix + group.found(block)
    extras = {
        kind: extra[rows, ..., :m, :m] if kind == "attention" else extra[rows, :, :n]
        for kind, extra in tokens.extras.items()
    }
    return replace(
        tokens,
        x=tokens.x[rows, :n],
        grid=group.grid,
        size=tokens.size[rows, :n],
        group=None,
        thumbnail=None,
        lot=tokens.lot[rows],
        place=tokens.place[rows, :n],
        extras=extras,
    )


def padded(parts: list[tuple[Tensor, Tensor]], n: int, square: bool) -> Tensor:
    """What was found of each size for rows of a batch, as one with zeros behind: (B, n, ...) of (b, k, ...)
    each, and (B, H, n, n) of whole maps (b, H, k, k)."""
    rows, found = torch.cat([rows for rows, _ in parts]), []
    for _, part in parts:
        more = n - part.shape[2 if square else 1]
        behind = (0, more, 0, more) if square else (0, 0) * (part.dim() - 2) + (0, more)
        found.append(F.pad(part, behind))
    return torch.cat(found)[rows.argsort()]


@dataclass
class Ragged(Reduction):
    """The reductions of all sizes as one. Slots beyond those of a picture are padding, whose place any token
    has that did not stay."""

    rows: list[Tensor] = field(default_factory=list)
    parts: list[Reduction] = field(default_factory=list)

    @classmethod
    def of(cls, groups: list[Group], parts: list[Reduction], n: int) -> Ragged:
        """From n tokens, padding included, to as many as the largest picture keeps."""
        if any(part.mix is not None or part.spread is not None for part in parts):
            raise RuntimeError("mixtures of tokens need pictures of one size: give them one by one")
        batch, width = sum(len(group.rows) for group in groups), max(part.k for part in parts)
        index = parts[0].index.new_zeros(batch, width)
        source = index.new_full((batch, n), -1)
        for group, part in zip(groups, parts, strict=True):
            rows, found = group.rows, part.source.shape[1]
            taken = index.new_zeros(len(rows), n).scatter(1, part.index, 1)
            index[rows, : part.k] = part.index
            index[rows, part.k :] = taken.argsort(dim=1, stable=True)[:, : width - part.k]
            source[rows, :found] = part.source
        pruned = all(part.pruned for part in parts)
        return cls(index, source, pruned=pruned, rows=[group.rows for group in groups], parts=parts)

    def change(self, x: Tensor, size: Tensor | None = None) -> Change | None:
        if self.pruned:
            return None
        slots = torch.arange(self.k, device=x.device).expand(len(x), -1)
        return slots, (self.apply(x, size) - gather(x, self.index)).float()

    def apply(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        new = gather(x, self.index)  # (B, K, D)
        for rows, part in zip(self.rows, self.parts, strict=True):
            found = part.source.shape[1]
            of_rows = part.apply(x[rows, :found], None if size is None else size[rows, :found])
            places = torch.arange(part.k, device=x.device).expand(len(rows), -1)
            new = new.index_put((rows[:, None], places), of_rows)
        return new

    def sizes(self, size: Tensor) -> Tensor:
        new = torch.ones(self.index.shape, device=size.device)
        for rows, part in zip(self.rows, self.parts, strict=True):
            new[rows, : part.k] = part.sizes(size[rows, : part.source.shape[1]])
        return new
