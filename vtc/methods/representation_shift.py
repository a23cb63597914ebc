"""Representation Shift: the tokens that the MLP changes most stay (arXiv 2508.00367)."""

from dataclasses import dataclass

from torch import Tensor

from ..method import Need, Select, register
from ..tokens import Tokens


@register
@dataclass
class RepresentationShift(Select):
    """Keeps the tokens that the block's MLP changes most; reads no attention, needs no CLS.

    The change is the length of what the MLP branch adds to a token, and tokens leave behind the block. The
    official example drops a fifth of the tokens in each of blocks 0, 3 and 6 of 12, which is
    keep={0: 0.8, 3: 0.8, 6: 0.8}; the default places are those of the other methods, at any depth. Departure:
    exactly k tokens stay, equal changes in spatial order.
    """

    name = "representation-shift"
    paper = "arXiv:2508.00367"
    stages = ("encoder",)
    schedule = "staged"
    after_block = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("shift", (-2,)),)

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.shift[:, 0]  # (B, 1, N) -> (B, N)
