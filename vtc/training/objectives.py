"""Which kind of stage makes what small."""

from __future__ import annotations

from ..learned.base import LearnedModule
from ..learned.in_tower import ReplacedAttention
from .config import Stage
from .distill import AnswerLength, Distill
from .objective import Objective
from .on_features import Imitate, Length, OnFeatures

OBJECTIVES: dict[str, type[Objective]] = {"features": OnFeatures, "distill": Distill, "length": Length}
NEEDED = {"features": "training_loss", "length": "halting_loss"}  # of a module that makes fewer tokens


def objective_of(stage: Stage, module: LearnedModule) -> type[Objective]:
    if stage.kind == "features" and isinstance(module, ReplacedAttention):
        return Imitate
    return AnswerLength if stage.kind == "length" and stage.errors == "answers" else OBJECTIVES[stage.kind]


def check_kind(module: LearnedModule, stage: Stage, name: str) -> None:
    """Raises ValueError for a stage that has nothing of a module to make small."""
    needed = NEEDED.get(stage.kind)
    if needed and objective_of(stage, module) is not Imitate and not hasattr(module, needed):
        raise ValueError(
            f"{module.name} has no {needed}, which stage {name} makes small: leave that stage out"
        )
