"""What each family of models was shown to do by its tests: `make families` writes support.json."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from .refused import REFUSED

# column of the table -> what its tests show
COLUMNS = {
    "batches": "each row of a padded batch, left or right, equals its prompt shortened by hand",
    "several images": "prompts of five images and of none in one batch",
    "tiles": "images cut into tiles, with any sharing of the budget over them",
    "video": "videos, frame by frame, with any sharing of the budget over frames",
    "generate": "dynamic, static and chunked caches and beams give what no cache gives",
    "chats": "a second turn over the cache equals one prompt of both turns",
    "attention": "sdpa and eager agree, also in what methods read",
    "half precision": "bfloat16",
    "training": "gradients reach the vision tower and are finite",
}
MEANING = {
    **COLUMNS,
    "encoder stage": "what is shortened where the tower itself reduces tokens: it alone, or the prompt too",
}
# what a bare model may lack, in words; and the column that is about just that
_NAMES = {
    "cache": "a cache of its own in forward()",
    "chunked": "chunked prefill",
    "gradients": "gradients in its tower",
    "half": "casting to bfloat16",
    "mixed": "images beside videos",
    "rows": "rows that do not depend on each other",
    "static": "static caches",
    "uncached": "generate() without a cache",
}
_ABOUT = {"chats": "chats", "gradients": "training", "half": "half precision"}
_OWN_TESTS = "generate() of answers: it has tests of its own instead of these"


def families() -> dict[str, dict[str, Any]]:
    """By family: a bool for each column, `model_types`, what methods may read, and what the bare model of
    transformers lacks."""
    return json.loads(files(__package__).joinpath("support.json").read_text())["families"]


def rows() -> list[list[str]]:
    """The table of families, its heading first."""
    table = [["family", "methods may read", "positions", *COLUMNS, "encoder stage", "bare model lacks"]]
    for family, shown in families().items():
        types = [f"({', '.join(shown['model_types'])})"] if shown["model_types"] != [family] else []
        lacking = {_ABOUT.get(lack) for lack in shown["lacks"]}
        marks = ["yes" if shown.get(column) and column not in lacking else "-" for column in COLUMNS]
        reads = ", ".join(["features", *shown["reads"]]) if shown["hosts"] else "-"
        positions = ", ".join(shown["positions"]) or "-"
        lacks = ", ".join(_NAMES.get(lack, lack) for lack in shown["lacks"])
        lacks = lacks if shown["hosts"] else _OWN_TESTS
        encoder = shown.get("encoder") or "-"
        table.append([" ".join([family, *types]), reads, positions, *marks, encoder, lacks])
    return table


def refused() -> list[tuple[str, str]]:
    """Families that cannot be served, and why."""
    return sorted(REFUSED.items())
