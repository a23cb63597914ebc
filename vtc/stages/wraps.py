"""Methods of one model instance, wrapped so that a stage sees what goes through them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn

from ..hosts import Vision, features_owner

_PREPARE = "prepare_inputs_for_generation"


class Wraps:
    """What stands around a model's methods that make features, and around what generate() prepares.

    mark  the attribute of the base model in which its stage is found: a deep copy finds its own there
    """

    def __init__(self, vision: Vision, mark: str):
        self.vision, self.mark = vision, mark
        self._put: list[tuple[nn.Module, str, Any, Any]] = []  # owner, name, function, what was there before

    def install(self, stage: Any, names: Iterable[str]) -> dict[str, Any]:
        """From now on `stage.features` is called in the place of the methods of these names, and
        `stage.note_mask` is told the caller's mask. Returns the functions of those methods."""
        base, model = self.vision.base, self.vision.model
        setattr(base, self.mark, stage)
        originals = {name: getattr(base, name).__func__ for name in names}
        for name, original in originals.items():
            self.wrap(base, name, _features(self.mark, name, original))
        if hasattr(model, _PREPARE) and _PREPARE not in vars(model):
            self.wrap(model, _PREPARE, _noting(self.mark, getattr(model, _PREPARE).__func__))
        return originals

    def remove(self) -> None:
        delattr(self.vision.base, self.mark)
        for owner, name, function, before in self._put:
            if getattr(vars(owner).get(name), "__func__", None) is function:  # else wrapped once more
                delattr(owner, name)
                if before is not None:
                    setattr(owner, name, before)
        self._put.clear()

    def wrap(self, owner: nn.Module, name: str, function: Any) -> None:
        """Puts a function in the place of a method of one module, until remove()."""
        self._put.append((owner, name, function, vars(owner).get(name)))
        setattr(owner, name, MethodType(function, owner))


def _features(mark: str, name: str, original: Any) -> Any:
    @functools.wraps(original)  # generate() reads the signature
    def get_features(base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stage = getattr(base, mark, None)
        return stage.features(name, base, *args, **kwargs) if stage else original(base, *args, **kwargs)

    return get_features


def _noting(mark: str, original: Any) -> Any:
    @functools.wraps(original)
    def prepare_inputs_for_generation(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = original(model, *args, **kwargs)
        if stage := getattr(features_owner(model), mark, None):
            stage.note_mask(kwargs.get("attention_mask"), inputs)
        return inputs

    return prepare_inputs_for_generation
