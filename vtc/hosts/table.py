"""The families. A new one is an entry here and, where its geometry is new, a layout function."""

from __future__ import annotations

from .host import Host
from .llava import llava_layout
from .llava_next import llava_next_layout

HOSTS = (
    Host(
        name="llava",
        model_types=("llava",),
        tower_types=("clip_vision_model", "siglip_vision_model"),
        layout=llava_layout,
    ),
    Host(
        name="llava_next",
        model_types=("llava_next",),
        tower_types=("clip_vision_model", "siglip_vision_model"),
        layout=llava_next_layout,
        tiled=True,
    ),
)
