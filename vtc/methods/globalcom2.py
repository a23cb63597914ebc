"""GlobalCom2: the thumbnail commands how much of each crop stays, and what (arXiv 2501.05179)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Layer, Need, Select, register
from ..tokens import Reduction, Tokens


@register
@dataclass
class GlobalCom2(Select):
    """Keeps in each crop what both its own CLS and the thumbnail's look at, more in crops that matter.

    How many a crop keeps is the allocation `globalcom2`. In a crop the logits of its own CLS and those of the
    thumbnail's at the same place count alike, each map brought to length one over the tokens of the crop.
    The thumbnail, and an image of one tile, are ranked by their own logits.

    layer   the block that is read: the last, whose logits exist though LLaVA leaves its features out
    order   "paper": the thumbnail's tokens go on in the order of their logits; "raster": in their own
    signal  "cls_logits", before the softmax; or, for encoders without CLS, "mean_attention": what a token
            receives from all, after the softmax. The allocation then reads the same

    Departures: newline tokens are dropped, where the code keeps one for every row of the canvas. Images of
    one tile are compressed as well. All images of a batch are ranked by their own thumbnails, where the code
    takes those of the first. Which form without CLS the paper has is not known from its code.
    """

    name = "globalcom2"
    paper = "arXiv:2501.05179"
    positions = "repack"
    allocate = "globalcom2"

    layer: Layer = -1
    order: str = "paper"
    signal: str = "cls_logits"

    def __post_init__(self):
        if self.order not in ("paper", "raster"):
            raise ValueError(f"order must be 'paper' or 'raster', not {self.order!r}")
        if self.signal not in ("cls_logits", "mean_attention"):
            raise ValueError(f"signal must be 'cls_logits' or 'mean_attention', not {self.signal!r}")
        if (self.layer, self.signal) != (-1, "cls_logits"):
            self.allocate = {"name": "globalcom2", "layer": self.layer, "signal": self.signal}

    @property
    def needs(self) -> tuple[Need, ...]:
        own = Need(self.signal, (self.layer,))
        return own, Need(self.signal, (self.layer,), view="thumbnail")

    def score(self, tokens: Tokens) -> Tensor:
        """The thumbnail's view of itself is its own, so that the sum ranks it by its own logits."""
        views = (getattr(tokens, need.name)[:, 0].float() for need in self.needs)  # (B, N) each
        return sum(F.normalize(view, dim=1) for view in views)

    def reduce(self, tokens: Tokens, k: int) -> Reduction:
        index = self.select(tokens, k)  # (B, k) best first
        if self.order == "raster":
            return Reduction.select(index, tokens.n)
        index = torch.where(tokens.thumbnail[:, None], index, index.sort(dim=1).values)
        return Reduction.select(index, tokens.n, ordered=True)
