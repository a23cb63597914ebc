"""Pictures without objects, from a plain ramp to a mosaic of many cells: what tokenizers are trained on
beside
scenes. `texture(split, index)` depends on nothing but its arguments."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .scenes import SIDE, SPLITS

KINDS = ("ramp", "waves", "checks", "rings", "cells", "blobs")


def texture(split: str, index: int) -> Image.Image:
    """The texture number `index` of "train", "validation" or "test": 96x96, RGB. The kinds take turns."""
    rng = np.random.default_rng([20241122, SPLITS[split], index])
    kind = KINDS[index % len(KINDS)]
    weight = _WEIGHTS[kind](rng)  # (96, 96) of numbers in [0, 1], or of cell numbers
    if kind == "cells":
        canvas = rng.uniform(20, 235, (int(weight.max()) + 1, 3))[weight.astype(int)]
    else:
        first, second = rng.uniform(20, 235, (2, 3))
        canvas = first + (second - first) * weight[..., None]
    canvas += rng.normal(0, 2, (SIDE, SIDE, 1))
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _plane(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along a random direction and across it, 0 in the middle, in pixels."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    angle = rng.uniform(0, np.pi)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _ramp(rng: np.random.Generator) -> np.ndarray:
    along, _ = _plane(rng)
    return (along / SIDE * rng.uniform(0.3, 1) + 0.5).clip(0, 1)


def _waves(rng: np.random.Generator) -> np.ndarray:
    total = np.zeros((SIDE, SIDE))
    waves = int(rng.integers(1, 4))
    for _ in range(waves):
        total += np.sin(_plane(rng)[0] * rng.uniform(0.08, 0.6) + rng.uniform(0, 6))
    return total / (2 * waves) + 0.5


def _checks(rng: np.random.Generator) -> np.ndarray:
    step = rng.uniform(0.1, 0.5)
    along, across = _plane(rng)
    return (np.sin(along * step + rng.uniform(0, 6)) * np.sin(across * step + rng.uniform(0, 6)) > 0) * 1.0


def _rings(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    radius = np.hypot(x - rng.uniform(0, SIDE), y - rng.uniform(0, SIDE))
    return np.sin(radius * rng.uniform(0.1, 0.5) + rng.uniform(0, 6)) / 2 + 0.5


def _cells(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    centres = rng.uniform(0, SIDE, (int(rng.integers(2, 13)), 2, 1, 1))
    return np.hypot(x - centres[:, 0], y - centres[:, 1]).argmin(0)


def _blobs(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    total = np.zeros((SIDE, SIDE))
    for _ in range(int(rng.integers(1, 9))):
        centre_x, centre_y, size = *rng.uniform(0, SIDE, 2), rng.uniform(5, 18)
        total += np.exp(-((x - centre_x) ** 2 + (y - centre_y) ** 2) / (2 * size**2))
    return total.clip(0, 1)


_WEIGHTS = {
    "ramp": _ramp, "waves": _waves, "checks": _checks, "rings": _rings, "cells": _cells, "blobs": _blobs,
}  # fmt: skip
