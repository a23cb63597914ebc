"""Scenes of `vtc.evaluation.scenes` as an array on disk, because drawing them takes long."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..evaluation.questions import questions
from ..evaluation.scenes import SIDE, SPLITS, scene

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 500  # scenes that one process draws at a time


@dataclass(frozen=True)
class Drawn:
    """pixels     (n, 96, 96, 3) uint8, mapped from the disk
    questions  with their answers, of each scene: one of each kind, and of existence a yes and a no
    """

    pixels: np.ndarray
    questions: list[list[tuple[str, str]]]

    @classmethod
    def of(cls, folder: Path, split: str, n: int) -> Drawn:
        """The first n scenes of a split, drawn where the folder does not hold them. ValueError for a split
        that is not known."""
        if split not in SPLITS:
            raise ValueError(f"scenes have no split {split!r}; known: {', '.join(SPLITS)}")
        pixels, asked = folder / f"scenes-{split}-{n}.npy", folder / f"scenes-{split}-{n}.json"
        if not (pixels.is_file() and asked.is_file()):
            _draw(pixels, asked, split, n)
        every = [[tuple(pair) for pair in own] for own in json.loads(asked.read_text())]
        return cls(np.load(pixels, mmap_mode="r"), every)

    def open(self, index: int) -> Image:
        from PIL import Image

        return Image.fromarray(np.asarray(self.pixels[index]))


def _draw(pixels: Path, asked: Path, split: str, n: int) -> None:
    from tqdm import tqdm

    pixels.parent.mkdir(parents=True, exist_ok=True)
    draft = pixels.with_suffix(f".{os.getpid()}.part")
    out = np.lib.format.open_memmap(draft, "w+", np.uint8, (n, SIDE, SIDE, 3))
    starts = range(0, n, CHUNK)
    every: list[list[tuple[str, str]]] = []
    with tqdm(total=n, desc="drawing scenes", unit="") as bar:
        if n <= CHUNK:
            parts = map(_part, [split], [0], [n])
            _fill(out, every, parts, bar)
        else:
            ends = [min(start + CHUNK, n) for start in starts]
            with ProcessPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
                _fill(out, every, pool.map(_part, [split] * len(starts), starts, ends), bar)
    out.flush()
    asked.write_text(json.dumps(every))
    draft.replace(pixels)


def _fill(out: np.ndarray, every: list, parts, bar) -> None:
    for drawn, asked in parts:
        out[len(every) : len(every) + len(drawn)] = drawn
        every += asked
        bar.update(len(drawn))


def _part(split: str, start: int, stop: int) -> tuple[np.ndarray, list[list[tuple[str, str]]]]:
    scenes = [scene(split, index) for index in range(start, stop)]
    return np.stack([one.pixels for one in scenes]), [_asked(one) for one in scenes]


def _asked(one) -> list[tuple[str, str]]:
    """The first question of each kind, in the order that mixes kinds; all kinds are asked equally often."""
    first = {}
    for question in questions(one):
        first.setdefault((question.kind, question.answer * (question.kind == "existence")), question)
    return [(question.text, question.answer) for question in first.values()]
