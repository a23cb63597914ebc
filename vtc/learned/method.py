"""What `vtc.compress()` makes of a module with weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..method import Method
from ..tokens import Reduction, Tokens
from .base import LearnedModule, Resampler
from .checkpoints import check_plan, is_module

LEVELS = "levels"  # of tokens.extras: features of further layers of the encoder (B, layers, N, D)


@dataclass(repr=False)
class FromModule(Method):
    """Tokens that a module makes of an image's features.

    epsilon     where not None, each image gets as many tokens as leave at most this error, `keep` at most, by
                the `halt` of the module
    confidence  how probably they do; None: as the module's configuration has it
    """

    module: Resampler = field()
    epsilon: float | None = None
    confidence: float | None = None

    positions = "repack"
    needs_grid = True

    def __post_init__(self) -> None:
        self.name, self.stages = self.module.name, self.module.stages
        self.before_projector = self.module.place != "behind"

    def count(self, tokens: Tokens, k: int) -> Tensor | None:
        if self.epsilon is None and self.confidence is None:
            return None
        found = self.module.halt(self._own(tokens.x), tokens.grid, self.epsilon, self.confidence)
        return found.lengths.clamp(max=k)

    def reduce(self, tokens: Tokens, k: int) -> Reduction:
        levels = self._own(tokens.extras[LEVELS]).unbind(1) if LEVELS in tokens.extras else ()
        reduction = self.module.reduction(self._own(tokens.x), tokens.grid, k, levels)
        return _moved(reduction, tokens.x.device)

    def _own(self, x: Tensor) -> Tensor:
        """Features on the device and in the dtype of the module, which may not be the host's."""
        weight = next(self.module.parameters(), None)
        return x if weight is None else x.to(weight.device, weight.dtype)

    @property
    def given(self) -> dict[str, Any]:
        """The options that are set."""
        options = {"epsilon": self.epsilon, "confidence": self.confidence}
        return {name: value for name, value in options.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.module.folder or self.name, "options": self.given}

    def check_plan(self) -> None:
        check_plan(self.module)

    def __repr__(self) -> str:
        told = [f"{name}={value}" for name, value in self.given.items()]
        told += [] if self.module.folder is None else [f"from {self.module.folder}"]
        return f"{self.name}({', '.join(told)})"


def _moved(reduction: Reduction, device: torch.device) -> Reduction:
    if reduction.index.device == device:
        return reduction
    values = {part.name: getattr(reduction, part.name) for part in fields(reduction)}
    return replace(reduction, **{name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)})


def method_of(module: nn.Module, options: dict[str, Any]) -> Method:
    """What `as_method` of a module makes with options. ValueError for those it does not have."""
    known = list(inspect.signature(module.as_method).parameters)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"'{getattr(module, 'name', type(module).__name__)}' has no option "
            f"{', '.join(map(repr, unknown))}; its options: {', '.join(known) or 'none'}"
        )
    return module.as_method(**options)


def load_module(name: str | Path) -> LearnedModule:
    """The module that was saved in a folder, or under a name on the Hub. ValueError where there is none."""
    if Path(name).is_dir() and not is_module(name):
        raise ValueError(
            f"the folder {name} holds no module that save_pretrained() wrote; `vtc methods` lists names"
        )
    return LearnedModule.from_pretrained(name)


def load_method(name: str | Path, options: dict[str, Any]) -> Method:
    """The method that the module saved there is; of one that replaces attention the module itself."""
    module = load_module(name)
    if hasattr(module, "as_stage") and not options:
        return module
    if not hasattr(module, "as_method"):
        raise ValueError(f"the module '{module.name}' in {name} is no method with options: leave them out")
    return method_of(module, options)
