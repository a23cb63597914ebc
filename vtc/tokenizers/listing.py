"""What there is to choose from, for the command line and the README."""

from __future__ import annotations

from ..method import doc
from .base import told
from .registry import get_tokenizer, list_tokenizers

MEANING = {
    "tokens": "how many a picture may have, by default",
    "codes": "how many there are, by default",
    "ordered": "the first tokens are a picture, the better the more",
    "prefix": "encoding to fewer tokens gives the first of all tokens",
    "halts": "chooses the number of tokens itself",
    "weights": "the licence of published ones, as their authors' repositories tell it (look at the model "
    "card, too); they are yours to fetch, vtc has none but its own",
}


def rows() -> list[tuple[str, ...]]:
    """A heading and a row for each tokenizer."""
    found = [("tokenizer", *MEANING, "what it is")]
    for name in list_tokenizers():
        cls = get_tokenizer(name)
        lengths, codes = cls.outline(cls.Config())
        marks = ("yes" if mark else "no" for mark in (cls.ordered, cls.prefix_stable, cls.halts))
        found.append((name, told(lengths), str(codes or "continuous"), *marks, cls.weights, doc(cls)))
    return found
