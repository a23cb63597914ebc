"""The hard questions: those that are answered wrongly where the picture itself is shown smaller."""

from __future__ import annotations

from statistics import mean, stdev

from .board import RANDOM, Board, Cell, is_baseline
from .outcomes import unpack
from .results import Row
from .tables import BELOW_RANDOM, budget, lines_table

EASY = "downsample"  # what it answers is easy


def hard_table(board: Board) -> str:
    """Accuracy in per cent on the hard questions, by method and budget."""
    lines = hard_lines(board)
    return lines_table(lines, len(lines[0]) - 1)


def hard_lines(board: Board, corner: str = "method") -> list[list[str]]:
    """The lines of `hard_table`, its heading first; [] where rows do not say what was answered."""
    keeps = [keep for keep in board.keeps if hard(board, keep)]
    if not keeps:
        return []
    last = board.reference if board.reference in keeps else keeps[-1]

    def shares(method: str, keep: float | int) -> list[float]:
        return accuracies(board, board.cells.get((method, keep)), keep)

    methods = [method for method in board.methods if method != EASY]
    methods.sort(key=lambda method: (is_baseline(method), -mean(shares(method, last) or [0.0])))
    counts = [f"{sum(hard(board, keep))} questions" for keep in keeps]
    lines = [[corner, *(f"{_short(board, keep)}, {n}" for keep, n in zip(keeps, counts, strict=True))]]
    for method in methods:
        lines.append([method, *(_shown(shares(method, keep), shares(RANDOM, keep)) for keep in keeps)])
    for name, row in (("all tokens", board.full), ("no image", board.blind)):
        if row:
            lines.append([name, *(_shown(accuracies(board, Cell([row]), keep), []) for keep in keeps)])
    return lines


def hard_legend(board: Board) -> str:
    """What the numbers of `hard_table` are."""
    marked = any(BELOW_RANDOM in cell for line in hard_lines(board) for cell in line)
    parts = [
        f"Accuracy in per cent on the questions that `{EASY}` gets wrong with as many tokens",
        "± the standard deviation over seeds" if any(len(c.rows) > 1 for c in board.cells.values()) else "",
        f"{BELOW_RANDOM} below random tokens at the same budget" if marked else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def hard(board: Board, keep: float | int) -> list[bool]:
    """Of every question whether it is hard at this budget; [] where that is not known."""
    cell = board.cells.get((EASY, keep))
    found = outcomes(cell.rows[0]) if cell else None
    return [not right for right in found] if found and not all(found) else []


def accuracies(board: Board, cell: Cell | None, keep: float | int) -> list[float]:
    """The share of the hard questions that each row of a cell answers; [] where that is not known."""
    chosen, easy = hard(board, keep), board.cells.get((EASY, keep))
    found = []
    for row in cell.rows if cell and chosen else []:
        right = outcomes(row)
        if right is not None and asked(row) == asked(easy.rows[0]):
            found.append(mean(answer for answer, wanted in zip(right, chosen, strict=True) if wanted))
    return found


def outcomes(row: Row) -> list[bool] | None:
    """Of every item that could be asked whether it was answered right; None in older rows."""
    return unpack(row["outcomes"], row["items"]) if "outcomes" in row else None


def asked(row: Row) -> tuple[int, list[str]]:
    """Rows that agree here were asked the same questions."""
    return row["items"], [error["item"] for error in row["errors"]]


def _short(board: Board, keep: float | int) -> str:
    return budget(board, keep).split(", ")[0]


def _shown(shares: list[float], random: list[float]) -> str:
    if not shares:
        return "-"
    spread = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
    below = f" {BELOW_RANDOM}" if random and mean(shares) < mean(random) else ""
    return f"{100 * mean(shares):.1f}{spread}{below}"
