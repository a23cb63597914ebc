"""The model's own methods that make features of images and videos, and what is captured while they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..allocate import Allocation, Proportional, get_allocation
from ..capture import Capture, inside, missing
from ..hosts import Vision
from ..hosts.host import LayoutFunction
from ..method import Method


@dataclass
class Source:
    """One of the model's methods that make features."""

    layout: LayoutFunction
    capture: Capture
    original: Any = None


def sources_of(vision: Vision, method: Method, allocate: Allocation) -> dict[str, Source]:
    """Raises ValueError where an encoder cannot serve what the method or the allocation needs."""
    sources = {}
    shares = bool(vision.host.tiled or vision.host.video)
    if not shares and allocate not in (Proportional(), get_allocation(method.allocate)):
        raise ValueError(
            f"allocate='{allocate.name}' shares a budget over tiles or frames, but to {vision.host.name} "
            "each of them is an image of its own: leave it out"
        )
    encoders = (vision.encoder, vision.video_encoder) if shares else ()
    for encoder in encoders:
        if any(missing(encoder, need) for need in inside(method.needs)):
            break  # that is told below
        for need in inside(allocate.needs):
            if reason := missing(encoder, need):
                raise ValueError(f"allocate='{allocate.name}' needs {reason}: use allocate='proportional'")
    needs, signal = (*method.needs, *(allocate.needs if shares else ())), hasattr(method, "signal")
    if vision.host.layout:
        capture = Capture(vision.encoder, needs, method.name, signal)
        sources["get_image_features"] = Source(vision.host.layout, capture)
    if vision.host.video:
        same = sources and vision.video_encoder is vision.encoder
        capture = capture if same else Capture(vision.video_encoder, needs, method.name, signal)
        sources["get_video_features"] = Source(vision.host.video, capture)
    return sources
