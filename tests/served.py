"""Methods in a form that a host can serve."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

import vtc
from vtc.allocate import Allocation, get_allocation
from vtc.capture import inside, missing
from vtc.hosts import Vision, open_host
from vtc.method import Method
from vtc.stages.evidence import around
from vtc.stages.prompt import Prompt

# One method for each thing that a host can get wrong, together few enough for every host.
KINDS = (
    "divprune",  # reads features only, drops
    "tome",  # keys; merges
    "hiprune",  # attention of all rows, the grid
    "vtc-cls",  # attention of CLS
    "visionzip",  # sums in front of the projector; in an order of its own; with CLS or without
    "prumerge",  # soft sums, and a number of its own
    "slime",  # the prompt; the thumbnail first
    "globalcom2",  # budgets by tile, what the thumbnail says of the crops
)


def form(name: str, model: nn.Module, video: bool = False, **options: Any) -> tuple[Method, dict] | None:
    """The method and the settings with which this model can serve it; None where it cannot. Where there is no
    CLS token, those that may read something else instead do, and so do their allocations."""
    vision = open_host(model)
    encoder = vision.video_encoder if video else vision.encoder
    usual = vtc.get_method(name, **_known(vtc.get_method(name), options))
    if (usual.lowers_resolution and not encoder.resizable) or not _read(vision, usual):
        return None
    for signal in ({}, {"signal": "mean_attention"}):
        rule = dataclasses.replace(usual, **_known(usual, signal))
        allocation = get_allocation(rule.allocate)
        allocation = dataclasses.replace(allocation, **_known(allocation, signal))
        if not any(missing(encoder, need) for need in inside((*rule.needs, *allocation.needs))):
            return rule, {"allocate": allocation}
    return None


def forms(model: nn.Module, names: tuple[str, ...] = KINDS, video: bool = False, **options: Any):
    found = (form(name, model, video, **options) for name in names)
    return [each for each in found if each]


def _read(vision: Vision, rule: Method) -> bool:
    """Whether the prompt can be read here, where that is asked for."""
    try:
        return not around(rule.needs, "text") or bool(Prompt(vision))
    except ValueError:
        return False


def chooses(rule: Method) -> bool:
    """Whether it has a number of its own, so that `keep` is but the most."""
    return type(rule).count is not Method.count and getattr(rule, "adaptive", True)


def _known(rule: Method | Allocation, options: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(rule)}
    return {name: value for name, value in options.items() if name in fields}
