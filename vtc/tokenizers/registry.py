"""Which tokenizers there are, by name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from pathlib import Path
from typing import Any

from .base import Tokenizer

_registry: dict[str, type[Tokenizer]] = {}


def register_tokenizer(cls: type[Tokenizer]) -> type[Tokenizer]:
    """Class decorator that makes a tokenizer known by its `name`. Raises ValueError for one in use."""
    known = _registry.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"a tokenizer named '{cls.name}' exists already ({known.__module__})")
    _registry[cls.name] = cls
    return cls


def list_tokenizers() -> list[str]:
    """The names of all systems, sorted."""
    return sorted(_tokenizers())


def get_tokenizer(name: str) -> type[Tokenizer]:
    """The class of that name. Raises ValueError for an unknown one."""
    known = _tokenizers()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(sorted(known))}"
        )
        raise ValueError(f"there is no tokenizer {name!r}; {hint}")
    return known[name]


def from_pretrained(name: str | Path, *, revision: str | None = None, **options: Any) -> Tokenizer:
    """A tokenizer of whatever system lies there; see `Tokenizer.from_pretrained`."""
    return Tokenizer.from_pretrained(name, revision=revision, **options)


def build(name: str, **options: Any) -> Tokenizer:
    """A tokenizer of that system with random weights. Raises ValueError for an unknown name or option."""
    return (cls := get_tokenizer(name))(make_config(cls, options))


def make_config(cls: type[Tokenizer], options: dict[str, Any]) -> Any:
    """A configuration from options as JSON has them: lists become tuples. ValueError for unknown ones."""
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    unknown = sorted(set(options) - fields)
    if unknown:
        raise ValueError(
            f"{cls.name} has no option {', '.join(map(repr, unknown))}; it has {', '.join(sorted(fields))}"
        )
    return cls.Config(**{name: _tuples(value) for name, value in options.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _tokenizers() -> dict[str, type[Tokenizer]]:
    from . import systems  # every file of the folder that registers a tokenizer

    for module in pkgutil.iter_modules(systems.__path__):
        importlib.import_module(f"{systems.__name__}.{module.name}")
    return _registry
