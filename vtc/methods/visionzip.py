"""VisionZip: what CLS attends to stays, the rest becomes a few contextual tokens (arXiv 2412.04467)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..method import Merge, Need, register
from ..nearest import nearest
from ..tokens import Reduction, Tokens


@register
@dataclass
class VisionZip(Merge):
    """Keeps the tokens that CLS attends to most; the others are merged, by keys, into a few evenly spaced.

    contextual_ratio  the share of the budget for merged tokens: 10 of 64, 20 of 128, 30 of 192 in the paper
    combine           "paper" adds the mean of those that join a token to it, as the official code does, so
                      that it is about twice as long; "mean" is their average, of which the paper speaks
    order             "paper": first the tokens attended to, then the merged ones; "raster"
    signal            "cls_attention", or "mean_attention", what a token receives from all, for encoders that
                      have no CLS token

    Both are read from the second to last block. The merged tokens are evenly spaced in the list of those that
    are left over, in raster order. Departures: the official code counts the CLS feature among its tokens and
    passes it on; here k patches come out and CLS is not one of them. The tiles of an image share its budget
    by their size after un-padding, where the official code gives each the same. Keys have their bias and
    whatever norm or rotation the encoder gives them.
    """

    name = "visionzip"
    paper = "arXiv:2412.04467"
    positions = "repack"
    before_projector = True

    contextual_ratio: float = 10 / 64
    combine: str = "paper"
    order: str = "paper"
    signal: str = "cls_attention"

    def __post_init__(self):
        if not 0 <= self.contextual_ratio <= 1:
            raise ValueError(f"contextual_ratio={self.contextual_ratio} must be a share between 0 and 1")
        if self.combine not in ("paper", "mean"):
            raise ValueError(f"combine must be 'paper' or 'mean', not {self.combine!r}")
        if self.order not in ("paper", "raster"):
            raise ValueError(f"order must be 'paper' or 'raster', not {self.order!r}")
        if self.signal not in ("cls_attention", "mean_attention"):
            raise ValueError(f"signal must be 'cls_attention' or 'mean_attention', not {self.signal!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return Need(self.signal, (-2,)), Need("keys", (-2,))

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        ordered = self.order == "paper"
        score = getattr(tokens, self.signal)[:, 0].float()  # (B, N)
        contextual = math.floor(k * self.contextual_ratio + 0.5)
        dominant, rest = (
            part.sort(dim=1).values
            for part in score.sort(dim=1, descending=True, stable=True).indices.tensor_split(
                [k - contextual], dim=1
            )
        )
        if contextual == 0:
            return Reduction.select(dominant, tokens.n)
        targets = rest[:, :: rest.shape[1] // contextual][:, :contextual]  # (B, C)
        index = torch.cat([dominant, targets], dim=1)  # (B, k)
        slots = torch.arange(k, device=index.device).expand_as(index)
        place = nearest(tokens.keys[:, 0], targets).scatter(1, dominant, dominant)  # (B, N)
        source = torch.zeros_like(place).scatter(1, index, slots).gather(1, place)
        if self.combine == "mean":
            return Reduction(index, source, ordered=ordered)
        ones = torch.ones_like(score)
        joined = torch.zeros_like(score[:, :k]).scatter_add(1, source, ones) - 1  # (B, k)
        weight = joined.clamp_min(1).reciprocal().gather(1, source).scatter(1, index, ones)
        return Reduction(index, source, weight, combine="sum", ordered=ordered)
