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
    budget, where the official code takes all tokens of the image at once. Inside an encoder, where the paper
    does not prune, every block applies the rule anew to the tokens it holds.
    """

    name = "divprune"
    paper = "arXiv:2503.02175"
    stages = ("features", "encoder")
    schedule = "staged"
    positions = "repack"

    def select(self, tokens: Tokens, k: int) -> Tensor:
        x = F.normalize(tokens.x.float(), dim=-1)
        row = torch.arange(len(x), device=x.device)
        # All pairs at once is fastest, and no larger than the features where there are no more tokens than
        # channels; the choice must not depend on the batch, which would round differently.
        pairs = 1 - x @ x.transpose(1, 2) if tokens.n <= x.shape[2] else None  # (B, N, N)
        pick = _isolation(x, pairs).argmax(dim=1)  # (B,)
        picks, nearest = [pick], x.new_full(x.shape[:2], float("inf"))  # (B, N) distance to the nearest pick
        for _ in range(k - 1):
            single = 1 - (x @ x[row, pick][..., None])[..., 0] if pairs is None else pairs[row, pick]
            nearest = torch.minimum(nearest, single)  # (B, N)
            nearest[row, pick] = -float("inf")  # and stays so
            pick = nearest.argmax(dim=1)
            picks.append(pick)
        return torch.stack(picks, dim=1)  # (B, k)


def _isolation(x: Tensor, pairs: Tensor | None) -> Tensor:
    """Distance of each unit vector to its nearest neighbour: (B, N, D) -> (B, N). A few rows at a time: all
    pairs of an image of 10,000 tokens would be 400 MB."""
    batch, n, _ = x.shape
    found = []
    for rows in torch.arange(n, device=x.device).split(max(1, _PAIRS // (batch * n))):
        distance = 1 - x[:, rows] @ x.transpose(1, 2) if pairs is None else pairs[:, rows]  # (B, rows, N)
        distance[:, torch.arange(len(rows), device=x.device), rows] = float("inf")  # from itself
        found.append(distance.amin(dim=2))
    return torch.cat(found, dim=1)
