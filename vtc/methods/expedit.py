"""Expedit: soft clusters in the middle of the encoder, the full grid again behind it (arXiv 2210.01035)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import low_grid
from ..method import Merge, register
from ..tokens import Reduction, Tokens


@register
@dataclass
class Expedit(Merge):
    """Clusters the grid of patches softly into a coarse one and spreads it over the patches again at the end.

    Clusters start as the means of an adaptive-average-pooling grid; a patch belongs to the nearby clusters
    with the softmax of minus the squared distance. Behind the encoder each patch is a mixture of the clusters
    that were most like it. For dense prediction, without training.

    iterations   how often patches are assigned and clusters averaged; 0 is average pooling
    window       how many cells of the coarse grid, in rows and in columns around its own one, a patch may
                 belong to: odd
    temperature  multiplies the squared distances: the larger, the harder the clusters. The scale of the
                 model's features decides what is large; the papers' models have 0.005 to 0.1
    neighbours   how many clusters a patch is put together from again
    norm         "l1": their weights have a sum of one; "l2": a sum of squares of one, as in the official
                 code, whose features come out up to sqrt(neighbours) times as long

    Every k is met exactly: by rows times columns where a product gives cells no longer than twice their
    width, else by bands of rows of which some have a column less, spread evenly; the window then counts the
    columns of the cell's own band. Departures: a cluster that no patch is near to stays where it was, where
    the official code makes it zero; where k is the number of tokens, all of them stay as they are. The hard
    assignment, for drawings, gives the middle patch of each cell to its own cluster, so that none is empty.
    """

    name = "expedit"
    paper = "arXiv:2210.01035"
    stages = ("encoder",)
    schedule = "once"
    after_block = True
    needs_grid = True
    whole_grid = True

    iterations: int = 5
    window: int = 5
    temperature: float = 0.01
    neighbours: int = 20
    norm: str = "l1"

    def __post_init__(self):
        if self.iterations != int(self.iterations) or self.iterations < 0:
            raise ValueError(f"iterations is a whole number >= 0, not {self.iterations!r}")
        if self.window != int(self.window) or self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window is an odd whole number >= 1, not {self.window!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is a number > 0, not {self.temperature!r}")
        if self.neighbours != int(self.neighbours) or self.neighbours < 1:
            raise ValueError(f"neighbours is a whole number >= 1, not {self.neighbours!r}")
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"norm must be 'l1' or 'l2', not {self.norm!r}")

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        batch, n = tokens.size.shape
        if n != tokens.grid[0] * tokens.grid[1]:
            raise ValueError(
                f"'expedit' clusters the full grid of {tokens.grid[0]} x {tokens.grid[1]} patches and "
                f"{n} tokens are left of it: put it before methods that reduce, and in one block only"
            )
        if k == n:
            return Reduction.select(torch.arange(n, device=tokens.x.device).expand(batch, n), n)
        x = tokens.x.float()
        pool, away, middle = _cells(tokens.grid, k, x.device)
        mix, belongs = pool.expand(batch, k, n), (away == 0).float().expand(batch, k, n)  # (B, K, N) each
        distance = _distances(mix @ x, x)
        for _ in range(int(self.iterations)):
            near = -self.temperature * distance
            belongs = near.masked_fill(away > self.window // 2, -math.inf).softmax(dim=1)
            total = belongs.sum(dim=2, keepdim=True)  # (B, K, 1)
            mix = torch.where(total > 1e-16, belongs / total.clamp_min(1e-16), mix)
            distance = _distances(mix @ x, x)
        size = (belongs * tokens.size.float()[:, None]).sum(2)  # (B, K)
        index, slots = middle.expand(batch, k), torch.arange(k, device=x.device).expand(batch, k)
        source = distance.argmin(dim=1).scatter(1, index, slots)  # (B, N)
        return Reduction(index, source, size=size, mix=mix, spread=self._spread(distance))

    def _spread(self, distance: Tensor) -> Tensor:
        """How much of each cluster a patch is: (B, K, N) -> (B, N, K)."""
        closeness = -self.temperature * distance.transpose(1, 2)
        least = closeness.topk(min(int(self.neighbours), closeness.shape[2]), dim=2).values[..., -1:]
        weight = closeness.masked_fill(closeness < least, -math.inf).softmax(dim=2)
        return weight if self.norm == "l1" else F.normalize(weight, dim=2)


def _distances(centroids: Tensor, x: Tensor) -> Tensor:
    """Squared distances of (B, K, D) to (B, N, D): (B, K, N)."""
    square = centroids.square().sum(2)[:, :, None] + x.square().sum(2)[:, None, :]
    return (square - 2 * centroids @ x.transpose(1, 2)).clamp_min(0)


def _shape(grid: tuple[int, int], k: int) -> int:
    """How many bands of rows k cells are laid out in."""
    rows, cols = grid
    longer = {h: abs(math.log(rows / h * (k // h) / cols)) for h in range(1, min(rows, k) + 1) if k % h == 0}
    regular = [h for h, twist in longer.items() if k // h <= cols and twist <= math.log(2) + 1e-9]
    return min(regular, key=longer.__getitem__) if regular else low_grid(grid, k)[0]


def _cells(grid: tuple[int, int], k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of k cells: the average that each begins with (k, N), how many cells away each patch is (k, N), and the
    patch in its middle (k,). The windows of averages overlap where cells do not divide the grid, as those of
    adaptive_avg_pool2d do."""
    rows, cols = grid
    bands = _shape(grid, k)
    edge = torch.arange(bands + 1, device=device) * k // bands  # first cell of each band
    band = torch.arange(bands, device=device).repeat_interleave(edge.diff())  # (k,)
    column, width = torch.arange(k, device=device) - edge[band], edge.diff()[band]  # (k,) each
    in_rows, rows_away, row = _cut(rows, band, torch.full_like(band, bands))
    in_cols, cols_away, col = _cut(cols, column, width)
    pool = (in_rows[:, :, None] * in_cols[:, None]).flatten(1)  # (k, rows * cols)
    away = torch.maximum(rows_away[:, :, None], cols_away[:, None]).flatten(1)
    return pool, away, row * cols + col


def _cut(length: int, part: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A side of the grid cut into `parts` (k,), seen from `part` (k,) of them: the average over that (k,
    length), how many parts away each place is (k, length), and the middle place (k,)."""
    place = torch.arange(length, device=part.device)
    start, stop = part * length // parts, -(-(part + 1) * length // parts)
    inside = (place >= start[:, None]) & (place < stop[:, None])
    away = (place * parts[:, None] // length - part[:, None]).abs()
    first = -(-part * length // parts)  # of the places that are in this part only
    return inside / inside.sum(1, keepdim=True), away, (first + stop - 1) // 2
