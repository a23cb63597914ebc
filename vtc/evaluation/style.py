"""How methods look in every picture: colours that colour-blind readers tell apart, baselines in grey."""

from __future__ import annotations

from dataclasses import dataclass

from .board import Board, is_baseline

# Okabe and Ito's palette without its yellow, which is too light on white, and without black
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREYS = ("#6b7280", "#9ca3af", "#4b5563", "#b4b9c1")
PLAIN = "#d3d7de"
DASHES = ((5, 3), (2, 2), (7, 2, 2, 2), (1, 2))


@dataclass(frozen=True)
class Look:
    """`dashes` are lengths of strokes and gaps in units of the line's width; empty for a solid line. `plain`
    is a thin line among many of the same look."""

    colour: str
    marker: str
    dashes: tuple[int, ...] = ()
    plain: bool = False

    @property
    def width(self) -> float:
        return 1.0 if self.plain else 1.4 if self.dashes else 2.2


def looks(board: Board) -> dict[str, Look]:
    """A look for each method. Of many that answer questions only the best have colours; of other boards
    colours come again with another marker."""
    own = [method for method in board.methods if not is_baseline(method)]
    greys = [method for method in board.methods if is_baseline(method)]
    best = own if board.classes or len(own) <= len(COLOURS) + 2 else own[: len(COLOURS)]
    found = {}
    for i, method in enumerate(best):
        turn = i // len(COLOURS)
        found[method] = Look(COLOURS[i % len(COLOURS)], MARKERS[(i + turn) % len(MARKERS)])
    for method in own[len(best) :]:
        found[method] = Look(PLAIN, "", plain=True)
    for i, method in enumerate(greys):
        found[method] = Look(GREYS[i % len(GREYS)], "x", DASHES[i % len(DASHES)])
    return found
