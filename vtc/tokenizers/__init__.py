"""Adaptive-length 1D tokenizers: an image becomes an ordered sequence of 1 to K tokens, and an image again."""

from .base import (
    Tokenizer,
    build,
    from_pretrained,
    get_tokenizer,
    list_tokenizers,
    register_tokenizer,
)
from .bottlenecks import FSQ, KL, VQ, Bottleneck, Code, Continuous
from .policies import Fixed, Policy
from .sequence import TokenSequence

__all__ = [
    "FSQ",
    "KL",
    "VQ",
    "Bottleneck",
    "Code",
    "Continuous",
    "Fixed",
    "Policy",
    "TokenSequence",
    "Tokenizer",
    "build",
    "from_pretrained",
    "get_tokenizer",
    "list_tokenizers",
    "register_tokenizer",
]
