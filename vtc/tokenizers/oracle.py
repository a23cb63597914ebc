"""What a length policy could reach at best, and by chance: for evaluation only."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import Metric
from .policies import Policy, check_number, round_up
from .quality import TargetQuality, error_curves

if TYPE_CHECKING:
    from .base import Tokenizer


@dataclass(frozen=True)
class Oracle(Policy):
    """Lengths from the errors of the images at all lengths the tokenizer has: an upper bound of policies.

    metric  as of TargetQuality
    target  each image gets the fewest tokens with which it reaches the target, all where it never does; or
    mean    the images of the call share `mean` tokens for each so that the sum of their errors is least

    With a mean an image's length depends on the other images: give all of a set in one call.
    """

    name = "oracle"
    evaluation_only = True
    metric: str | Metric = "l1"
    target: float | None = None
    mean: float | None = None

    def __post_init__(self) -> None:
        if (self.target is None) == (self.mean is None):
            raise ValueError("an oracle takes a target or a mean, one of the two")
        TargetQuality(self.metric, self.target)
        if self.mean is not None and not 1 <= check_number("mean", self.mean) < math.inf:
            raise ValueError(f"mean is a number of tokens of 1 or more, not {self.mean!r}")

    @torch.no_grad()
    def choose(self, tokenizer: Tokenizer, images: Tensor) -> Tensor:
        if self.mean is None:
            return TargetQuality(self.metric, self.target, exhaustive=True).choose(tokenizer, images)
        errors = error_curves(tokenizer, images, self.metric)
        return allocate(errors, tokenizer.lengths, self.mean).to(images.device)


@dataclass(frozen=True)
class Shuffled(Policy):
    """The lengths that a policy chooses, dealt to the images of the call at random.

    What the policy gains over this is what it gains by telling images apart, since the histogram of lengths
    is the same. Give all of a set in one call.
    """

    name = "shuffled"
    evaluation_only = True
    policy: Policy
    seed: int = 0

    @torch.no_grad()
    def choose(self, tokenizer: Tokenizer, images: Tensor) -> Tensor:
        lengths = round_up(tokenizer, self.policy.choose(tokenizer, images))
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(self.seed))
        return lengths[order.to(lengths.device)]


def allocate(errors: Tensor, lengths: Sequence[int], mean: float) -> Tensor:
    """Lengths of N images, `mean` each at most on average, with the least sum of errors: (N,) int64.

    errors (N, L) at each of the lengths, ascending. All images begin with the shortest, and the change that
    takes off most error for each token it adds comes first: along the lower convex hull of each image's
    errors. So the sum is the least possible where the budget ends on such a change, and elsewhere farther
    from it by no more than the first change that did not fit takes off. No image gets tokens that make it
    worse.

    Raises ValueError for a mean below the shortest length, and for errors that are not finite.
    """
    if not bool(errors.isfinite().all()):
        raise ValueError(
            "lengths are allocated by finite errors: use mse or l1 where a picture may be perfect"
        )
    curves, left = errors.double().cpu(), math.floor((mean - lengths[0]) * len(errors) + 1e-6)
    if left < 0:
        raise ValueError(f"a mean of {mean:g} tokens is below the shortest length, {lengths[0]}")
    own = torch.tensor(list(lengths))
    at = [0] * len(curves)  # the number of each image's length

    def best(row: int) -> tuple[float, int, int] | None:
        """What an image's best affordable change takes off for each token, negated; the image; where to."""
        here = at[row]
        cost = own[here + 1 :] - own[here]
        rate = (curves[row, here] - curves[row, here + 1 :]) / cost
        rate = rate[cost <= left]
        if not len(rate) or float(rate.max()) <= 0:
            return None
        return -float(rate.max()), row, here + 1 + int(rate.argmax())

    changes = [change for row in range(len(curves)) if (change := best(row))]
    heapq.heapify(changes)
    while changes:
        _, row, to = heapq.heappop(changes)
        cost = int(own[to] - own[at[row]])
        if cost <= left:
            at[row], left = to, left - cost
        if change := best(row):
            heapq.heappush(changes, change)
    return own[torch.tensor(at, dtype=torch.long)]
