"""What there is to choose from, for the command line and the README."""

from __future__ import annotations

from ..method import doc
from .base import LearnedModule, Resampler, told
from .registry import build, get_module, list_modules
from .replacement import AttentionReplacement

GRID = (24, 24)
MEANING = {
    "where": "before the host's projector, in its place or behind it; in the place of attention in a vision "
    "tower (`ReplacedAttention`); or a part for models of your own",
    "tokens": f"how many it can make of {GRID[0]} x {GRID[1]}, by its default options",
    "stages": "of a host: between encoder and language model, or also between blocks of the encoder",
    "weights": "the licence of published ones, as their authors' repositories tell it; yours to fetch",
}


def rows() -> list[tuple[str, ...]]:
    """A heading and a row for each module."""
    found = [("module", *MEANING, "what it is")]
    for name in list_modules():
        cls = get_module(name)
        found.append((name, *_placed(cls), cls.weights, doc(cls)))
    return found


def _placed(cls: type[LearnedModule]) -> tuple[str, str, str]:
    if issubclass(cls, Resampler):
        return cls.place, _counts(cls), " ".join(cls.stages)
    attends = issubclass(cls, AttentionReplacement) or hasattr(cls, "as_stage")
    return "attention" if attends else "part", "", ""


def _counts(cls: type[Resampler]) -> str:
    try:
        return told(build(cls.name).counts_for(GRID))
    except ValueError:
        return "see its options"
