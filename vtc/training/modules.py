"""The module that is to be trained, made for its host."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..learned import Resampler, build, from_pretrained, get_module
from ..learned.base import Grid
from .config import Config
from .features import Features, behind
from .objectives import NEEDED

CALIBRATED = 256  # pictures whose features say in which units a module works


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of features in front of the host's projector and behind it, and the grid of the first picture."""

    vision: int
    decoder: int
    grid: Grid


def widths(model: nn.Module, vision: dict[str, torch.Tensor]) -> Widths:
    """Measured; the grid is that of the first picture."""
    features = Features(model)
    try:
        inner, outer, grid = features.both(vision)[0]
    finally:
        features.remove()
    return Widths(inner.shape[-1], outer.shape[-1], grid)


def make_module(config: Config, found: Widths, model: nn.Module) -> Resampler:
    """Fresh, or out of a folder. Raises ValueError for one that a stage cannot train."""
    options = dict(config.module)
    if "from" in options:
        module = from_pretrained(options["from"])
    else:
        name = options.pop("name")
        cls = get_module(name)
        if not issubclass(cls, Resampler):
            raise ValueError(f"{name} makes no fewer tokens of an image: `vtc train` trains those that do")
        torch.manual_seed(config.seed)
        module = build(name, **_fitting(cls, found, model) | options)
    if not isinstance(module, Resampler):
        raise ValueError(f"{module.name} makes no fewer tokens of an image: `vtc train` trains those that do")
    for stage, own in zip(config.names(), config.stages):
        if (needed := NEEDED.get(own.kind)) and not hasattr(module, needed):
            raise ValueError(
                f"{module.name} has no {needed}, which stage {stage} makes small: leave that stage out"
            )
    if config.adapter is not None and module.adapter is None:
        module.adapt(model, **config.adapter)
    elif config.adapter is not None:  # one that was learned goes on being learned
        own = module.adapter.describe()
        if changed := [name for name, value in config.adapter.items() if value not in (None, own[name])]:
            raise ValueError(
                f"the module of {options['from']} has an adapter of another {' and '.join(changed)}, which "
                f"would be lost: its rank is {own['rank']} and its alpha {own['alpha']}; leave adapter out"
            )
    return module.requires_grad_(True)


def _fitting(cls: type[Resampler], found: Widths, model: nn.Module) -> dict[str, Any]:
    """The widths that a module's options have of its host."""
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    inner = found.decoder if behind(model, cls) else found.vision
    fitting = {"in_width": inner, "out_width": found.decoder}
    if "in_width" not in fields:
        fitting["width"] = inner
    return {name: value for name, value in fitting.items() if name in fields}


def calibrate(module: Resampler, model: nn.Module, vision: list[dict[str, torch.Tensor]]) -> None:
    """Units from the features of some pictures, where the module has them."""
    if not hasattr(module, "calibrate"):
        return
    features = Features(model, behind(model, module))
    try:
        found = [x.flatten(0, 1) for inputs in vision for x, _ in features(inputs)]
    finally:
        features.remove()
    module.calibrate(torch.cat(found))
