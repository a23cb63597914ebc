"""Features of pictures as a module in a host is given them, without running the language model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..api import compress
from ..evaluation.prompts import place
from ..hosts import features_owner, find_host, open_host
from ..learned import Resampler
from ..learned.base import Grid
from ..method import Need, Select
from ..stages.fields import join
from ..stages.projection import token_by_token
from ..tokens import Tokens


@dataclass
class Probe(Select):
    """Notes what tokens are made of, and what they are: (R, N, D'), (R, N, D), of each call and grid.

    projected: False where no projector is between the two
    """

    projected: bool = True
    found: list[tuple[Tensor, Tensor, Grid]] = field(default_factory=list, repr=False)

    name = "probe"
    stages = ("features",)

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("vision"),) if self.projected else ()

    def select(self, tokens: Tokens, k: int) -> Tensor:
        self.found.append((tokens.vision if self.projected else tokens.x, tokens.x, tokens.grid))
        return torch.arange(k, device=tokens.x.device).expand(len(tokens.x), -1)


def behind(model: nn.Module, module: Resampler | type[Resampler]) -> bool:
    """Whether a module works behind the projector of a host: those in front of it do, too, where it does not
    work token by token."""
    if module.place == "before":
        vision = open_host(model)
        alone = vision.projector is not None and token_by_token(vision.projector)
        return not (vision.host.late or (alone and not vision.host.memory))
    return module.place == "behind"


class Features:
    """The features of a host in front of its projector, until `remove()`; behind it where `behind`."""

    def __init__(self, model: nn.Module, behind: bool = False):
        self.model, self.behind = model, behind
        host = find_host(model)
        self.probe = Probe(projected=not (host.late or host.memory))
        self.handle = compress(model, self.probe, keep=1)

    def remove(self) -> None:
        self.handle.remove()

    @torch.no_grad()
    def __call__(self, vision: dict[str, Tensor]) -> list[tuple[Tensor, Grid]]:
        """Of pictures as the host's processor makes them: (R, N, D) and the grid of N, for each grid among
        pictures, tiles and frames."""
        return [(found[self.behind], found[2]) for found in self.both(vision)]

    @torch.no_grad()
    def both(self, vision: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Grid]]:
        """In front of the projector and behind it."""
        self.probe.found.clear()
        image_features(self.model, vision)
        found = [*self.probe.found]
        self.probe.found.clear()
        return found


def image_features(model: nn.Module, vision: dict[str, Tensor]) -> Any:
    """What `get_image_features` of a host gives for pictures as its processor makes them."""
    owner = features_owner(model)
    names = inspect.signature(owner.get_image_features).parameters
    given = {name: value for name, value in place(vision, model).items() if name in names}
    return owner.get_image_features(**given, return_dict=True)


def told_to_decoder(model: nn.Module, vision: dict[str, Tensor]) -> Tensor:
    """Features of all pictures behind the host's projector, with those for early decoder layers beside them,
    float32: (M, D)."""
    host = find_host(model)
    return join(image_features(model, vision), host.features, host.deep)[0].float()
