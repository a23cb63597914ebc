"""Compressors with weights: modules that read the features of an image and give fewer tokens."""

from .base import LearnedModule, Resampler, from_pretrained
from .in_tower import ReplacedAttention
from .registry import build, get_module, list_modules, register_module

__all__ = [
    "LearnedModule",
    "ReplacedAttention",
    "Resampler",
    "build",
    "from_pretrained",
    "get_module",
    "list_modules",
    "register_module",
]
