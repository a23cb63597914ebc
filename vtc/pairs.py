"""Products of all pairs of tokens, where there are few enough of them to be held."""

import torch
from torch import Tensor

_WIDTH = 512  # channels in float32 at once: features of half precision are never copied whole
_PARTS = 4  # blocks of rows, of each of which only what is not left of the diagonal is multiplied


def products(x: Tensor, centred: bool = False) -> Tensor:
    """Of x (B, N, D), in float32: (B, N, N). `centred`: after the
    mean of the row's tokens is taken off, which leaves distances as they are and rounds less."""
    n = x.shape[1]
    every = torch.zeros(len(x), n, n, device=x.device)
    few = -(-n // _PARTS)
    for some in x.detach().split(_WIDTH, dim=2):
        some = some.float()
        if centred:
            some = some - some.mean(dim=1, keepdim=True)
        for first in range(0, n, few):
            every[:, first : first + few, first:].baddbmm_(
                some[:, first : first + few], some[:, first:].transpose(1, 2)
            )
    for first in range(few, n, few):
        every[:, first : first + few, :first] = every[:, :first, first : first + few].transpose(1, 2)
    return every
