"""What there is to choose from, for the command line and the README."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..method import doc
from .base import get_tokenizer, list_tokenizers

MEANING = {
    "tokens": "how many a picture may have, by default; ? needs pip install "
    "'vision-token-compression[tokenizers]'",
    "codes": "how many there are, by default",
    "ordered": "the first tokens are a picture, the better the more",
    "prefix": "encoding to fewer tokens gives the first of all tokens",
    "halts": "chooses the number of tokens itself",
    "weights": "the licence of published ones, which you fetch: vtc has none but its own",
}


def rows() -> list[tuple[str, ...]]:
    """A heading and a row for each tokenizer."""
    found = [("tokenizer", *MEANING, "what it is")]
    for name in list_tokenizers():
        cls = get_tokenizer(name)
        try:
            with torch.device("meta"):  # shapes only, no weights
                tokenizer = cls(cls.Config())
            tokens, codes = _counts(tokenizer.lengths), str(tokenizer.quantize.size or "continuous")
        except ImportError:  # of a library that only this one needs
            tokens = codes = "?"
        marks = ("yes" if mark else "no" for mark in (cls.ordered, cls.prefix_stable, cls.halts))
        found.append((name, tokens, codes, *marks, cls.weights, doc(cls)))
    return found


def _counts(lengths: Sequence[int]) -> str:
    if len(lengths) > 2 and list(lengths) == list(range(lengths[0], lengths[-1] + 1)):
        return f"{lengths[0]} to {lengths[-1]}"
    return ", ".join(map(str, lengths))
