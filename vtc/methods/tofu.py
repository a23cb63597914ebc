"""Token Fusion: ToMe that prunes in early blocks and merges in late ones (arXiv 2312.01026)."""

from dataclasses import dataclass, replace

import torch

from ..method import register
from ..tokens import Reduction, Tokens
from .tome import ToMe


@register
@dataclass
class ToFu(ToMe):
    """Matches tokens as ToMe does; early blocks drop what would be merged, later ones keep lengths.

    The paper's reason: early blocks are far from linear in their tokens, so that an average is none of them.
    Later a group becomes the direction of its plain mean with the length of its longest member (MLERP). There
    is no official code, and the paper's depth at which it changes is an option here. Departure: where more
    than half of the tokens go at once, further rounds judge groups by the average of all their keys, dropped
    tokens included.

    drop          the share of the depth, from the first block on, in which tokens are dropped, not merged
    proportional  whether later blocks attend to a merged token as to its members; the paper leaves it open,
                  plain means do not ask for it
    """

    name = "tofu"
    paper = "arXiv:2312.01026"
    stages = ("encoder", "features")

    proportional: bool = False
    drop: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is a share of the depth between 0 and 1, not {self.drop!r}")

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        reduction = super().assign(tokens, k)
        if tokens.layer >= self.drop * tokens.depth:
            return replace(reduction, combine="mlerp")
        slot = torch.arange(k, device=tokens.x.device).expand_as(reduction.index)
        source = torch.full_like(reduction.source, -1).scatter(1, reduction.index, slot)
        return Reduction(reduction.index, source, pruned=True)
