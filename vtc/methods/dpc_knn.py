"""DPC-kNN: density peaks become centres, each token joins the nearest (arXiv 2308.04657, from 2204.08680)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Merge, register
from ..tokens import Reduction, Tokens, gather

_PAIRS = 1 << 22  # distances held at once: 16 MiB


@register
@dataclass
class DPCKNN(Merge):
    """Merges tokens around k density peaks: tokens in a dense region, far from any denser one.

    neighbours  over how many nearest tokens, itself among them, density is measured

    Density is exp(-mean square distance to the neighbours), and a token's score is that times its distance
    to the nearest denser token. The densest is always a centre, as the largest distance there is, which the
    official code gives it, makes it too. Distances are divided by the root of the number of channels.
    Departures: of equally dense tokens the earlier counts as the denser, where the code adds noise, in
    inference too; scores are compared as logarithms, so that large features do not make them all 0; averages
    are weighted by size, where the code learns weights or takes equal ones.
    """

    name = "dpc-knn"
    paper = "arXiv:2308.04657"
    stages = ("encoder", "features")
    schedule = "staged"

    neighbours: int = 5

    def __post_init__(self):
        if self.neighbours != int(self.neighbours) or self.neighbours < 1:
            raise ValueError(f"neighbours must be a whole number of at least 1, not {self.neighbours!r}")

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        x = tokens.x.float()
        x = (x - x.mean(dim=1, keepdim=True)) / x.shape[2] ** 0.5  # distances are the same, rounding is less
        near = min(int(self.neighbours), tokens.n)
        density = -torch.cat(
            [squares.topk(near, largest=False).values.mean(2) for _, squares in _squares(x, x)], dim=1
        )  # (B, N) logarithms
        position = torch.arange(tokens.n, device=x.device)
        gaps = []
        for rows, squares in _squares(x, x):  # (B, rows, N)
            own = density[:, rows, None]
            denser = (density[:, None] > own) | ((density[:, None] == own) & (position < rows[:, None]))
            gaps.append(squares.masked_fill(~denser, torch.inf).amin(dim=2))
        score = density + 0.5 * torch.cat(gaps, dim=1).log()
        index = score.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values  # (B, k)
        slot = torch.cat([squares.argmin(dim=2) for _, squares in _squares(x, gather(x, index))], dim=1)
        slot = slot.scatter(1, index, position[:k].expand_as(index))  # a centre joins itself
        return Reduction(index, slot)


def _squares(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Square distances of x (B, N, D) to y (B, K, D), a few rows at a time: rows and (B, rows, K). What is
    below rounding is 0, so that equal tokens have none between them."""
    few = max(1, _PAIRS // (len(x) * y.shape[1]))
    lengths, across = (torch.linalg.vector_norm(v, dim=2).square() for v in (x, y))
    for rows in torch.arange(x.shape[1], device=x.device).split(few):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        sums = lengths[:, part, None] + across[:, None]
        squares = torch.baddbmm(sums, x[:, part], y.transpose(1, 2), alpha=-2)
        yield rows, torch.where(squares > 1e-6 * sums, squares, 0.0)
