"""SCOPE: tokens that cover the others well and are attended to (arXiv 2510.24214)."""

from dataclasses import dataclass

from torch import Tensor

from ..greedy import Cosines, cover
from ..method import Layer, Need, Select, register
from ..tokens import Tokens


@register
@dataclass
class Scope(Select):
    """Keeps tokens that are most like all others, not yet covered ones, and that CLS attends to.

    A token is covered by the most similar of the kept. The next one kept is that which adds most to the sum
    of all coverage, times its attention to the power of alpha. Reads the vision tower's features, in front
    of the projector.

    alpha   0 is coverage alone
    layer   whose attention counts: the one that LLaVA reads
    signal  "cls_attention", or "mean_attention" for encoders without CLS

    Attention is the mean over heads, where the paper takes their sum: the same factor for all tokens.
    Departures: similarities are float32, and one that is higher by less than 0.00001 covers no better. Tiles
    share the budget by their size after un-padding, where the official code gives each the same.
    """

    name = "scope"
    paper = "arXiv:2510.24214"
    positions = "repack"
    before_projector = True

    alpha: float = 1.0
    layer: Layer = -2
    signal: str = "cls_attention"

    def __post_init__(self):
        if self.signal not in ("cls_attention", "mean_attention"):
            raise ValueError(f"signal must be 'cls_attention' or 'mean_attention', not {self.signal!r}")
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha} must be a number of at least 0")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need(self.signal, (self.layer,)),)

    def select(self, tokens: Tokens, k: int) -> Tensor:
        attention = getattr(tokens, self.signal)[:, 0].float()  # (B, N)
        return cover(Cosines(tokens.x).of, attention.new_ones(attention.shape), attention**self.alpha, k)
