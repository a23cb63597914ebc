"""DPC-kNN: density peaks become centres, each token joins the nearest (arXiv 2308.04657, from 2204.08680)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Merge, register
from ..pairs import products
from ..tokens import Reduction, Tokens, gather

_PAIRS = 1 << 23  # distances held at once of each row: 32 MiB
_SAME = 1e-6  # of the squares of two tokens: a distance that is less is rounding


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
        near, position = min(int(self.neighbours), tokens.n), torch.arange(tokens.n, device=tokens.x.device)
        squares = _Squares(tokens.x)
        density = -torch.cat(
            [some.topk(near, largest=False).values.mean(2) for _, some in squares.rows()], dim=1
        )  # (B, N) logarithms
        gaps = []
        for rows, some in squares.rows():  # (B, rows, N)
            own = density[:, rows, None]
            denser = (density[:, None] > own) | ((density[:, None] == own) & (position < rows[:, None]))
            gaps.append(torch.where(denser, some, torch.inf).amin(dim=2))
        score = density + 0.5 * torch.cat(gaps, dim=1).log()
        index = score.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values  # (B, k)
        slot = torch.cat([some.argmin(dim=2) for _, some in squares.rows(index)], dim=1)
        slot = slot.scatter(1, index, position[:k].expand_as(index))  # a centre joins itself
        return Reduction(index, slot)


class _Squares:
    """Square distances of the tokens x (B, N, D), divided by D. What is below rounding is 0, so that equal
    tokens have none between them. All are held where they are few; that must not depend on the batch, which
    would round differently."""

    def __init__(self, x: Tensor):
        self.n, self._width, self._all = x.shape[1], x.shape[2], None
        if self.n**2 <= _PAIRS:
            product = products(x, centred=True)  # (B, N, N)
            self._length = product.diagonal(dim1=1, dim2=2).clone()  # (B, N) squares of lengths
            self._all = self._square(product, self._length, self._length)
        else:
            x = x.float()
            self._x = x - x.mean(dim=1, keepdim=True)  # distances are the same, rounding is less
            self._length = torch.linalg.vector_norm(self._x, dim=2).square()

    def rows(self, others: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Of a few tokens at a time, to all or to those at `others` (B, K): which they are, and their squares
        (B, rows, N or K), to be read."""
        every = torch.arange(self.n, device=self._length.device)
        if self._all is not None:
            yield every, self._all if others is None else gather(self._all, others).transpose(1, 2)
            return
        y, length = self._x, self._length
        if others is not None:
            y, length = gather(y, others), length.gather(1, others)
        for rows in every.split(max(1, _PAIRS // y.shape[1])):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            yield rows, self._square(self._x[:, part] @ y.transpose(1, 2), self._length[:, part], length)

    def _square(self, product: Tensor, lengths: Tensor, others: Tensor) -> Tensor:
        sums = lengths[..., None] + others[:, None]
        square = torch.sub(sums, product, alpha=2)
        return torch.where(square > _SAME * sums, square, 0.0).div_(self._width)
