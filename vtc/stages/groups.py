"""Which kept token a dropped one went into, and how many each stands for, on the way to the decoder.

It travels with the features, in the row of NaN that a dropped token is: digits behind the NaN say how many
tokens of its image further its group stands. So it stays right when generate() repeats features for beams or
cuts them into chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Columns of a dropped row: NaN, a sign that no number was changed on the way, and digits which bfloat16
# holds exactly, of the distance to its group. 0 is a token without a group, as newline tokens are.
_SIGN, _BASE, _DIGITS = 85.0, 128, 3
_ZERO = _BASE**_DIGITS // 2
_COLUMNS = 2 + _DIGITS
_WEIGHTS = [_BASE**digit for digit in range(_DIGITS)]


def write_groups(marked: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """Features of an image (n, D), rows of NaN where dropped, with the way from each to its group written
    into them. index (K,) and source (n,) as in a Record."""
    place = torch.arange(len(source), device=source.device)
    way = torch.where(source < 0, 0, index[source.clamp_min(0)] - place + _ZERO)[:, None]  # (n, 1)
    weights = torch.tensor(_WEIGHTS, device=source.device)
    signed = torch.cat([torch.full_like(way, int(_SIGN)), way // weights % _BASE], dim=1)  # (n, 1 + digits)
    rows = torch.cat([marked[:, :1], signed.to(marked.dtype), marked[:, _COLUMNS:]], dim=1)
    return torch.where(marked[:, :1].isnan(), rows, marked)


def read_sizes(x: Tensor, dropped: Tensor, images: Tensor) -> Tensor:
    """How many tokens each place of the prompt x (B, L, D) stands for, from the dropped rows: (B, L), int.

    images (B, L): which places are image tokens, dropped ones among them.
    """
    if bool((dropped & ~images).any()) or bool((x[dropped][:, 1] != _SIGN).any()):
        raise RuntimeError(
            "sizes of merged tokens did not come through this model's own code, which changed the features "
            "or put them elsewhere: compress with merge='nearest'"
        )
    weights = torch.tensor(_WEIGHTS, device=x.device)
    digits = x[..., 2:_COLUMNS].detach().float().masked_fill(~dropped[..., None], 0)
    way = (digits.long() * weights).sum(dim=2)  # (B, L)
    member = way > 0
    rank = images.long().cumsum(dim=1) - 1 + way - _ZERO  # of its group among the image tokens of the row
    out = (rank < 0) | (rank >= images.sum(dim=1, keepdim=True))
    if bool((member & out).any()):
        raise ValueError(
            "a group of merged tokens lies in two chunks of the prompt: leave prefill_chunk_size out, or "
            "compress with merge='nearest'"
        )
    order = (~images).long().argsort(dim=1, stable=True)  # (B, L) places of image tokens first, in order
    place = order.gather(1, torch.where(member, rank, 0))
    return torch.ones_like(way).scatter_add(1, place, member.long())


@dataclass
class Groups:
    """What biases are made of, for keys of the decoder: (B, n) each.

    size      how many tokens a key stands for
    even      the same in the first layer: what the groups of a prompt are on average
    position  where it stands
    """

    size: Tensor
    even: Tensor
    position: Tensor

    @classmethod
    def of(cls, size: Tensor, images: Tensor, position: Tensor) -> Groups:
        """images (B, n): which keys are an image's, merged or not."""
        count = images.sum(dim=1, keepdim=True).clamp_min(1)
        mean = (size * images).sum(dim=1, keepdim=True) / count  # (B, 1)
        return cls(size, torch.where(images, mean, 1.0), position)

    @classmethod
    def none(cls, like: Tensor) -> Groups:
        """Of no keys, for rows of `like` (B, ...)."""
        size = torch.ones(len(like), 0, dtype=torch.long, device=like.device)
        return cls(size, size.float(), size)

    def map(self, move: Callable[[Tensor], Tensor]) -> Groups:
        return Groups(move(self.size), move(self.even), move(self.position))

    def followed_by(self, new: Groups) -> Groups:
        parts = (self.size, new.size), (self.even, new.even), (self.position, new.position)
        return Groups(*(torch.cat(pair, dim=1) for pair in parts))

    def followed_by_text(self, positions: Tensor) -> Groups:
        """With what stands behind them: text, of which the last columns of positions (B, n) are."""
        new = positions[:, self.size.shape[1] :]
        size = torch.ones_like(new)
        return self.followed_by(Groups(size, size.float(), new))

    def padded(self, n: int) -> Groups:
        """To the length of a cache with places to spare."""
        return self.map(lambda part: F.pad(part, (0, n - part.shape[1]), value=1))
