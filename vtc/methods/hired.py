"""HiRED: tiles get budgets by what the thumbnail attends to early, and spend them by a late layer
(arXiv 2408.10945)."""

from dataclasses import dataclass

from torch import Tensor

from ..method import Layer, Need, Select, register
from ..tokens import Tokens


@register
@dataclass
class HiRED(Select):
    """Keeps in each tile what CLS attends to late, as many as the thumbnail gives it early.

    How many a tile keeps is the allocation `hired`, which has the paper's share alpha of the thumbnail and
    the early layer as its options: compress(..., "hired", allocate=Hired(alpha=0.3)). An image of one tile
    is ranked by CLS attention alone, as the official code does it for LLaVA-1.5.

    layer  the block whose attention ranks the tokens of a tile

    Departures: heads are averaged where the code adds them up, which ranks alike. All images of a batch are
    ranked by themselves, where the code of LLaVA-1.5 gives all of them the mask of the first. What the
    budgets do differently is said at the allocation.
    """

    name = "hired"
    paper = "arXiv:2408.10945"
    positions = "repack"
    allocate = "hired"

    layer: Layer = -2

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("cls_attention", (self.layer,)),)

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.cls_attention[:, 0]  # (B, 1, N) -> (B, N)
