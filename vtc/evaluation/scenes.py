"""Cluttered little pictures with known contents: what the reference models are trained and measured on.

A scene is 96x96 pixels: a textured background with scattered dots and lines, one to four coloured objects
that do not overlap, and one small black digit. `scene(split, index)` depends on nothing but its arguments, so
a data set is a range of indices, and the splits draw from different random streams.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image

SIDE, PATCH = 96, 8
GRID = SIDE // PATCH
SPLITS = {"train": 0, "validation": 1, "test": 2}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring", "star")
COLOURS = {
    "red": (215, 35, 40), "green": (35, 165, 60), "blue": (45, 75, 220), "yellow": (240, 220, 50),
    "purple": (145, 45, 175), "orange": (240, 130, 25), "cyan": (60, 210, 220), "white": (246, 246, 246),
}  # fmt: skip
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)  # 56, for classification
SIZES = {"small": (14, 17), "large": (22, 27)}  # side of the bounding box in pixels, both ends included
DIGITS = tuple("0123456789")
BACKGROUND, PARTIAL, DIGIT = -1, -2, 4  # values of `Scene.owner` other than an object's number

GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110", "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111", "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010", "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110", "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110", "9": "01110 10001 10001 01111 00001 00010 01100",
}  # fmt: skip


@dataclass(frozen=True)
class Object:
    """One coloured shape; `box` is (left, top, right, bottom) in pixels, right and bottom excluded."""

    shape: str
    colour: str
    size: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def quadrant(self) -> str:
        x, y = self.centre
        return f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"


@dataclass(frozen=True)
class Scene:
    """What is in the picture; pixels and patch labels are worked out when asked for."""

    split: str
    index: int
    objects: tuple[Object, ...]
    digit: str
    digit_box: tuple[int, int, int, int]

    @cached_property
    def pixels(self) -> np.ndarray:
        """(96, 96, 3) uint8"""
        rng = _rng(self.split, self.index, 1)
        canvas = _background(rng)
        _clutter(canvas, rng)
        for o in self.objects:
            x0, y0, x1, y1 = o.box
            ink = np.array(COLOURS[o.colour]) + rng.uniform(-14, 14, 3)
            mask = _mask(o.shape, x1 - x0)[..., None]  # (s, s, 1)
            area = canvas[y0:y1, x0:x1]
            area += mask * (ink - area)
        x0, y0, x1, y1 = self.digit_box
        canvas[y0:y1, x0:x1][_glyph(self.digit)] = rng.uniform(0, 25)
        canvas += rng.normal(0, 5, canvas.shape[:2])[..., None]
        return canvas.clip(0, 255).astype(np.uint8)

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    @cached_property
    def owner(self) -> np.ndarray:
        """(144,) int8: the number of each patch's object, DIGIT, BACKGROUND, or PARTIAL if little is seen."""
        cover = np.zeros((5, SIDE, SIDE), np.float32)
        for i, o in enumerate(self.objects):
            x0, y0, x1, y1 = o.box
            cover[i, y0:y1, x0:x1] = _mask(o.shape, x1 - x0)
        x0, y0, x1, y1 = self.digit_box
        cover[DIGIT, y0:y1, x0:x1] = 1  # the digit's whole box: strokes alone would leave out its open parts
        cover = cover.reshape(5, GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(5, GRID * GRID)
        most = cover.max(0)
        owner = np.where(most >= 0.2, cover.argmax(0), PARTIAL)
        return np.where(most < 0.02, BACKGROUND, owner).astype(np.int8)

    @property
    def caption(self) -> str:
        """The objects from left to right, then the digit."""
        ordered = sorted(self.objects, key=lambda o: o.centre)
        things = [f"a {o.size} {o.name}" for o in ordered] + [f"the digit {self.digit}"]
        return " , ".join(things[:-1]) + " and " + things[-1]


def scene(split: str, index: int) -> Scene:
    """The scene number `index` of "train", "validation" or "test"."""
    rng = _rng(split, index, 0)
    looks = _looks(rng, int(rng.integers(1, 5)))
    while (boxes := _place(rng, [size for _, _, size in looks])) is None:
        pass
    objects = tuple(Object(*look, box) for look, box in zip(looks, boxes[1:], strict=True))
    return Scene(split, index, objects, str(rng.choice(DIGITS)), boxes[0])


def singles(split: str, n: int, seed: int = 0) -> list[tuple[int, str]]:
    """n scenes with one object each and the class of it, one of CLASSES: pictures to classify."""
    found, index = [], seed * 1_000_000
    while len(found) < n:
        s = scene(split, index)
        if len(s.objects) == 1:
            found.append((index, s.objects[0].name))
        index += 1
    return found


def _rng(split: str, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([20240611, SPLITS[split], index, stream])


def _looks(rng: np.random.Generator, n: int) -> list[tuple[str, str, str]]:
    """n different (shape, colour) pairs with a size; often two share one of them, so that both are needed."""
    looks = []
    while len(looks) < n:
        shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        if looks and (draw := rng.random()) < 0.4:
            other = looks[rng.integers(len(looks))]
            shape, colour = (other[0], colour) if draw < 0.2 else (shape, other[1])
        if (shape, colour) not in [look[:2] for look in looks]:
            looks.append((shape, colour, str(rng.choice(list(SIZES)))))
    return looks


def _place(rng: np.random.Generator, sizes: list[str]) -> list[tuple[int, int, int, int]] | None:
    """The digit's box, then one box per object, two pixels or more apart; None when they do not fit."""
    x, y = 4 * rng.integers(0, (SIDE - 10) // 4 + 1), 4 * rng.integers(0, (SIDE - 14) // 4 + 1)
    boxes = [(int(x), int(y), int(x) + 10, int(y) + 14)]
    for size in sizes:
        low, high = SIZES[size]
        side = int(rng.integers(low, high + 1))
        for x0, y0 in rng.integers(0, SIDE - side + 1, (20, 2)).tolist():
            box = (x0, y0, x0 + side, y0 + side)
            if all(
                box[0] > b[2] + 1 or b[0] > box[2] + 1 or box[1] > b[3] + 1 or b[1] > box[3] + 1
                for b in boxes
            ):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _background(rng: np.random.Generator) -> np.ndarray:
    """(96, 96, 3) float32: a muted tint under stripes, checks or waves."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    angle, step = rng.uniform(0, np.pi), rng.uniform(0.15, 0.6)
    wave = np.sin(step * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6))
    other = np.sin(step * (y * np.cos(angle) - x * np.sin(angle)) + rng.uniform(0, 6))
    texture = (wave, np.sign(wave * other), wave + other, (x + y) / SIDE - 1)[rng.integers(4)]
    tint = rng.uniform(85, 150) + rng.uniform(-12, 12, 3)
    return (tint + rng.uniform(6, 22) * texture[..., None]).astype(np.float32)


def _clutter(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Dots in the objects' colours and thin grey lines, in place; objects are drawn over them."""
    inks = np.array(list(COLOURS.values()))
    for x, y, side, ink in rng.integers(0, (SIDE - 3, SIDE - 3, 2, len(inks)), (int(rng.integers(4, 13)), 4)):
        canvas[y : y + side + 2, x : x + side + 2] = inks[ink]
    t = np.linspace(0, 1, 2 * SIDE)[:, None]
    for _ in range(rng.integers(0, 4)):
        start, end = rng.uniform(0, SIDE - 1, (2, 2))
        line = (start + t * (end - start)).astype(int)
        canvas[line[:, 1], line[:, 0]] = rng.uniform(50, 200)


@cache
def _glyph(digit: str) -> np.ndarray:
    """(14, 10) bool"""
    rows = np.array([[c == "1" for c in row] for row in GLYPHS[digit].split()])
    return rows.repeat(2, 0).repeat(2, 1)


@cache
def _mask(shape: str, side: int) -> np.ndarray:
    """(side, side) float32 in [0, 1]: how much of each pixel the shape covers, from 4x4 samples."""
    c = (np.arange(4 * side) + 0.5) / (2 * side) - 1
    y, x = np.meshgrid(c, c, indexing="ij")
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    inside = {
        "circle": radius <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 0.9,
        "triangle": abs(x) <= (y + 1) / 2,
        "cross": (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
        "diamond": abs(x) + abs(y) <= 1,
        "ring": (radius <= 1) & (radius >= 0.55),
        "star": _star(radius, abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)),
    }[shape]
    return inside.reshape(side, 4, side, 4).mean((1, 3)).astype(np.float32)


def _star(radius: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Five tips at radius 1, notches at 0.5; `fold` is the angle to the nearest tip, at most pi / 5."""
    x, y = radius * np.cos(fold), radius * np.sin(fold)
    notch_x, notch_y = 0.5 * np.cos(np.pi / 5), 0.5 * np.sin(np.pi / 5)
    return (notch_x - 1) * y >= notch_y * (x - 1)
