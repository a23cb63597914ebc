"""Which items were answered right, as text short enough for a row of results."""

from __future__ import annotations

from collections.abc import Iterable


def pack(right: Iterable[bool]) -> str:
    """Four answers to each hexadecimal digit, the first answer in a digit's highest bit."""
    bits = "".join("1" if answer else "0" for answer in right)
    return "".join(f"{int(bits[start : start + 4].ljust(4, '0'), 2):x}" for start in range(0, len(bits), 4))


def unpack(text: str, n: int) -> list[bool]:
    """The first n answers of what pack() wrote."""
    return [bit == "1" for digit in text for bit in f"{int(digit, 16):04b}"][:n]
