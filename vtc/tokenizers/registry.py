"""Which tokenizers there are, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..named import Named, make_config
from .base import Tokenizer

_tokenizers: Named[type[Tokenizer]] = Named("tokenizer", f"{__package__}.systems")
register_tokenizer = _tokenizers.register


def list_tokenizers() -> list[str]:
    """The names of all systems, sorted."""
    return sorted(_tokenizers.all())


def get_tokenizer(name: str) -> type[Tokenizer]:
    """The class of that name. Raises ValueError for an unknown one."""
    return _tokenizers.get(name)


def from_pretrained(name: str | Path, *, revision: str | None = None, **options: Any) -> Tokenizer:
    """A tokenizer of whatever system lies there; see `Tokenizer.from_pretrained`."""
    return Tokenizer.from_pretrained(name, revision=revision, **options)


def build(name: str, **options: Any) -> Tokenizer:
    """A tokenizer of that system with random weights. Raises ValueError for an unknown name or option."""
    return (cls := get_tokenizer(name))(make_config(cls, options))
