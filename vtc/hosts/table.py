"""The families. A new one is an entry here and, where its geometry is new, a layout function."""

from __future__ import annotations

import importlib
import importlib.util

from .host import Host
from .llava_next import llava_next_layout
from .raster import raster_layout

HOSTS = (
    Host("llava", ("llava",), raster_layout, resizable=True),
    Host("llava_next", ("llava_next",), llava_next_layout, tiled=True, resizable=True),
)

# Families of transformers that take images and cannot be served: model_type -> why, and what to do.
REFUSED: dict[str, str] = {}

for letter in "abcd":
    name = f"{__package__}.families_{letter}"
    if importlib.util.find_spec(name):
        part = importlib.import_module(name)
        HOSTS += part.FAMILIES
        REFUSED |= part.REFUSED
