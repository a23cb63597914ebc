"""The fewest tokens with which an image comes out well enough: by decoding it at several lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import Metric, error_of, sign_of
from .policies import CHUNK, Images, Policy, batches, check_number, least
from .sequence import TokenSequence

if TYPE_CHECKING:
    from .base import Tokenizer


@dataclass(frozen=True)
class TargetQuality(Policy):
    """The fewest tokens with which an image reaches a target; all of them where it never does.

    metric      "l1" or "mse" of values in [0, 1], "psnr" in dB, "wrong", the share of wrong pixels (see
                vtc.tokenizers.errors), or a function of images and what is left of them, (B, 3, H, W) twice
                to (B,), the lower the better
    target      the error at most; for PSNR, at least
    exhaustive  tries all lengths, from the shortest. Else a binary search, which takes the error to fall with
                the length, and log2 of the number of lengths decodes

    An image that has its length is not decoded again. For tokenizers of which a shorter code is no prefix of
    a longer one, images are encoded anew at every length that is tried.
    """

    name = "quality"
    knob = "target"
    metric: str | Metric = "l1"
    target: float | None = None
    exhaustive: bool = False

    def __post_init__(self) -> None:
        error_of(self.metric)
        if self.target is not None and not math.isfinite(check_number("target", self.target)):
            raise ValueError(f"target is a finite number, not {self.target!r}")

    def choose(self, tokenizer: Tokenizer, images: Tensor) -> Tensor:
        return self._search(Errors(tokenizer, images, self.metric), self._limit())

    def encode(self, tokenizer: Tokenizer, images: Tensor) -> TokenSequence:
        errors = Errors(tokenizer, images, self.metric)
        lengths = self._search(errors, self._limit())
        return tokenizer.encode(images, lengths) if errors.tokens is None else errors.tokens.truncate(lengths)

    @torch.no_grad()
    def calibrate(self, tokenizer: Tokenizer, images: Images, mean: float) -> TargetQuality:
        """The strictest target that keeps the mean length. Raises ValueError where none does."""
        given = [Errors(tokenizer, batch, self.metric) for batch in batches(images)]

        def kept(limit: float) -> Tensor:
            return torch.cat([self._search(errors, limit) for errors in given])

        ends = torch.cat([errors.ends() for errors in given])  # (N, 2)
        ends = ends.clamp(-1e3, 1e3)  # a picture may be perfect: infinite PSNR
        low, high = float(ends.min()) - 1e-6, float(ends.max()) + 1e-6
        shortest, longest = given[0].own[[0, -1]].tolist()
        for _ in range(20):  # errors that rise somewhere lie outside of those at the ends
            low -= (high - low) * (int(kept(low).min()) < longest)
            high += (high - low) * (int(kept(high).max()) > shortest)
        return replace(self, target=least(kept, low, high, mean) * sign_of(self.metric))

    def _limit(self) -> float:
        if self.target is None:
            raise ValueError(
                "a quality policy needs a target, or a mean budget that finds it: "
                "MeanBudget(mean, TargetQuality(metric)).calibrate(tokenizer, images)"
            )
        return self.target * sign_of(self.metric)

    def _search(self, errors: Errors, limit: float) -> Tensor:
        """(B,) the shortest length of each image with an error up to the limit."""
        search = _first if self.exhaustive else _bisected
        return errors.own[search(errors, limit)]


class Errors:
    """What is lost of each image of a batch at each length, decoded when it is asked for, and once."""

    def __init__(self, tokenizer: Tokenizer, images: Tensor, metric: str | Metric) -> None:
        self.tokenizer, self.images, self.error = tokenizer, images, error_of(metric)
        self.own = torch.tensor(list(tokenizer.lengths), device=images.device)  # (L,)
        self.tokens = tokenizer.encode(images) if tokenizer.prefix_stable else None
        shape = (len(images), len(self.own))
        self.table = torch.full(shape, torch.nan, dtype=torch.float64, device=images.device)

    @torch.no_grad()
    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The errors of images `rows` (R,) at the lengths of number `columns` (R,): (R,) float64."""
        new = self.table[rows, columns].isnan()
        if bool(new.any()):
            row, column = rows[new], columns[new]
            images, k = self.images[row], self.own[column]
            tokens = None if self.tokens is None else self.tokens[row].truncate(k)
            if tokens is None:
                tokens = self.tokenizer.encode(images, k)
            self.table[row, column] = self.error(images, self.tokenizer.decode(tokens))
        return self.table[rows, columns]

    def all(self) -> Tensor:
        """(B, L), the errors at every length."""
        rows = torch.arange(len(self.table), device=self.table.device)
        for column in range(self.table.shape[1]):
            self.at(rows, torch.full_like(rows, column))
        return self.table

    def ends(self) -> Tensor:
        """(B, 2), the errors at the shortest and the longest length."""
        rows = torch.arange(len(self.table), device=self.table.device)
        columns = (torch.zeros_like(rows), torch.full_like(rows, self.table.shape[1] - 1))
        return torch.stack([self.at(rows, column) for column in columns], 1)


def error_curves(tokenizer: Tokenizer, images: Images, metric: str | Metric = "l1") -> Tensor:
    """The errors of images at every length that the tokenizer has, by decoding them all: (B, L) float64."""
    given = images.split(CHUNK) if isinstance(images, Tensor) else images
    return torch.cat([Errors(tokenizer, batch, metric).all() for batch in given])


def _bisected(errors: Errors, limit: float) -> Tensor:
    """(B,) numbers of lengths, by binary search."""
    low = torch.zeros(len(errors.table), dtype=torch.long, device=errors.table.device)
    high = torch.full_like(low, errors.table.shape[1] - 1)
    while (open_ := (low < high).nonzero().flatten()).numel():
        middle = (low[open_] + high[open_]) // 2
        reached = errors.at(open_, middle) <= limit
        high[open_] = torch.where(reached, middle, high[open_])
        low[open_] = torch.where(reached, low[open_], middle + 1)
    return low


def _first(errors: Errors, limit: float) -> Tensor:
    """(B,) numbers of lengths, by trying all from the shortest."""
    last = errors.table.shape[1] - 1
    open_ = torch.arange(len(errors.table), device=errors.table.device)
    found = torch.full_like(open_, last)
    for column in range(last):
        reached = errors.at(open_, torch.full_like(open_, column)) <= limit
        found[open_[reached]] = column
        open_ = open_[~reached]
        if not open_.numel():
            break
    return found
