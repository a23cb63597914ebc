"""DivPrune: the tokens that are farthest from each other stay (arXiv 2503.02175)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Select, register
from ..tokens import Tokens


@register
@dataclass
class DivPrune(Select):
    """Keeps a diverse set by greedy max-min cosine distance; reads neither attention nor text.

    The first token is the one farthest from its nearest neighbour; each next one is farthest from those
    chosen. Departures: distances are float32, and chosen tokens are masked, so that duplicates or rounding
    can never choose one twice. On tiled images each tile is diversified by itself, with its share of the
    budget, where the official code takes all tokens of the image at once.
    """

    name = "divprune"
    paper = "arXiv:2503.02175"
    positions = "repack"

    def select(self, tokens: Tokens, k: int) -> Tensor:
        x = F.normalize(tokens.x.float(), dim=-1)
        distance = 1 - x @ x.transpose(1, 2)  # (B, N, N)
        batch, n, _ = distance.shape
        others = distance + torch.diag(x.new_full((n,), float("inf")))
        picks = [others.amin(dim=2).argmax(dim=1)]  # (B,)
        row = torch.arange(batch, device=x.device)
        nearest = distance[row, picks[0]]  # (B, N) distance to the nearest chosen token
        nearest[row, picks[0]] = -float("inf")
        for _ in range(k - 1):
            pick = nearest.argmax(dim=1)
            picks.append(pick)
            nearest = torch.minimum(nearest, distance[row, pick])  # a chosen token stays at -inf
            nearest[row, pick] = -float("inf")
        return torch.stack(picks, dim=1)  # (B, k)
