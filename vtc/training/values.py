"""Values of a configuration: names that are known, and types as dataclasses declare them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any


def check_mapping(where: str, content: Any) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds names with values, not {content!r}")


def check_names(where: str, content: dict, known: Iterable[str], told: Iterable[str] = ()) -> None:
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), [*known], n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(told or known)}"
            raise ValueError(f"{where} has no {name!r}; {hint}")


_TYPES = {
    "int": (int, "a whole number"), "float": (float, "a number"), "str": (str, "a word"),
    "bool": (bool, "true or false"),
}  # fmt: skip


def made(cls: type, where: str, content: dict[str, Any], **ready: Any) -> Any:
    values = {}
    for own in dataclasses.fields(cls):
        if own.name in content and own.name not in ready:
            values[own.name] = checked(f"{where}{own.name}", str(own.type), content[own.name])
    return cls(**values, **ready)


def checked(where: str, annotation: str, value: Any) -> Any:
    """The value as its field has it. YAML takes 1e-3, without a point, for a word."""
    name, _, optional = annotation.partition(" | ")
    if value is None and optional:
        return None
    if annotation.startswith("tuple"):
        if not isinstance(value, (list, tuple)) or not all(type(part) is int and part > 0 for part in value):
            raise ValueError(f"{where} is a list of whole numbers from 1 on, not {value!r}")
        return tuple(value)
    if name not in _TYPES:
        return value
    kind, told = _TYPES[name]
    if kind is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{where} is a number, not {value!r}") from None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {told}, not {value!r}")
    return value
