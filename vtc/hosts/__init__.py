"""Which families of models are known, and where things are in them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .host import Host
from .refused import REFUSED
from .structure import Encoder
from .table import HOSTS


@dataclass
class Vision:
    """A host found in a loaded model: the modules that carry vision tokens, in the order they are met.

    video_encoder is the image encoder itself except where a family has one of its own for videos. projector
    is None where the tower holds it. base, the model without its language head, owns get_image_features;
    decoder reads the prompt, and reader, where there is one, what an encoder made of the prompt.
    """

    host: Host
    model: nn.Module
    base: nn.Module
    encoder: Encoder
    video_encoder: Encoder
    projector: nn.Module | None
    decoder: nn.Module
    reader: nn.Module | None = None

    @property
    def mrope(self) -> bool:
        """Whether positions have several components, which cannot be counted anew. The config may not tell:
        most of these families know their sections without it."""
        return hasattr(self.base, "get_rope_index")


def find_host(model: nn.Module) -> Host:
    """The table entry of a model. Raises ValueError for a model of no known family."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for host in HOSTS:
        if model_type in host.model_types:
            return host
    if model_type in REFUSED:
        raise ValueError(f"{type(model).__name__} cannot be compressed: {REFUSED[model_type]}")
    raise ValueError(
        f"{type(model).__name__} (model_type {model_type!r}) is no known host: `vtc hosts` lists the "
        f"{len(HOSTS)} families that vtc compresses; the README tells how to add one"
    )


def is_vlm(model: nn.Module) -> bool:
    """Whether a model is a vision-language model that is known, or known to be refused."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return model_type in REFUSED or any(model_type in host.model_types for host in HOSTS)


def open_host(model: nn.Module) -> Vision:
    """Finds the vision modules of a model. Raises ValueError where the structure is not the family's."""
    host = find_host(model)
    try:
        base = features_owner(model)
        reader = model.base_model.get_submodule(host.reader) if host.reader else None
        tower = base.get_submodule(host.tower)
        video_tower = base.get_submodule(host.video_tower or host.tower)
        projector = base.get_submodule(host.projector) if host.projector else None
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} is not built as {host.name} models are: {error}") from error
    encoder = Encoder.of(tower, host)
    same = video_tower is tower
    video_encoder = encoder if same else Encoder.of(video_tower, host)
    decoder = _layers_owner(base.get_decoder())
    return Vision(host, model, base, encoder, video_encoder, projector, decoder, reader)


def features_owner(model: nn.Module) -> nn.Module:
    """The module whose get_image_features the model calls; of a model of no known family its base."""
    base, config = getattr(model, "base_model", model), getattr(model, "config", None)
    known = (host.base for host in HOSTS if getattr(config, "model_type", None) in host.model_types)
    return base.get_submodule(next(known, ""))


def _layers_owner(decoder: nn.Module) -> nn.Module:
    """The stack of layers, also where a family holds it with its language head, or where it is compiled."""
    decoder = getattr(decoder, "_orig_mod", decoder)
    while not hasattr(decoder, "layers") and isinstance(getattr(decoder, "model", None), nn.Module):
        decoder = decoder.model
    return decoder


def list_hosts() -> list[str]:
    """The families `compress()` knows, by name."""
    return [host.name for host in HOSTS]
