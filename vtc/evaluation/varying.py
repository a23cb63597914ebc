"""Budgets that differ from picture to picture, beside budgets of as many tokens that do not."""

from __future__ import annotations

from .board import Board, Cell
from .calibrate import MEAN, OWN
from .tables import BELOW_RANDOM, accuracy, lines_table

NUMBERS = ("tokens", "± over pictures", "accuracy", "the same, fixed", "random, fixed")


def varying_table(board: Board) -> str:
    """Tokens that enter the language model and accuracy, by method and policy."""
    return lines_table(varying_lines(board), len(NUMBERS))


def varying_lines(board: Board) -> list[list[str]]:
    """The lines of `varying_table`, its heading first; [] where every budget is the same for all pictures."""
    places = board.varying
    labels = list(dict.fromkeys(method for method, _ in places))
    places.sort(key=lambda place: (labels.index(place[0]), -board.cells[place].tokens))
    lines = [["method", "keep", *NUMBERS]]
    for method, keep in places:
        cell = board.cells[method, keep]
        below = f" {BELOW_RANDOM}" if board.loses(method, keep) else ""
        tokens = [f"{cell.tokens:.1f}", f"{cell.spread_of_tokens:.1f}", accuracy(cell) + below]
        beside = [_beside(board.fixed(method, keep)), _beside(board.random(method, keep))]
        lines.append([method, policy(keep, cell), *tokens, *beside])
    return lines if places else []


def varying_legend(board: Board) -> str:
    """What the columns of `varying_table` are."""
    return (
        f"*{OWN}*: as many tokens as the method itself chooses, without a cap; *p:0.9*: the smallest set of "
        f"tokens that holds 0.9 of the scores; *{MEAN}16*: the same, p such that 16 stay on average. The "
        "columns have the mean over pictures of the tokens that enter the language model, its standard "
        "deviation, accuracy in per cent, and accuracy where every picture keeps the same number of tokens."
        + (f" {BELOW_RANDOM} below random tokens." if any(board.loses(*p) for p in board.varying) else "")
    )


def policy(keep: str, cell: Cell) -> str:
    """The policy in words, with the p that a mean came to."""
    given = cell.rows[0].get("given")
    return f"{keep} (p:{float(given[2:]):.3g})" if given else keep


def _beside(cell: Cell | None) -> str:
    return "-" if cell is None else accuracy(cell)
