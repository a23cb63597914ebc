"""A vision tower that looks at each picture once in a step, however often its host is run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class SharedTower:
    """Stands around one tower's forward until `remove()`. The tower rests: nothing learns through it.

    While `sharing()`, a call with what an earlier one was given returns what that one did, and of a batch in
    which pictures stand several times in a row each is looked at once.
    """

    def __init__(self, tower: nn.Module):
        self.tower = tower
        self.calls = self.rows = 0  # of the tower itself
        self._known: list[tuple[tuple, dict, Any]] | None = None
        self._before = vars(tower).get("forward")
        original = tower.forward

        def forward(own: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._forward(original, args, kwargs)

        self._function = forward
        tower.forward = MethodType(forward, tower)

    def remove(self) -> None:
        if getattr(vars(self.tower).get("forward"), "__func__", None) is self._function:
            del self.tower.forward
            if self._before is not None:
                self.tower.forward = self._before

    @contextmanager
    def sharing(self) -> Iterator[None]:
        self._known = []
        try:
            yield
        finally:
            self._known = None

    def _forward(self, original: Any, args: tuple, kwargs: dict) -> Any:
        if self._known is None:
            return original(*args, **kwargs)
        for known_args, known_kwargs, output in self._known:
            if _same(args, known_args) and _same(kwargs, known_kwargs):
                return _copied(output)
        with torch.no_grad():
            output = self._run(original, args, kwargs)
        self._known.append((args, kwargs, output))
        return _copied(output)

    def _run(self, original: Any, args: tuple, kwargs: dict) -> Any:
        self.calls += 1
        pixels = args[0] if args else kwargs.get("pixel_values")
        others = [*args[1:], *(value for name, value in kwargs.items() if name != "pixel_values")]
        single = isinstance(pixels, Tensor) and pixels.dim() == 4
        if single and not any(isinstance(other, Tensor) for other in others):
            new = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
            new[1:] = (pixels[1:] != pixels[:-1]).flatten(1).any(1)
            if not bool(new.all()):
                once = pixels[new]
                own = ((once, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": once})
                self.rows += len(once)
                return _repeated(original(*own[0], **own[1]), new.long().cumsum(0) - 1, len(once))
        self.rows += len(pixels) if isinstance(pixels, Tensor) else 0
        return original(*args, **kwargs)


def _copied(output: Any) -> Any:
    """Hosts put their features into the output object that they were given."""
    return type(output)(**output) if isinstance(output, dict) else copy.copy(output)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def _repeated(output: Any, index: Tensor, rows: int) -> Any:
    """Every tensor of an output whose first dimension is the pictures', with the rows repeated."""
    if isinstance(output, Tensor):
        return output[index] if output.dim() and len(output) == rows else output
    if isinstance(output, dict):  # transformers' output objects are
        for name, value in list(output.items()):
            output[name] = _repeated(value, index, rows)
        return output
    if isinstance(output, (list, tuple)):
        return type(output)(_repeated(part, index, rows) for part in output)
    return output
