"""HiPrune: anchors of a middle layer, their neighbours, and the rest from a deep layer (arXiv 2508.00553)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Layer, Need, Select, register
from ..tokens import Tokens


@register
@dataclass
class HiPrune(Select):
    """Keeps what a middle layer attends to, with neighbours, filled up by what a deep layer attends to.

    alpha       the share of the budget spent on anchors and their four neighbours together
    middle      the object layer: block 8 of 24 in the paper
    deep        the layer that fills up: the one LLaVA reads
    neighbours  "clamp" as the official code: neighbours are n +- 1 and n +- columns, clamped to the grid's
                first and last token, so they wrap around rows; "valid" stays within the grid

    Departures: where anchors and neighbours exceed the budget, as a large alpha makes them, the anchors and
    then the lowest positions stay, so that always exactly k tokens come out. The tiles of an image share its
    budget by their size after un-padding, where the official code gives each the same and does not un-pad.
    """

    name = "hiprune"
    paper = "arXiv:2508.00553"
    positions = "repack"
    needs_grid = True

    alpha: float = 0.1
    middle: Layer = 8.5 / 24
    deep: Layer = -2
    neighbours: str = "clamp"

    def __post_init__(self):
        if self.neighbours not in ("clamp", "valid"):
            raise ValueError(f"neighbours must be 'clamp' or 'valid', not {self.neighbours!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must be a share between 0 and 1")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("mean_attention", (self.middle, self.deep)),)

    def select(self, tokens: Tokens, k: int) -> Tensor:
        middle, deep = tokens.mean_attention.unbind(dim=1)  # (B, N) each
        count = round(k * self.alpha / 5)
        anchors = middle.sort(dim=1, descending=True, stable=True).indices[:, :count]  # (B, a)
        # A lexicographic order: anchors, then their neighbours, then the rest by the deep layer.
        rank = torch.zeros_like(deep).scatter(1, self._around(anchors, tokens.grid), 1.0)
        rank = rank.scatter(1, anchors, 2.0)
        order = torch.where(rank > 0, 0.0, deep).sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, rank.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
        return order[:, :k]

    def _around(self, anchors: Tensor, grid: tuple[int, int]) -> Tensor:
        """The four neighbours of each anchor, an anchor itself where there is none: (B, 4 a)."""
        rows, cols = grid
        if self.neighbours == "clamp":
            around = [(anchors + step).clamp(0, rows * cols - 1) for step in (-1, 1, -cols, cols)]
        else:
            row, col = anchors // cols, anchors % cols
            around = [
                torch.where(inside, anchors + step, anchors)
                for step, inside in (
                    (-1, col > 0),
                    (1, col < cols - 1),
                    (-cols, row > 0),
                    (cols, row < rows - 1),
                )
            ]
        return torch.cat(around, dim=1)
