"""Which methods are no better than random tokens at the same budget, and how sure that is."""

from __future__ import annotations

import math
from statistics import mean, stdev

from ..tokens import Keep
from .board import RANDOM, Board, Cell
from .hard import asked, outcomes
from .tables import budget


def below_random(board: Board) -> list[str]:
    """A line for each budget: the methods below random tokens, then those that cannot be told from them.

    A difference is in points of accuracy, with the half of its 95 % interval over the questions, where rows
    say which of them were answered.
    """
    lines = []
    for keep in board.keeps:
        if (RANDOM, keep) in board.cells:
            places = [(method, method, keep) for method in board.methods if method != RANDOM]
            random = f"random {100 * board.cells[RANDOM, keep].accuracy:.1f}"
            lines.append(f"{budget(board, keep)} ({random}): {_told(board, places)}")
    if board.varying:
        places = [(f"{method} {keep}", method, keep) for method, keep in board.varying]
        lines.append(f"different from picture to picture: {_told(board, places)}")
    return lines


def difference(cell: Cell, random: Cell) -> tuple[float, float | None]:
    """Points of accuracy between two cells, and the half of the 95 % interval over paired questions; None
    where rows do not say what was answered, or were asked other questions."""
    points = 100 * (cell.accuracy - random.accuracy)
    rows = [*cell.rows, *random.rows]
    found = [outcomes(row) for row in rows]
    if any(right is None for right in found) or any(asked(row) != asked(rows[0]) for row in rows):
        return points, None
    means = [list(map(mean, zip(*part))) for part in (found[: len(cell.rows)], found[len(cell.rows) :])]
    pairs = [one - other for one, other in zip(*means, strict=True)]
    return points, 196 * stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None


def _told(board: Board, places: list[tuple[str, str, Keep]]) -> str:
    below, unsure = [], []
    for name, method, keep in places:
        cell = board.cells.get((method, keep))
        random = board.random(method, keep) if cell else None
        if random is None:
            continue
        points, half = difference(cell, random)
        shown = f"{name} {points:+.1f}" + ("" if half is None else f" ± {half:.1f}")
        if half is not None and abs(points) <= half:
            unsure.append(shown)
        elif points < 0:
            below.append(shown)
    parts = [f"below: {', '.join(below) or 'none'}"]
    return "; ".join([*parts, f"as good as: {', '.join(unsure)}"] if unsure else parts)
