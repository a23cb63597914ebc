"""Budgets of a sweep beyond those of `compress()`: a method's own number, and a mean over a task's pictures.

"own"        as many tokens as the method itself chooses, without a cap
"mean:16"    the smallest sets of tokens that hold a fraction p of the scores, the same p for every picture,
             so that 16 stay on average; "mean:0.11" is the share of tokens that stay on average
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import nn

from ..api import compress
from ..cost import first_token
from ..method import Method
from ..tokens import Keep, check_keep
from .prompts import Batches, place

OWN, MEAN = "own", "mean:"
NO_CAP = 1 << 30
SAMPLE = 512  # pictures that a fraction is fitted to
NEAR = 0.25  # tokens by which a fitted mean may miss: half a token then holds for all pictures too
STEPS = 24


def check(keep: Keep) -> Keep:
    """Returns the budget as given, or raises in one sentence that says what a budget is."""
    if keep == OWN:
        return keep
    if isinstance(keep, str) and keep.startswith(MEAN):
        try:
            check_keep(_mean(keep))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"keep={keep!r} is no budget: 'mean:16' is a number of tokens, 'mean:0.11' a share"
            ) from error
        return keep
    return check_keep(keep)


def resolve(
    model: nn.Module, batches: Batches, method: str | Method, keep: Keep, options: dict[str, Any]
) -> Keep:
    """The budget that `compress()` takes in the place of one of a sweep."""
    if keep == OWN:
        return NO_CAP
    if isinstance(keep, str) and keep.startswith(MEAN):
        return f"p:{fraction(model, method, batches, _mean(keep), **options):.6g}"
    return keep


def fraction(
    model: nn.Module,
    method: str | Method,
    batches: Batches,
    mean: int | float,
    *,
    sample: int = SAMPLE,
    **options: Any,
) -> float:
    """The p with which `compress(keep=f"p:{p:.6g}")` keeps `mean` tokens of a picture on average.

    method   one with a score
    batches  pictures and questions; those in the first `sample` items are looked at
    mean     as `keep`: a float up to 1 is a share of the tokens, a whole number a number of tokens
    options  of the method, and what else `compress()` takes

    Where several tokens of many pictures have the same score, the mean may lie further off than a quarter of
    a token: what was kept is in the rows of a sweep.
    """
    check_keep(mean)
    low, high, p = 0.0, 1.0, 1.0
    looked = list(islice(batches, -(-sample // batches.size)))
    with compress(model, method, keep="p:1.0", **options) as handle:
        for _ in range(STEPS):
            p = (low + high) / 2
            handle.keep = f"p:{p:.6g}"
            kept, given, pictures = _kept(model, looked, handle)
            more = (kept - (mean * given if isinstance(mean, float) else mean * pictures)) / pictures
            if abs(more) <= NEAR:
                break
            low, high = (low, p) if more > 0 else (p, high)
    return p


@torch.no_grad()
def _kept(model: nn.Module, batches: list, handle: Any) -> tuple[int, int, int]:
    """Tokens that enter the language model, those there were, and how many pictures they are of."""
    records = []
    for batch in batches:
        if batch.items:
            first_token(model, place(batch.inputs, model))()
            records += handle.last
    if not records:
        raise ValueError("there is no picture in these batches")
    kept, given = (sum(record.entering[part] for record in records) for part in ("decoder", "features"))
    return kept, given, len(records)


def _mean(keep: str) -> int | float:
    text = keep.removeprefix(MEAN)
    return int(text) if text.isdigit() else float(text)
