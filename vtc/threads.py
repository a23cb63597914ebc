"""Which forward is whose, where several threads run one model."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
_IN_GRAPH = 0  # the key in a compiled graph, which cannot ask for its thread


class ByThread(Generic[T]):
    """One value for the forward of each thread, or None.

    Where a part of a forward is compiled, what is stored in the graph is found outside of it, and the other
    way round.
    """

    def __init__(self):
        self._values: dict[int, T] = {}

    def set(self, value: T) -> None:
        self._values[_key()] = value

    def get(self) -> T | None:
        return self._values.get(self._found())

    def pop(self) -> T | None:
        return self._values.pop(self._found(), None)

    def clear(self) -> None:
        self._values.clear()

    def _found(self) -> int:
        key = _key()
        if key not in self._values and self._values:
            return threading.get_ident() if key == _IN_GRAPH else _IN_GRAPH
        return key


def _key() -> int:
    return _IN_GRAPH if torch.compiler.is_dynamo_compiling() else threading.get_ident()
