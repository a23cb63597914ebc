"""DivPrune: the tokens that are farthest from each other stay (arXiv 2503.02175)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Select, register
from ..tokens import Tokens

_PAIRS = 1 << 22  # distances held at once: 16 MiB


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
        row = torch.arange(len(x), device=x.device)
        pick = _isolation(x).argmax(dim=1)  # (B,)
        picks, nearest = [pick], x.new_full(x.shape[:2], float("inf"))  # (B, N) distance to the nearest pick
        for _ in range(k - 1):
            distance = 1 - (x @ x[row, pick][..., None])[..., 0]  # (B, N)
            nearest = torch.minimum(nearest, distance)
            nearest[row, pick] = -float("inf")  # and stays so
            pick = nearest.argmax(dim=1)
            picks.append(pick)
        return torch.stack(picks, dim=1)  # (B, k)


def _isolation(x: Tensor) -> Tensor:
    """Distance of each unit vector to its nearest neighbour: (B, N, D) -> (B, N). A few rows at a time: all
    pairs of an image of 10,000 tokens would be 400 MB."""
    batch, n, _ = x.shape
    found = []
    for rows in torch.arange(n, device=x.device).split(max(1, _PAIRS // (batch * n))):
        distance = 1 - x[:, rows] @ x.transpose(1, 2)  # (B, rows, N)
        distance[:, torch.arange(len(rows), device=x.device), rows] = float("inf")  # from itself
        found.append(distance.amin(dim=2))
    return torch.cat(found, dim=1)
