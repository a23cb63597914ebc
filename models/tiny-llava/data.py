"""Scenes as arrays on disk, and questions as token rows, for training."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from vtc.evaluation.questions import KINDS, questions
from vtc.evaluation.scenes import BACKGROUND, COLOURS, SHAPES, SIDE, SIZES, Scene, scene

FIELDS = 5  # of an object: shape, colour, size, x, y


def arrays(
    folder: Path, split: str, n: int, chunk: int = 2000
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """pixels (n, 96, 96, 3), owner (n, 144), objects (n, 5, 5), digit (n,), all integers; drawn once, cached.

    The fifth object is the digit, of which only the place is known; missing objects are -1.
    """
    names = ("pixels", "owner", "objects", "digit")
    files = [folder / f"{split}-{n}-{name}.npy" for name in names]
    if not all(f.exists() for f in files):
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(2) as pool:
            starts = range(0, n, chunk)
            parts = list(pool.map(_draw, [split] * len(starts), starts, [min(s + chunk, n) for s in starts]))
        for f, part in zip(files, zip(*parts, strict=True), strict=True):
            np.save(f, np.concatenate(part))
    return tuple(np.load(f) for f in files)


def _draw(split: str, start: int, stop: int) -> tuple[np.ndarray, ...]:
    scenes = [scene(split, i) for i in range(start, stop)]
    objects = np.full((len(scenes), 5, FIELDS), -1, np.int16)
    names = list(SHAPES), list(COLOURS), list(SIZES)
    for row, s in zip(objects, scenes, strict=True):
        for cells, o in zip(row, s.objects, strict=False):
            looks = [
                group.index(word) for group, word in zip(names, (o.shape, o.colour, o.size), strict=True)
            ]
            cells[:] = *looks, *(int(c) for c in o.centre)
        x0, y0, x1, y1 = s.digit_box
        row[4, 3:] = (x0 + x1) // 2, (y0 + y1) // 2
    digits = np.array([int(s.digit) for s in scenes], np.int8)
    return np.stack([s.pixels for s in scenes]), np.stack([s.owner for s in scenes]), objects, digits


def normalised(pixels: np.ndarray) -> np.ndarray:
    """(B, 96, 96, 3) uint8 -> (B, 3, 96, 96) float32 as the image processor does it with mean and std 0.5."""
    return (pixels.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)


def caption(s: Scene, rng: np.random.Generator, vocab: dict[str, int], length: int = 40) -> list[int]:
    """Token ids of a free caption of the scene: objects in any order, sizes and the digit often left out."""
    sized = rng.random() < 0.4
    words = ["a", "photo", "of"] if rng.random() < 0.4 else []
    things = [f"a {o.size} {o.name}" if sized else f"a {o.name}" for o in s.objects]
    things = [things[i] for i in rng.permutation(len(things))] + [f"the digit {s.digit}"] * (
        rng.random() < 0.5
    )
    words += (" , ".join(things[:-1]) + " and " + things[-1] if len(things) > 1 else things[0]).split()
    words += ["."] * (rng.random() < 0.4)
    return [vocab[w] for w in ("<s>", *words, "</s>")][:length]


def pack(
    scenes: list[Scene],
    rng: np.random.Generator,
    vocab: dict[str, int],
    each: int,
    tell: float = 0.0,
    patches: int = 144,
) -> dict:
    """Rows for `losses.answer_loss`: a picture once, then its questions side by side, new kinds first.

    `tell` is the share of pictures that must also be described. All but the integer `image` are (B, L) int64.
    """
    prefix = [vocab[w] for w in ("<s>", "user", ":")] + [vocab["<image>"]] * patches
    reply = [vocab["assistant"], vocab[":"]]
    rows = []
    for s in scenes:
        found = questions(s)
        found = [found[i] for i in rng.permutation(len(found))]
        seen, first, rest = set(), [], []
        for q in found:
            key = (q.kind, q.answer if q.kind == "existence" else "")
            (rest if key in seen else first).append(q)
            seen.add(key)
        turns = [(q.text, q.answer, KINDS.index(q.kind)) for q in (first + rest)[:each]]
        if rng.random() < tell:
            turns.append(("describe this picture .", s.caption, len(KINDS)))
        ids, segment, position = list(prefix), [0] * len(prefix), list(range(len(prefix)))
        target, kind, place = [-100] * len(prefix), [-1] * len(prefix), [0] * len(prefix)
        for i, (text, answer, number) in enumerate(turns, 1):
            ask = [vocab[w] for w in text.split()] + reply
            say = [vocab[w] for w in answer.split()]
            ids += ask + say
            segment += [i] * len(ask + say)
            position += range(len(prefix), len(prefix) + len(ask + say))
            target += [-100] * (len(ask) - 1) + say + [vocab["</s>"]]
            kind += [i * 16 + number] * len(ask + say)
            place += meant(s, text.split()) + [0] * (len(reply) + len(say))
        rows.append((ids, segment, position, target, kind, place))
    length = max(len(r[0]) for r in rows)
    blank = (vocab["<pad>"], -1, 0, -100, -1, 0)
    full = np.array(
        [[part + [fill] * (length - len(part)) for part, fill in zip(r, blank, strict=True)] for r in rows]
    )
    names = ("ids", "segment", "position", "target", "kind", "place")
    return {n: torch.from_numpy(full[:, i]) for i, n in enumerate(names)} | {"image": 3}


def meant(s: Scene, words: list[str]) -> list[int]:
    """Per word 1 + 96 y + x, the centre of the object whose name ends there; -1: no such one; 0: no name."""
    found = [0] * len(words)
    for i, word in enumerate(words[1:], 1):
        if word in SHAPES or (word == "object" and words[i - 1] in COLOURS):
            fit = [o for o in s.objects if word in (o.shape, "object")]
            fit = [o for o in fit if words[i - 1] == o.colour or words[i - 1] not in COLOURS]
            found[i] = 1 + SIDE * int(fit[0].centre[1]) + int(fit[0].centre[0]) if fit else -1
    return found


def thin(owner: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """owner (B, 144) -> (B, k) ascending patches, at least one of each object and of the digit.

    The rest are mostly objects in some pictures and mostly background in others: every such choice holds the
    answers, so that a model trained with them can be asked whichever patches a compressor leaves it.
    """
    liking = rng.uniform(-3, 4, (len(owner), 1)) * (owner != BACKGROUND)
    score = liking + rng.gumbel(size=owner.shape)
    for number in range(5):
        lots = np.where(owner == number, rng.random(owner.shape), -1)
        first = lots.argmax(1)
        there = lots.max(1) >= 0
        score[there, first[there]] = np.inf
    return np.sort((-score).argsort(1, kind="stable")[:, :k], 1)
