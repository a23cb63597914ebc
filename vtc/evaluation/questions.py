"""Questions about scenes, each with one answer that the scene's objects alone decide."""

from dataclasses import dataclass
from itertools import count, permutations

import numpy as np

from vtc.evaluation.scenes import COLOURS, DIGITS, SHAPES, SIDE, SPLITS, Scene, scene

KINDS = ("colour", "shape", "count", "existence", "relation", "digit", "quadrant")
NUMBERS = ("one", "two", "three", "four")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left", "right", "above", "below")


@dataclass(frozen=True)
class Question:
    """`choices` are all answers that a question of this kind can have."""

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]


def questions(scene: Scene) -> list[Question]:
    """Every question of the scene in an order of its own: one picture's kinds and answers are mixed."""
    rng = np.random.default_rng([7, SPLITS[scene.split], scene.index])
    found = [q for make in (_colour, _shape, _count, _relation, _digit, _quadrant) for q in make(scene)]
    found += _existence(scene, rng)
    return [found[i] for i in rng.permutation(len(found))]


def dataset(split: str, n: int, seed: int = 0) -> list[tuple[int, Question]]:
    """n pairs of a scene's index and a question, the kinds in turn and yes as often as no.

    One question per scene; the first n of a longer list are the shorter list, and seeds share no scene as
    long as they ask for less than some 700,000 questions each.
    """
    chosen, indices = [], count(seed * 1_000_000)
    while len(chosen) < n:
        turn, kind = divmod(len(chosen), len(KINDS))
        index = next(indices)
        fitting = [q for q in questions(scene(split, index)) if q.kind == KINDS[kind]]
        if KINDS[kind] == "existence":
            fitting = [q for q in fitting if q.answer == ("yes", "no")[turn % 2]]
        if fitting:
            chosen.append((index, fitting[0]))
    return chosen


def _colour(s: Scene) -> list[Question]:
    shapes = [o.shape for o in s.objects]
    single = [o for o in s.objects if shapes.count(o.shape) == 1]
    return [Question("colour", f"what colour is the {o.shape} ?", o.colour, tuple(COLOURS)) for o in single]


def _shape(s: Scene) -> list[Question]:
    colours = [o.colour for o in s.objects]
    single = [o for o in s.objects if colours.count(o.colour) == 1]
    return [Question("shape", f"what shape is the {o.colour} object ?", o.shape, SHAPES) for o in single]


def _count(s: Scene) -> list[Question]:
    return [Question("count", "how many objects are there ?", NUMBERS[len(s.objects) - 1], NUMBERS)]


def _digit(s: Scene) -> list[Question]:
    return [Question("digit", "which digit is written ?", s.digit, DIGITS)]


def _quadrant(s: Scene) -> list[Question]:
    """Objects whose centre lies at least 5 pixels from both middle lines."""
    clear = [o for o in s.objects if min(abs(c - SIDE / 2) for c in o.centre) >= 5]
    return [Question("quadrant", f"in which corner is the {o.name} ?", o.quadrant, QUADRANTS) for o in clear]


def _relation(s: Scene) -> list[Question]:
    """Pairs whose centres are 16 pixels or more apart along one axis and much less along the other."""
    found = []
    for a, b in permutations(s.objects, 2):
        dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
        near, far = sorted((abs(dx), abs(dy)))
        if far >= 16 and far >= 1.5 * near:
            answer = ("left" if dx < 0 else "right") if abs(dx) == far else ("above" if dy < 0 else "below")
            text = f"where is the {a.name} relative to the {b.name} ?"
            found.append(Question("relation", text, answer, RELATIONS))
    return found


def _existence(s: Scene, rng: np.random.Generator) -> list[Question]:
    """One yes and one no; the absent object shares its shape, its colour or both with objects shown."""
    shown = [o.name for o in s.objects]
    shapes, colours = {o.shape for o in s.objects}, {o.colour for o in s.objects}
    absent = [(c, f) for c in COLOURS for f in SHAPES if f"{c} {f}" not in shown]
    both = [f"{c} {f}" for c, f in absent if c in colours and f in shapes]
    half = [f"{c} {f}" for c, f in absent if (c in colours) != (f in shapes)]
    missing = both if both and rng.random() < 0.5 else half
    names = {"yes": shown[rng.integers(len(shown))], "no": missing[rng.integers(len(missing))]}
    return [Question("existence", f"is there a {name} ?", yes, ("yes", "no")) for yes, name in names.items()]
