"""Tokens at the places that they take, for decoders that always have all places."""

from __future__ import annotations

from torch import Tensor


def at_places(tokens: Tensor, valid: Tensor, index: Tensor, blank: Tensor, places: int) -> Tensor:
    """Tokens (B, k, d) at their places `index` (B, k), what is blank everywhere else: (B, places, d).

    valid: (B, k), True for the tokens that are there. blank: (d,), or what is broadcast to it.
    """
    b, _, d = tokens.shape
    index = index.masked_fill(~valid, places)  # padding goes behind the last place, and is cut off
    every = blank.to(tokens).expand(b, places + 1, d)
    return every.scatter(1, index[..., None].expand_as(tokens), tokens)[:, :-1]
