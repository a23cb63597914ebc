"""How the budget of an image is shared over its tiles, or that of a video over its frames."""

from __future__ import annotations

from .tokens import share


def proportional(k: int, sizes: list[int]) -> list[int]:
    """Each tile by its size: every frame of a video gets the same, every tile is reduced by itself."""
    return share(k, sizes)


def whole(k: int, sizes: list[int]) -> list[int]:
    """As many whole tiles as fit, spread evenly over their sequence; one more gets what is left.

    With `uniform` this is the temporal baseline of evenly spaced frames.
    """
    total, parts = sum(sizes), [0] * len(sizes)
    tiles = min(len(sizes), max(1, -(-k * len(sizes) // total)))  # how many get anything
    chosen = [(2 * i + 1) * len(sizes) // (2 * tiles) for i in range(tiles)]
    rest = [tile for tile in range(len(sizes)) if tile not in chosen]  # where tiles differ in size
    for tile in chosen + rest:
        parts[tile] = min(sizes[tile], k)
        k -= parts[tile]
    return parts


# "joint" is no split: all tiles are one row, and its method decides how many tokens each keeps.
ALLOCATIONS = {"proportional": proportional, "whole": whole, "joint": None}
