"""ATC: agglomerative clustering of tokens (arXiv 2409.11923)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..clustering import LINKAGES, agglomerate
from ..method import Layer, Merge, Need, register
from ..tokens import Reduction, Tokens


@register
@dataclass
class ATC(Merge):
    """Merges the clusters that bottom-up clustering of one layer's keys finds by cosine distance.

    A group takes the place of its first member, and groups go on in that order. Departures: the official
    order is that of the library's labels, which means nothing; keys of length zero are at distance 1 from
    all others, where the official code divides by zero; sizes are tracked even where attention does not read
    them, so that later averages stay weighted; and exactly k groups come out off the shelf too, where the
    official code removes one token less than ToMe. All pairs of an image's tokens are in memory at once.

    linkage       how far apart two clusters are: "average", "complete" or "single"
    layer         the block whose keys are clustered after the encoder; the second to last, which LLaVA reads
    proportional  whether later blocks attend to a merged token as to its members
    """

    name = "atc"
    paper = "arXiv:2409.11923"
    stages = ("encoder", "features")
    schedule = "staged"

    linkage: str = "average"
    layer: Layer = -2
    proportional: bool = True

    def __post_init__(self):
        if self.linkage not in LINKAGES:
            raise ValueError(f"linkage must be one of {', '.join(LINKAGES)}, not {self.linkage!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("keys", (self.layer,)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        keys = F.normalize(tokens.keys[:, 0].float(), dim=-1)  # (B, N, D)
        source = agglomerate(1 - keys @ keys.transpose(1, 2), k, self.linkage)  # (B, N)
        position = torch.arange(tokens.n, device=source.device).expand_as(source)
        first = source.new_full((len(source), k), tokens.n).scatter_reduce(1, source, position, "amin")
        return Reduction(first, source)
