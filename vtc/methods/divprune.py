"""DivPrune: the tokens that are farthest from each other stay (arXiv 2503.02175)."""

from dataclasses import dataclass

from torch import Tensor

from ..greedy import farthest
from ..method import Select, register
from ..tokens import Tokens


@register
@dataclass
class DivPrune(Select):
    """Keeps a diverse set by greedy max-min cosine distance; reads neither attention nor text.

    The first token is the one farthest from its nearest neighbour; each next one is farthest from those
    chosen. Departures: distances are float32, and chosen tokens are masked, so that duplicates or rounding
    can never choose one twice. On tiled images each tile is diversified by itself, with its share of the
    budget, where the official code takes all tokens of the image at once. Inside an encoder, where the paper
    does not prune, every block applies the rule anew to the tokens it holds.
    """

    name = "divprune"
    paper = "arXiv:2503.02175"
    stages = ("features", "encoder", "decoder")
    schedule = "staged"
    positions = "repack"

    def select(self, tokens: Tokens, k: int) -> Tensor:
        return farthest(tokens.x, k)
