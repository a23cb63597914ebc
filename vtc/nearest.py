"""Which kept token each other one is most like."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import gather

_PAIRS = 1 << 22  # similarities held at once of each row: 16 MiB


def nearest(x: Tensor, index: Tensor) -> Tensor:
    """The position of the most cosine-similar token among those at index (B, K): x (B, N, D) -> (B, N).

    A kept token is its own. Of equally similar ones it is the first in the row; a token of zeros is like any.
    `Reduction.merge(index, nearest(x, index))` makes groups of it.
    """
    index = index.sort(dim=1).values
    kept = F.normalize(gather(x, index).float(), dim=-1).transpose(1, 2)  # (B, D, K)
    few = max(1, _PAIRS // index.shape[1])  # never of the batch: products of another shape round differently
    slot = torch.cat([(part.float() @ kept).argmax(dim=2) for part in x.split(few, dim=1)], dim=1)  # (B, N)
    return index.gather(1, slot).scatter(1, index, index)
