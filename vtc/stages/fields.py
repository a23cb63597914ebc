"""Features as families return them - one tensor, or lists of tensors, with more for early decoder layers -
read as one matrix of all tokens and written back in the form they had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def items(value: Any) -> list[Tensor]:
    """What the field holds one entry for: an image, a tile, a frame, or all images in one matrix."""
    if _numbered(value):
        value = value[0][1]
    return [value] if isinstance(value, Tensor) and value.dim() == 2 else list(value)


def join(output: Any, key: str, deep: str | None) -> tuple[Tensor, int]:
    """All tokens (N, D + deep ones) and D. Features of the same token for deeper layers stand beside it, so
    that they are kept, averaged and dropped with it."""
    flat = [_flatten(value) for value in _values(output, key, deep)]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1), flat[0].shape[1]


def put(output: Any, key: str, deep: str | None, tokens: Tensor) -> None:
    """Writes tokens (N, D + deep ones) into the fields that `join` read."""
    values = _values(output, key, deep)
    parts = tokens.split([_width(value) for value in values], dim=1)
    main, *rest = [_like(value, part) for value, part in zip(values, parts)]
    old = output[key]
    output[key] = [(layer, new) for (layer, _), new in zip(old, [main, *rest])] if _numbered(old) else main
    if rest and deep is not None:
        old = output[deep]
        output[deep] = dict(zip(old, rest)) if isinstance(old, dict) else type(old)(rest)


def _values(output: Any, key: str, deep: str | None) -> list[Any]:
    """The features that are put into the prompt, then those for early decoder layers."""
    if _numbered(output[key]):
        return [features for _, features in output[key]]
    layers = None if deep is None else output[deep]
    if layers is None:
        return [output[key]]
    return [output[key], *(layers.values() if isinstance(layers, dict) else layers)]


def _numbered(value: Any) -> bool:
    """Whether it holds pairs of a decoder layer and the features for it, none being put into the prompt."""
    return isinstance(value, list) and isinstance(value[0], tuple) and isinstance(value[0][0], int)


def _flatten(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(-1, value.shape[-1])
    return torch.cat([_flatten(part) for part in value])


def _width(value: Any) -> int:
    return value.shape[-1] if isinstance(value, Tensor) else _width(value[0])


def _like(old: Any, flat: Tensor) -> Any:
    if isinstance(old, Tensor):
        return flat.view(*old.shape[:-1], flat.shape[-1])
    sizes = [part.shape[:-1].numel() for part in old]
    return type(old)([_like(part, piece) for part, piece in zip(old, flat.split(sizes))])
