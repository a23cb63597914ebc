"""Classes that are known by a name: methods, modules with weights, tokenizers."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from numbers import Integral, Real
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=type)


class Named(Generic[T]):
    """The classes of one kind, each of which registers itself when its file is imported.

    kind     what they are called in messages
    package  "vtc.methods": every file in it, and in folders of it, may register some
    """

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self._known: dict[str, T] = {}

    def register(self, cls: T) -> T:
        """Class decorator. Raises ValueError for a class without a name, or with one in use."""
        if not isinstance(getattr(cls, "name", None), str):
            raise ValueError(f"{cls.__name__} needs a name: name = '{cls.__name__.lower()}'")
        known = self._known.get(cls.name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a {self.kind} named '{cls.name}' exists already ({known.__module__})")
        self._known[cls.name] = cls
        return cls

    def all(self) -> dict[str, T]:
        package = importlib.import_module(self.package)
        for file in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            importlib.import_module(file.name)
        return self._known

    def get(self, name: str) -> T:
        """The class of that name. Raises ValueError for an unknown one."""
        known = self.all()
        if name in known:
            return known[name]
        near = [repr(each) for each in difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"there is no {self.kind} {name!r}; {hint}")


def make_config(cls: type, options: dict[str, Any]) -> Any:
    """A `cls.Config` from options as JSON has them: lists become tuples. Raises ValueError for an option that
    is unknown or of another type."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(cls.Config)}
    if unknown := sorted(set(options) - set(fields)):
        raise ValueError(
            f"{cls.name} has no option {', '.join(map(repr, unknown))}; it has {', '.join(sorted(fields))}"
        )
    for name, value in options.items():
        kind, told = _KINDS.get(fields[name], (None, ""))
        if kind and not (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
            raise ValueError(f"{name} of {cls.name} is {told}, not {value!r}")
    return cls.Config(**{name: _tuples(value) for name, value in options.items()})


_KINDS = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "a word"),
    "bool": (bool, "true or false"),
}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
