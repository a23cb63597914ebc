"""Features as families return them - one tensor, or lists of tensors, with more for early decoder layers -
read as one matrix of all tokens and written back in the form they had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def items(value: Any) -> list[Tensor]:
    """What the field holds one entry for: an image, a tile, a frame, or all images in one matrix."""
    return [value] if isinstance(value, Tensor) and value.dim() == 2 else list(value)


def join(output: Any, key: str, deep: str | None) -> tuple[Tensor, int]:
    """All tokens (N, D + deep ones) and D. Features of the same token for deeper layers stand beside it, so
    that they are kept, averaged and dropped with it."""
    main = _flatten(output[key])
    return torch.cat([main, *map(_flatten, _layers(output, deep))], dim=1), main.shape[1]


def put(output: Any, key: str, deep: str | None, tokens: Tensor) -> None:
    """Writes tokens (N, D + deep ones) into the fields that `join` read."""
    layers = _layers(output, deep)
    widths = [_flatten(value).shape[1] for value in [output[key], *layers]]
    main, *rest = tokens.split(widths, dim=1)
    output[key] = _like(output[key], main)
    if layers:
        written = [_like(value, part) for value, part in zip(layers, rest)]
        old = output[deep]
        output[deep] = dict(zip(old, written)) if isinstance(old, dict) else type(old)(written)


def _layers(output: Any, deep: str | None) -> list[Any]:
    if deep is None or output[deep] is None:
        return []
    return list(output[deep].values()) if isinstance(output[deep], dict) else list(output[deep])


def _flatten(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(-1, value.shape[-1])
    return torch.cat([_flatten(part) for part in value])


def _like(old: Any, flat: Tensor) -> Any:
    if isinstance(old, Tensor):
        return flat.view(*old.shape[:-1], flat.shape[-1])
    sizes = [part.shape[:-1].numel() for part in old]
    return type(old)([_like(part, piece) for part, piece in zip(old, flat.split(sizes))])
