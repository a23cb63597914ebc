"""What is asked: tasks of (image, question, answer), from generated scenes or from a user's own file."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Item:
    """A question about a picture. `open` returns the picture as RGB, or raises OSError or ValueError.

    `where` names the item in reports of errors, `picture` its image; `error` says why it cannot be asked.
    """

    question: str
    answer: str
    kind: str
    open: Callable[[], Image]
    where: str
    error: str | None = None
    picture: str = ""

    def matches(self, text: str) -> bool:
        return normalise(text) == normalise(self.answer)


@dataclass(frozen=True)
class Task:
    """Items under a name; `split` says which part of a larger set they are."""

    name: str
    items: list[Item]
    split: str = ""

    @property
    def fingerprint(self) -> str:
        """Changes whenever a question, an answer or an image's name does, or their order."""
        asked = [(item.where, item.picture, item.question, item.answer, item.kind) for item in self.items]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces: "Top left." and "top  left" are the same answer."""
    return " ".join(text.casefold().translate(str.maketrans("", "", string.punctuation)).split())


def load_task(name: str, n: int | None = None, split: str = "test", seed: int = 0) -> Task:
    """The task called "scenes" (n questions, 350 if None) or "jsonl:PATH" (the first n lines, all if None).

    A line of the file is {"image": path, "question": ..., "answer": ...} with an optional "kind"; relative
    paths are relative to the file. Raises ValueError for another name, OSError for a file that is not there.
    """
    if n is not None and n < 1:
        raise ValueError(f"a task needs at least 1 question, not n={n}")
    if name == "scenes":
        return _scenes(n or 350, split, seed)
    kind, _, path = name.partition(":")
    if kind == "jsonl" and path:
        lines = Path(path).read_bytes().splitlines()  # bytes: a line in another encoding is one error
        numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        items = [_item(line, where, Path(path).parent) for where, line in numbered]
        if not items:
            raise ValueError(f"{path} holds no question: give one JSON object per line")
        return Task(name, items[:n])
    raise ValueError(f"there is no task {name!r}; known: scenes, jsonl:PATH")


def _scenes(n: int, split: str, seed: int) -> Task:
    from .questions import dataset
    from .scenes import SPLITS, scene

    if split not in SPLITS:
        raise ValueError(f"scenes have no split {split!r}; known: {', '.join(SPLITS)}")

    def picture(index: int) -> Image:
        return scene(split, index).image

    items = [
        Item(question.text, question.answer, question.kind, partial(picture, index), f"{split} scene {index}")
        for index, question in dataset(split, n, seed)
    ]
    return Task("scenes", items, split)


def _item(line: bytes, where: str, folder: Path) -> Item:
    from ..images import open_image

    try:
        row = json.loads(line)
        path, question, answer = row["image"], str(row["question"]), str(row["answer"])
        kind = str(row.get("kind", "all"))
        return Item(question, answer, kind, partial(open_image, folder / path), where, picture=str(path))
    except (ValueError, KeyError, TypeError) as error:
        message = f"not an object with image, question and answer ({type(error).__name__}: {error})"
        return Item("", "", "", _nothing, where, message)


def _nothing() -> Image:
    raise ValueError("this item has no picture")
