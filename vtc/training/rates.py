"""Learning how many tokens DiffRate removes in each block, on a user's own data (arXiv 2305.17997)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..api import current, unwrap
from ..hosts import is_vlm
from ..hosts.trunk import Trunk, open_trunk
from ..methods.diffrate import DiffRate
from ..schedule import Budget, Schedule, check_budget, check_schedule
from ..taps import refusal
from .rate_learner import Learner

_NEAR = 0.05  # of all operations: how far from what was wanted goes without a warning


def learn_rates(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    keep: Budget,
    schedule: Schedule = "constant",
    epochs: int = 3,
    granularity: int = 4,
    lr: float = 0.01,
    weight: float = 100.0,
) -> tuple[DiffRate, list[int]]:
    """Finds how a budget is best spent over the blocks of an encoder: what `vtc.compress(model, method,
    keep=keep)` takes. The weights of the model stay as they are, and so does its mode, train() or eval().

    model        a vision transformer with a CLS token, as `compress()` takes it, not compressed now
    batches      what `loss` is called with, to be gone through `epochs` times; pictures all of one size
    loss         (model, batch) -> what to make small, by one call of the model
    keep         the budget; with `schedule` it says how many operations the blocks may have, namely as many
                 as with `compress(model, "diffrate", keep=keep, schedule=schedule)`
    granularity  the counts to choose from are all patches less 0, 1, 2, ... times this
    lr           of AdamW, falling to a tenth of it by a cosine over the epochs. The official 0.01 is for
                 thousands of batches: give more for fewer
    weight       of the squared difference in operations, as a share of those of the bare blocks. The official
                 5, with billions of operations, is 106 on DeiT-S

    Each block but the first has two distributions over counts: how many tokens pruning leaves, and merging.
    Their means, rounded up, are the counts. While learning, a removed token is masked in the attention of
    later blocks with its probability as straight-through gradient, so that a batch computes what it would
    with tokens really removed, and learns what others would have given. Departures: operations are shares,
    not billions, and counted with the block's own matrices; similarities are not negative, as in the method,
    which replaces the official clamping of sizes.

    Raises ValueError for a model without CLS or that cannot be reduced, for pictures of several sizes and
    batches that can be gone through only once, RuntimeError for a model that is compressed. Warns where the
    schedule learned is more than 5 % of all operations away from what was wanted.
    """
    if epochs < 1 or granularity < 1:
        raise ValueError(f"epochs and granularity are at least 1, not {epochs} and {granularity}")
    inner = unwrap(model)
    if current(inner) is not None:
        raise RuntimeError(f"this {type(inner).__name__} is compressed: call vtc.restore(model) first")
    learner = Learner(_trunk(inner), check_budget(keep), check_schedule(schedule), granularity)
    optimizer = None
    with learner.installed(), _frozen(inner), torch.enable_grad():
        for epoch in range(epochs):
            batch = None
            for batch in batches:
                value = loss(model, batch) + weight * (learner.share() - learner.wanted).square()
                if optimizer is None:
                    optimizer = torch.optim.AdamW(learner.logits(), lr, weight_decay=0)
                optimizer.param_groups[0]["lr"] = lr * (0.55 + 0.45 * math.cos(math.pi * epoch / epochs))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            if batch is None:
                raise ValueError(
                    f"there are no batches in epoch {epoch + 1} of {epochs}: give a list or a loader"
                )
        share = float(learner.share().detach())
    if abs(share - learner.wanted) > _NEAR:
        warnings.warn(
            f"the schedule learned has {share:.0%} of the bare blocks' operations, {learner.wanted:.0%} were "
            "wanted: give more epochs or a larger lr or weight",
            stacklevel=2,
        )
    return DiffRate(prune=learner.pruned()), learner.kept()


def _trunk(model: nn.Module) -> Trunk:
    if is_vlm(model):
        raise ValueError(
            f"rates are learned on a vision transformer by itself, not in {type(model).__name__}"
        )
    trunk = open_trunk(model)
    if not trunk.has_cls:
        raise ValueError(f"DiffRate needs a CLS token, which {trunk.name} has not")
    if reason := refusal(trunk.blocks[0].attention):
        raise ValueError(f"rates cannot be learned in {trunk.name}: that needs {reason}")
    return trunk


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in asking:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)
