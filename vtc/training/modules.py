"""The module that is to be trained, made for its host."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..hosts import open_host
from ..learned import Resampler, build, from_pretrained, get_module
from ..learned.base import Grid, LearnedModule
from ..learned.in_tower import ReplacedAttention, replacements
from ..learned.staged import Staged
from .config import Config
from .features import Features, behind
from .objectives import check_kind

LOOKED_AT = 256  # pictures whose features a module starts from

TRAINED = (Resampler, ReplacedAttention)


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


def make_module(config: Config, found: Widths, model: nn.Module) -> LearnedModule:
    """Fresh, or out of a folder. Raises ValueError for one that a stage cannot train."""
    options = dict(config.module)
    module = from_pretrained(options["from"]) if "from" in options else _fresh(config, found, model)
    if not isinstance(module, TRAINED):
        raise ValueError(
            f"'{module.name}' is no module that `vtc train` trains: those make fewer tokens of an image, or "
            "are 'replaced-attention'"
        )
    for stage, own in zip(config.names(), config.stages):
        check_kind(module, own, stage)
    if config.adapter is not None and module.adapter is None:
        module.adapt(model, **config.adapter)
    elif config.adapter is not None:  # one that was learned goes on being learned
        own = module.adapter.describe()
        if changed := [name for name, value in config.adapter.items() if value not in (None, own[name])]:
            raise ValueError(
                f"the module of {options['from']} has an adapter of another {' and '.join(changed)}, which "
                f"would be lost: its rank is {own['rank']} and its alpha {own['alpha']}; leave adapter out"
            )
    return module.float().requires_grad_(True)


def _fresh(config: Config, found: Widths, model: nn.Module) -> LearnedModule:
    options = dict(config.module)
    cls = get_module(options.pop("name"))
    torch.manual_seed(config.seed)
    if cls is Staged:
        each = options.get("options", [{}])
        options["options"] = [{"in_width": found.vision, **own} for own in each]
    if cls is not ReplacedAttention:
        fitting = _fitting(cls, found, model) if issubclass(cls, TRAINED) else {}
        return build(cls.name, **fitting | options)
    if "replacement" not in options:
        raise ValueError(f"module has no 'replacement': {', '.join(replacements())}")
    return ReplacedAttention.for_host(model, **options)


def _fitting(cls: type[Resampler], found: Widths, model: nn.Module) -> dict[str, Any]:
    """The widths that a module's options have of its host."""
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    inner = found.decoder if behind(model, cls) else found.vision
    fitting = {"in_width": inner, "out_width": found.decoder}
    if "in_width" not in fields:
        fitting["width"] = inner
    return {name: value for name, value in fitting.items() if name in fields}


def begin(module: Resampler, model: nn.Module, vision: list[dict[str, torch.Tensor]]) -> None:
    """What a fresh module takes from the features of some pictures, and from the host's projector."""
    if type(module).begin is Resampler.begin:  # nothing
        return
    features = Features(model, behind(model, module))
    try:
        found = [pair for inputs in vision for pair in features(inputs)]
    finally:
        features.remove()
    module.begin([(x.float(), grid) for x, grid in found], open_host(model).projector)
