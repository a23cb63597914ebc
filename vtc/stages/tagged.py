"""Features of images that say whether they hold marked rows, as long as anything of them is passed on."""

from __future__ import annotations

from typing import Any

TAG = "_vtc_dropped"  # on the class of what get_image_features returned: whether it holds marked rows

_subclasses: dict[tuple[type, bool], type] = {}


def tagged(cls: type, dropped: bool) -> type:
    """A subclass that says so; of features that it cuts into chunks, generate() keeps the class only."""
    if (cls, dropped) not in _subclasses:

        def reduce(output: Any) -> tuple:
            _, args, *rest = cls.__reduce__(output)
            return _rebuild, (cls, dropped, args), *rest

        _subclasses[cls, dropped] = type(cls.__name__, (cls,), {TAG: dropped, "__reduce__": reduce})
    return _subclasses[cls, dropped]


def _rebuild(cls: type, dropped: bool, args: tuple) -> Any:
    """For pickle, which cannot name the subclass."""
    return tagged(cls, dropped)(*args)
