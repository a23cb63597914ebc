"""Modules with weights in results: what rows call them, and what they can make of a task's pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..cost import first_token, recording
from ..method import get_method, is_saved, list_methods
from .prompts import Batches, place

if TYPE_CHECKING:
    from ..learned.base import Grid, LearnedModule

TRAINING = "train.json"  # what a training writes beside the weights
DIGITS = 8


@dataclasses.dataclass(frozen=True)
class Card:
    """What is told of a module.

    name        of the module and a digest of its options and weights: "ordered@1a2b3c4d"
    parameters  how many numbers it has, those of its adapter of the language model among them
    adapter     how many of them are its adapter's
    minutes     of training, where its folder says so
    """

    name: str
    parameters: int
    adapter: int = 0
    minutes: float | None = None


def is_module(method: str) -> bool:
    """Whether the name of a method is that of a module: a folder, or a name on the Hugging Face Hub."""
    return method not in list_methods() and is_saved(method)


def load(method: str) -> LearnedModule:
    """The module that a method's name stands for. Raises ValueError or OSError where there is none."""
    return get_method(method).module


def card(method: str) -> Card:
    """Raises ValueError or OSError where the name is of no module."""
    return _card(method, _stamp(Path(method)))


@lru_cache(maxsize=64)
def _card(method: str, stamp: tuple[int, ...]) -> Card:
    from ..tokenizers.manifest import weights_digest

    module = load(method)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(module.config), sort_keys=True).encode())
    digest.update(weights_digest(module).encode())
    name = f"{module.name}@{digest.hexdigest()[:DIGITS]}"
    adapter = 0 if module.adapter is None else _size(module.adapter)
    return Card(name, _size(module), adapter, minutes(Path(method)))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _stamp(folder: Path) -> tuple[int, ...]:
    """Another one where a file of the folder was written anew."""
    return tuple(file.stat().st_mtime_ns for file in sorted(folder.glob("*"))) if folder.is_dir() else ()


def minutes(folder: Path) -> float | None:
    """How long a module was trained; None where its folder does not say so."""
    try:
        told = json.loads((folder / TRAINING).read_text())
        return sum(stage["minutes"] for stage in told["stages"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def described(method: str) -> dict[str, Any]:
    """What a row says of a module: `method` is its name, `folder` where it is."""
    found = card(method)
    told = dataclasses.asdict(found)
    return {"method": told.pop("name"), "folder": method, **told}


def folders(pattern: str, root: Path) -> list[str]:
    """The folders below root that hold a module that makes tokens, as in "models/tiny-llava-*"."""
    from ..learned import Resampler, get_module

    found = []
    for path in sorted(root.glob(f"{pattern}/config.json")):
        name = json.loads(path.read_text()).get("module")
        if name is not None and issubclass(get_module(name), Resampler):
            found.append(path.parent.relative_to(root).as_posix())
    return found


def grid_of(model: nn.Module, batches: Batches) -> Grid | None:
    """The grid of the first picture; None where a picture is several rectangles of tokens, whose budgets
    differ."""
    with recording(model) as handle:
        first_token(model, place(batches.first().inputs, model))()
        tiles = handle.last[0].tiles
    return tiles[0].grid if len(tiles) == 1 else None
