"""Which families of models are known, and where things are in them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .host import Host
from .structure import Encoder, find_blocks, prefix_length
from .table import HOSTS


@dataclass
class Vision:
    """A host found in a loaded model: the modules that carry vision tokens, in the order they are met."""

    host: Host
    base: nn.Module  # the model without its language head; owns get_image_features
    encoder: Encoder
    projector: nn.Module
    decoder: nn.Module


def find_host(model: nn.Module) -> Host:
    """The table entry of a model. Raises ValueError for a model of no known family."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for host in HOSTS:
        if model_type in host.model_types:
            return host
    known = ", ".join(list_hosts())
    raise ValueError(
        f"{type(model).__name__} (model_type {model_type!r}) is no known host: vtc compresses {known}; "
        "the README tells how to add one"
    )


def open_host(model: nn.Module) -> Vision:
    """Finds the vision modules of a model. Raises ValueError where the structure is not the family's."""
    host = find_host(model)
    base = model.base_model
    try:
        tower, projector = base.get_submodule(host.tower), base.get_submodule(host.projector)
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} has no {host.tower} or {host.projector}: {error}"
        ) from error
    tower_type = tower.config.model_type
    if tower_type not in host.tower_types:
        raise ValueError(
            f"{host.name} with a '{tower_type}' vision tower is not supported yet: "
            f"supported towers are {', '.join(host.tower_types)}"
        )
    encoder = Encoder(tower, find_blocks(tower), prefix_length(tower))
    return Vision(host, base, encoder, projector, base.get_decoder())


def list_hosts() -> list[str]:
    """The families `compress()` knows, by name."""
    return [host.name for host in HOSTS]
