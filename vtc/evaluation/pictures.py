"""What is classified: generated scenes with one object, or a folder that has a sub-folder for each class."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from .tasks import Item, Task

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SINGLES = 2000  # pictures, where no number is given


@dataclass(frozen=True)
class Pictures(Task):
    """Items that ask nothing and whose answer is one of `classes`, which has its name in words for each."""

    classes: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Changes with the items, the classes, their order and their words."""
        known = [super().fingerprint, *self.classes.items()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


def load_pictures(name: str, n: int | None = None, split: str = "test") -> Pictures:
    """The task called "singles" (n scenes, 2,000 if None) or "imagefolder:PATH" (n pictures, all if None).

    Every sub-folder of PATH is a class, named in words by the folder's name: "red_circle" is "red circle" and
    an ImageNet number such as n01440764 is "tench". A file classes.txt in PATH gives other words, in lines
    like "n01440764 tench", with a tab between the two where a folder's name has spaces. n pictures are spread
    over the classes as evenly as can be. Raises ValueError for another name, an empty folder or a
    classes.txt that does not fit, OSError where there is no folder.
    """
    if n is not None and n < 1:
        raise ValueError(f"a task needs at least 1 picture, not n={n}")
    if name == "singles":
        return _singles(n or SINGLES, split)
    kind, _, path = name.partition(":")
    if kind == "imagefolder" and path:
        return _folder(name, Path(path).expanduser(), n)
    raise ValueError(f"there is no task {name!r} of classes; known: singles, imagefolder:PATH")


def _singles(n: int, split: str) -> Pictures:
    from .scenes import CLASSES, SPLITS, scene, singles

    if split not in SPLITS:
        raise ValueError(f"scenes have no split {split!r}; known: {', '.join(SPLITS)}")

    def picture(index: int) -> Image:
        return scene(split, index).image

    items = [
        Item("", name, "all", partial(picture, index), f"{split} scene {index}")
        for index, name in singles(split, n)
    ]
    return Pictures("singles", items, split, {name: name for name in CLASSES})


def _folder(name: str, path: Path, n: int | None) -> Pictures:
    from ..images import open_image

    folders = [e for e in path.iterdir() if e.is_dir() and not e.name.startswith((".", "__MACOSX"))]
    nested = [e.name for e in folders if not any(f.is_file() for f in e.iterdir()) and any(e.iterdir())]
    if folders and len(nested) == len(folders):
        raise ValueError(
            f"the sub-folders of {path} hold folders and no pictures: give the one whose sub-folders are "
            f"classes, such as {path / nested[0]}"
        )
    numbers = all(folder.name.isdecimal() for folder in folders)
    folders.sort(key=lambda folder: int(folder.name) if numbers else folder.name)
    files = {folder.name: sorted(_files(folder)) for folder in folders}
    turns = zip_longest(*([(label, file) for file in found] for label, found in files.items()))
    chosen = [pair for turn in turns for pair in turn if pair is not None][:n]  # a class after the other
    if not chosen:
        raise ValueError(f"{path} has no sub-folders with pictures: it needs one for each class")
    items = []
    for label, file in chosen:
        where = file.relative_to(path).as_posix()
        items.append(Item("", label, "all", partial(open_image, file), where, picture=where))
    return Pictures(name, items, classes=_words(path, list(files)))


def _files(folder: Path) -> Iterator[Path]:
    found = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return (file for file in found if not file.name.startswith("."))


def _words(path: Path, labels: list[str]) -> dict[str, str]:
    given = path / "classes.txt"
    if not given.is_file():
        return {label: _spelled(label) for label in labels}
    found = {}
    for line in given.read_text(encoding="utf-8").splitlines():
        label, _, words = line.strip().partition("\t" if "\t" in line else " ")
        found[label] = words.strip()
    if missing := [label for label in labels if not found.get(label)]:
        raise ValueError(f"{given} names {len(missing)} of the folders not, such as {missing[0]!r}")
    return {label: found[label] for label in labels}


def _spelled(label: str) -> str:
    from timm.data import ImageNetInfo

    if re.fullmatch(r"n\d{8}", label):
        try:
            return ImageNetInfo("imagenet-22k").label_name_to_description(label).split(",")[0]
        except KeyError:
            return label
    return label.replace("_", " ")
