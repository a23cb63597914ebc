"""The part of a README about modules with weights: beside training-free methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .board import Board, Cell, boards
from .chance import difference
from .report import source
from .results import Row
from .runner import label
from .tables import BELOW_RANDOM, READS, accuracy, bounds, budget, markdown, reads

LEARNED = "◆"
FLAGSHIP = "ordered"
FEW = 1 / 9  # of the tokens: where losses are compared


@dataclass
class Contest:
    """The lines of a board, told apart: of modules with weights, and of the others."""

    board: Board

    @cached_property
    def learned(self) -> list[str]:
        """Labels, the best at the board's reference budget first."""
        return [method for method in self.board.methods if "folder" in self.first(method).rows[0]]

    @cached_property
    def free(self) -> list[str]:
        return [method for method in self.board.methods if method not in self.learned]

    def first(self, method: str) -> Cell:
        """One of the cells of a method."""
        return next(cell for (name, _), cell in self.board.cells.items() if name == method)

    def cell(self, method: str, keep: int) -> Cell | None:
        return self.board.cells.get((method, keep))

    def best(self, keep: int, text: bool = True) -> str | None:
        """The label of the best training-free method at a budget; with text=False of those that do not read
        the question."""
        found = [method for method in self.free if self.cell(method, keep)]
        found = [method for method in found if text or "text" not in reads(self.board, method)]
        return max(found, key=lambda method: self.cell(method, keep).accuracy, default=None)

    @property
    def flagship(self) -> str | None:
        """The label of the `ordered` module that is best where tokens are fewest."""
        found = [method for method in self.learned if self.module(method) == FLAGSHIP]
        fewest = {method: min(keep for name, keep in self.board.cells if name == method) for method in found}
        return max(found, key=lambda m: (-fewest[m], self.cell(m, fewest[m]).accuracy), default=None)

    def module(self, method: str) -> str:
        return self.first(method).rows[0]["method"].partition("@")[0]

    def name(self, method: str) -> str:
        """Of a module its own name, with its folder where another one has the same."""
        if method not in self.learned:
            return method
        row = self.first(method).rows[0]
        name = label(self.module(method), row["options"])
        same = [other for other in self.learned if self.module(other) == self.module(method)]
        folders = {self.first(other).rows[0]["folder"] for other in same}
        return f"{name}, {Path(row['folder']).name}" if len(folders) > 1 else name

    def loss(self, method: str, keep: int) -> float:
        """Points of accuracy below all tokens."""
        return 100 * (self.board.full["accuracy"] - self.cell(method, keep).accuracy)

    @property
    def few(self) -> list[int]:
        """Budgets of at most a ninth of the tokens, which is 11 %."""
        most = FEW * self.board.full["tokens"] if self.board.full else math.inf
        return [keep for keep in self.board.keeps if keep <= most]


def block(rows: Sequence[Row]) -> str:
    """The table of each board that has modules, what they lose, and how it was made."""
    parts = []
    for contest in map(Contest, boards(list(rows))):
        board = contest.board
        parts += [learned_table(contest), f"{learned_legend(contest)} {bounds(board)}"]
        parts += [losses_table(contest), losses_legend()] if contest.flagship and board.full else []
        parts += [f"Not measured: {'; '.join(board.errors)}."] if board.errors else []
        parts.append(source(board))
    return "\n\n".join(parts)


def learned_table(contest: Contest) -> str:
    """Accuracy in per cent by number of tokens, modules first, with what they cost to have."""
    board = contest.board
    costs = ["parameters", "minutes"]
    lines = [["method", READS, *costs, *(_heading(board, keep) for keep in board.keeps)]]
    for method in [*contest.learned, *contest.free]:
        cells = [_accuracy(contest, method, keep) for keep in board.keeps]
        lines.append([_marked(contest, method), reads(board, method), *_costs(contest, method), *cells])
    return markdown(lines, "ll" + "r" * (len(costs) + len(board.keeps)))


def learned_legend(contest: Contest) -> str:
    board = contest.board
    error = 196 * math.sqrt(0.25 / board.items)
    parts = [
        f"Accuracy in per cent on {board.items} questions (95 % interval up to ± {error:.1f})",
        f"{LEARNED} trained on this model, with the number of its parameters"
        + (" (+ those of its adapter of the language model)" if _adapted(contest) else "")
        + " and the minutes of its training",
        "-: a number of tokens that the method cannot make",
    ]
    seeds = max((len(cell.rows) for cell in board.cells.values()), default=1)
    parts += [f"± the standard deviation over {seeds} seeds"] if seeds > 1 else []
    if any(board.loses(method, keep) for method, keep in board.cells if keep in board.keeps):
        parts.append(f"{BELOW_RANDOM} below random tokens at the same number")
    if any(cell.reads for cell in board.cells.values()):
        parts.append(f"*{READS}*: CLS, what the encoder's CLS token attends to; text, the question")
    return "; ".join(parts) + "."


def losses_table(contest: Contest) -> str:
    """What the flagship and the best training-free methods lose where few tokens are left: the best of all,
    and the best of those that, like the flagship, do not read the question."""
    heading = ["tokens", f"`{FLAGSHIP}` loses", "best training-free loses", "which", "ratio", "difference"]
    lines = [heading]
    for keep in contest.few:
        own = contest.flagship
        if contest.cell(own, keep) is None:
            continue
        best = dict.fromkeys([contest.best(keep), contest.best(keep, text=False)])
        lines += [_lost(contest, keep, own, other) for other in best if other]
    return markdown(lines, "rrrlrr")


def _lost(contest: Contest, keep: int, own: str, other: str) -> list[str]:
    losses = contest.loss(own, keep), contest.loss(other, keep)
    ratio = "-" if losses[1] <= 0 else "≤ 0" if losses[0] <= 0 else f"{losses[0] / losses[1]:.2f}"
    points, half = difference(contest.cell(own, keep), contest.cell(other, keep))
    told = f"{points:+.1f}" + ("" if half is None else f" ± {half:.1f}")
    read = reads(contest.board, other)
    which = f"{other}, reads {read}" if read else other
    return [str(keep), *(f"{loss:.1f}" for loss in losses), which, ratio, told]


def losses_legend() -> str:
    return (
        "Points of accuracy below all tokens; the best training-free method is chosen at each number by "
        "these same questions, which favours it, and where it reads the question (*text*) the best that does "
        "not follows; *ratio*: the first loss as a share of the second; *difference*: points of accuracy "
        "between the two, with its 95 % interval over paired questions."
    )


def _heading(board: Board, keep: int) -> str:
    share = f", {keep / board.full['tokens']:.0%}".replace("%", " %") if board.full else ""
    tokens = budget(board, keep)
    return ("1 token" if tokens == "1 tokens" else tokens) + share


def _marked(contest: Contest, method: str) -> str:
    name = contest.name(method)
    return f"{name} {LEARNED}" if method in contest.learned else name


def _costs(contest: Contest, method: str) -> list[str]:
    row = contest.first(method).rows[0]
    if "folder" not in row:
        return ["", ""]
    spent = row.get("minutes")
    adapter = row.get("adapter", 0)
    own = _count(row["parameters"] - adapter) + (f" + {_count(adapter)}" if adapter else "")
    return [own, "-" if spent is None else f"{spent:.0f}"]


def _adapted(contest: Contest) -> bool:
    return any(contest.first(method).rows[0].get("adapter") for method in contest.learned)


def _count(parameters: int) -> str:
    if parameters >= 1e5:
        return f"{parameters / 1e6:.2f} M"
    return f"{parameters / 1e3:.1f} k" if parameters else "0"


def _accuracy(contest: Contest, method: str, keep: int) -> str:
    cell = contest.cell(method, keep)
    if cell is None:
        return "-"
    return accuracy(cell) + (f" {BELOW_RANDOM}" if contest.board.loses(method, keep) else "")
