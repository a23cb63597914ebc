"""How many questions of the validation data a host answers rightly with the tokens of a module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..api import compress
from ..evaluation.prompts import Batches
from ..evaluation.runner import ask
from ..evaluation.tasks import Item, Task, load_task
from ..learned.base import LearnedModule
from .config import Data
from .pictures import load_pictures

SPREAD = 6  # numbers of tokens that are tried where none are asked for


def validation(processor: Any, data: Data) -> Batches | None:
    """Batches of the validation data, None where there is none."""
    name = data.validation
    if name is None:
        return None
    if name == "scenes":
        task = load_task(name, data.n_validation, data.validation_split)
    else:
        pictures = load_pictures(name, None, "", Path(data.cache), data.skip_broken)
        items = [
            Item(question, answer, "all", picture.open, picture.where)
            for picture in pictures
            for question, answer in picture.questions
        ]
        task = Task(name, items[: data.n_validation])
    return Batches(processor, task, 64)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    module: LearnedModule,
    batches: Batches,
    keeps: dict[str, Any],
    where: dict[str, Any],
) -> dict[str, float]:
    """The share of right answers of the host ("full"), and with the module by the names of budgets. where:
    what else `compress` is told."""
    module.eval()
    found = {"full": _share(model, batches)}
    with compress(model, module, keep=next(iter(keeps.values())), **where) as handle:
        for name, keep in keeps.items():
            handle.keep = keep
            found[name] = _share(model, batches)
    return found


def _share(model: nn.Module, batches: Batches) -> float:
    row = ask(model, batches).row()
    return round(row["accuracy"], 4)


def spread(possible: Sequence[int] | Sequence[None]) -> list[int] | list[None]:
    """A few of the numbers, from the least to the most, in even ratios."""
    if len(possible) <= SPREAD:
        return [*possible]
    ratio = possible[-1] / possible[0]
    near = [possible[0] * ratio ** (step / (SPREAD - 1)) for step in range(SPREAD)]
    return sorted({min(possible, key=lambda k: abs(k - wanted)) for wanted in near})
