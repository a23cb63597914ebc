"""The baseline that needs no method: a picture of lower resolution."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Merge, register
from ..tokens import Reduction, Tokens


@register
@dataclass
class Downsample(Merge):
    """Shows the encoder the picture at a resolution of about k patches, so that it makes the tokens itself.

    The picture is shrunk (bicubic, antialiased) after the host's own processor; position embeddings are
    interpolated by the encoder. Where k is no product of rows and columns, the next larger grid is encoded
    and its surplus tokens are dropped evenly. A tile that was cut back to the image's shape may hold fewer
    tokens than its share of the budget; then some appear twice.
    """

    name = "downsample"
    needs_grid = True
    lowers_resolution = True

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        rows = [
            _of_row(cell, k) for cell in tokens.cell
        ]  # cell (B, N): the low-resolution token of each patch
        index, source = (torch.stack(parts) for parts in zip(*rows))
        # Every member of a group carries the same token: the one that gives the place stands for all.
        weight = torch.zeros_like(tokens.size).scatter(1, index, 1.0)
        return Reduction(index, source, weight)


def _of_row(cell: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """cell (N,) -> k places, ascending, and the slot of each patch (N,), -1 where its token is surplus."""
    order = cell.argsort(stable=True)
    count = cell.unique(return_counts=True)[1]
    middle = order[count.cumsum(0) - count + count // 2]  # (cells,) a patch of each
    even = (
        (2 * torch.arange(min(k, len(middle)), device=cell.device) + 1)
        * len(middle)
        // (2 * min(k, len(middle)))
    )
    index = middle[even]
    if len(index) < k:
        spare = torch.ones_like(cell, dtype=torch.bool).index_fill(0, index, False).nonzero()[:, 0]
        index = torch.cat([index, spare[: k - len(index)]])
    index = index.sort().values
    slots = torch.arange(k, device=cell.device)
    of_cell = torch.full((int(cell.max()) + 1,), -1, device=cell.device).index_copy(0, cell[index], slots)
    return index, of_cell[cell].index_copy(0, index, slots)
