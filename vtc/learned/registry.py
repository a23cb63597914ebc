"""Which modules there are, by name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import LearnedModule

_registry: dict[str, type[LearnedModule]] = {}


def register_module(cls: type[LearnedModule]) -> type[LearnedModule]:
    """Class decorator that makes a module known by its `name`. Raises ValueError for one in use."""
    known = _registry.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"a module named '{cls.name}' exists already ({known.__module__})")
    _registry[cls.name] = cls
    return cls


def list_modules() -> list[str]:
    """The names of all modules, sorted."""
    return sorted(_modules())


def get_module(name: str) -> type[LearnedModule]:
    """The class of that name. Raises ValueError for an unknown one."""
    known = _modules()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(sorted(known))}"
        )
        raise ValueError(f"there is no module {name!r}; {hint}")
    return known[name]


def build(name: str, **options: Any) -> LearnedModule:
    """A module with fresh weights. Raises ValueError for an unknown name or option."""
    return (cls := get_module(name))(make_config(cls, options))


def make_config(cls: type[LearnedModule], options: dict[str, Any]) -> Any:
    """A configuration from options as JSON has them: lists become tuples. ValueError for unknown ones."""
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    unknown = sorted(set(options) - fields)
    if unknown:
        raise ValueError(
            f"{cls.name} has no option {', '.join(map(repr, unknown))}; it has {', '.join(sorted(fields))}"
        )
    for field in dataclasses.fields(cls.Config):
        kinds = _KINDS.get(str(field.type))
        if kinds and field.name in options and not _is(options[field.name], kinds):
            told = _TOLD[str(field.type)]
            raise ValueError(f"{field.name} of {cls.name} is {told}, not {options[field.name]!r}")
    return cls.Config(**{name: _tuples(value) for name, value in options.items()})


_KINDS = {"int": Integral, "float": Real, "str": str, "bool": bool}
_TOLD = {"int": "a whole number", "float": "a number", "str": "a word", "bool": "true or false"}


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _modules() -> dict[str, type[LearnedModule]]:
    package = importlib.import_module(__package__)
    for file in pkgutil.walk_packages(package.__path__, f"{__package__}."):  # every file may register one
        importlib.import_module(file.name)
    return _registry
