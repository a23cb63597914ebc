"""Which modules there are, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..named import Named, make_config

if TYPE_CHECKING:
    from .base import LearnedModule

_modules: Named[type[LearnedModule]] = Named("module", __package__)
register_module = _modules.register


def list_modules() -> list[str]:
    """The names of all modules, sorted."""
    return sorted(_modules.all())


def get_module(name: str) -> type[LearnedModule]:
    """The class of that name. Raises ValueError for an unknown one."""
    return _modules.get(name)


def build(name: str, **options: Any) -> LearnedModule:
    """A module with fresh weights. Raises ValueError for an unknown name or option."""
    return (cls := get_module(name))(make_config(cls, options))
