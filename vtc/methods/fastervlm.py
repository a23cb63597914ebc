"""FasterVLM: the tokens that CLS attends to stay (arXiv 2412.01818, first version)."""

from dataclasses import dataclass

from torch import Tensor

from ..method import Layer, Need, Select, register
from ..tokens import Tokens


@register
@dataclass
class FasterVLM(Select):
    """Keeps the tokens that CLS attends to most, in the layer that LLaVA reads.

    layer   the block whose attention is read
    signal  "cls_attention"; or, for encoders without CLS, "mean_attention": what a token receives from all

    Departures: the tiles of an image share its budget by their size after un-padding, where the official code
    gives each the same and does not un-pad. The form without CLS is an addition.
    """

    name = "fastervlm"
    paper = "arXiv:2412.01818"
    positions = "repack"

    layer: Layer = -2
    signal: str = "cls_attention"

    def __post_init__(self):
        if self.signal not in ("cls_attention", "mean_attention"):
            raise ValueError(f"signal must be 'cls_attention' or 'mean_attention', not {self.signal!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need(self.signal, (self.layer,)),)

    def score(self, tokens: Tokens) -> Tensor:
        return getattr(tokens, self.signal)[:, 0]  # (B, 1, N) -> (B, N)
