"""Tokens drawn at random, with all that a method says it needs: `drawn(method)`."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.method import Method
from vtc.tokens import Tokens

DEPTH, HEADS, WORDS = 24, 2, 5
LOGITS = ("cls_logits",)  # the one row of the tower that no softmax has seen
# What becomes of random numbers (B, ..., N, D) that are drawn for tokens. Attention is their softmax over N.
CASES = {
    "random": lambda x: x,
    "constant": torch.ones_like,
    "zeros": torch.zeros_like,  # of attention, too: it underflows
    "duplicates": lambda x: x[..., torch.arange(x.shape[-2]) % max(1, x.shape[-2] // 6), :],
    "halves": lambda x: x[..., (torch.arange(x.shape[-2]) >= x.shape[-2] // 2).long() * (x.shape[-2] - 1), :],
    "opposites": lambda x: x[..., :1, :] * (1 - 2 * (torch.arange(x.shape[-2]) % 2))[:, None],
    "one stands out": lambda x: torch.ones_like(x).index_fill(-2, torch.tensor([x.shape[-2] // 2]), 50.0),
    "half zeros": lambda x: x * (torch.arange(x.shape[-2]) % 2)[:, None],
    "large": lambda x: 1e4 * x,
    "small": lambda x: 1e-20 * x,  # squares are zero in float32
}


def drawn(
    method: Method,
    case: str = "random",
    batch: int = 3,
    grid: tuple[int, int] = (6, 8),
    width: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tokens:
    """A batch of one structure, with the extras of `method.needs` as the features stage makes them.

    Features, keys and words have `dtype`, what a softmax made is float32 in any model.
    """
    n, generator = grid[0] * grid[1], torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        """(B, ..., N, D)"""
        return CASES[case](torch.randn(batch, *shape, generator=generator))

    def extra(kind: str, layers: int) -> Tensor:
        if kind in ("keys", "all_keys"):
            return draw(layers, n, width if kind == "keys" else HEADS * width).to(dtype)
        if kind == "vision":
            return draw(n, 2 * width).to(dtype)
        if kind == "attention":
            return draw(layers, HEADS, n, n).softmax(dim=-1)
        rows = draw(layers, n, 1)[..., 0]
        if kind in LOGITS:
            return rows
        return torch.zeros_like(rows) if case == "zeros" else rows.softmax(dim=-1)

    tokens = Tokens(draw(n, width).to(dtype), grid, lot=torch.arange(batch))
    tokens.thumbnail = torch.arange(batch) == 1
    for need in method.needs:
        if need.kind != "text":
            tokens.extras[need.name] = extra(need.kind, len(need.resolve(DEPTH)) if need.layers else 0)
    if any(need.kind == "text" for need in method.needs):
        tokens.extras |= words(draw(WORDS, width).to(dtype))
    if method.lowers_resolution:
        tokens.extras["cell"] = (torch.arange(n) // 2).expand(batch, -1)
    return tokens


def words(text: Tensor) -> dict[str, Tensor]:
    """Prompts of different lengths, padded with zeros, each with two words in front of its image; where none
    is behind it, all count. text (B, T, D)"""
    batch, most, _ = text.shape
    real = torch.arange(most) < most - torch.arange(batch)[:, None] % most  # (B, T)
    after = real & (torch.arange(most) >= 2)
    after = torch.where(after.any(dim=1, keepdim=True), after, real)
    return {"text": text * real[..., None], "text_mask": real, "text_after": after}


def part(tokens: Tokens, rows: Tensor) -> Tokens:
    """Some rows of a batch."""
    fields = {name: getattr(tokens, name)[rows] for name in ("x", "size", "group", "thumbnail", "lot")}
    extras = {name: extra[rows] for name, extra in tokens.extras.items()}
    return Tokens(grid=tokens.grid, extras=extras, **fields)


def cast(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    """The same numbers, as another type."""
    extras = {n: x.to(dtype) if x.is_floating_point() else x for n, x in tokens.extras.items()}
    return Tokens(tokens.x.to(dtype), tokens.grid, thumbnail=tokens.thumbnail, lot=tokens.lot, extras=extras)
