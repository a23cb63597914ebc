"""Tiny random hosts built from configs: `build(name) -> (model, make_inputs)`. A file of this folder adds
its own by `@host(...)`; the contract runs over all of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .parts import CLIP, IMAGE, LLAMA, PAD, SIGLIP, SUPPRESS, TEXT, VIDEO, VOCAB, Inputs, MakeInputs  # noqa: F401


@dataclass(frozen=True)
class Tiny:
    """family   the entry of vtc's table it stands for
    video    make_inputs(videos=...) works
    films    the pictures of its make_inputs are videos
    works    False where compress() must refuse it
    memory   its images are not in the prompt: it has tests of its own
    blurred  a token is made of more patches than those behind it, by convolution or interpolation
    lacks    what the bare model cannot do: "static", "chunked", "beams", "uncached", "chats",
             "rows" that do not depend on each other, "mixed" images and videos, a "cache" that
             forward() makes by itself, being cast to "half" precision after it was built, "gradients" for the
             encoder
    """

    build: Callable[[], tuple[nn.Module, MakeInputs]]
    family: str
    video: bool = False
    films: bool = False
    works: bool = True
    memory: bool = False
    blurred: bool = False
    lacks: tuple[str, ...] = ()


HOSTS: dict[str, Tiny] = {}


def host(name: str, family: str | None = None, **facts):
    """Decorator of a function () -> (model, make_inputs). `family` is `name` where None; facts as in Tiny."""

    def add(function):
        assert name not in HOSTS
        HOSTS[name] = Tiny(function, family or name, **facts)
        return function

    return add


def build(name: str, seed: int = 0) -> tuple[nn.Module, MakeInputs]:
    torch.manual_seed(seed)
    return HOSTS[name].build()


for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")
