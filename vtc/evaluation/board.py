"""The rows of a model on a task, brought together: seeds averaged, compared with all tokens and random."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean, stdev
from typing import Any

from ..method import SETTINGS, get_method
from ..tokens import Keep
from .results import Row, newest
from .runner import BASELINES, BLIND, FULL, label
from .sweep import fixed_options

RANDOM = "random"
REFERENCE = 0.11  # of the tokens: 64 of 576, where papers compare


@dataclass(frozen=True)
class Cell:
    """A method at one budget; its rows differ in their seed only. Accuracies are fractions."""

    rows: list[Row]

    @property
    def accuracy(self) -> float:
        return self.mean(lambda row: row["accuracy"])

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None with one seed."""
        return stdev(row["accuracy"] for row in self.rows) if len(self.rows) > 1 else None

    @property
    def tokens(self) -> float:
        return self.mean(lambda row: row["tokens"])

    @property
    def spread_of_tokens(self) -> float:
        """Standard deviation over pictures of the tokens that were kept."""
        return self.mean(lambda row: row.get("tokens_spread", 0.0))

    @property
    def count(self) -> int:
        """Tokens kept on average, to a whole one."""
        return math.floor(self.tokens + 0.5)

    @property
    def options(self) -> dict[str, Any]:
        """Of the method, without its seed."""
        return {name: value for name, value in self.rows[0]["options"].items() if name != "seed"}

    @property
    def reads(self) -> str:
        """What its method reads of that which not every encoder or prompt has: "CLS", "text"."""
        own = {name: value for name, value in self.options.items() if name not in SETTINGS}
        try:
            needs = get_method(self.rows[0]["method"], **own).needs
        except (ValueError, TypeError):  # of a method that is not registered here, or not as it was
            return ""
        kinds = {need.kind.split("_")[0] for need in needs}
        return ", ".join(name for kind, name in (("cls", "CLS"), ("text", "text")) if kind in kinds)

    def kind(self, name: str) -> float:
        return self.mean(lambda row: row["kinds"][name]["accuracy"])

    def mean(self, value: Callable[[Row], float]) -> float:
        return mean(value(row) for row in self.rows)


@dataclass
class Board:
    """What is known of a model on a task. `cells` are by (method's label, keep), in the order of the rows.

    Where `keep` is text, as "p:0.9", the number of tokens differs from picture to picture: such cells are in
    `varying`, and what was run for comparison with them is in no column of the other tables.
    """

    model: str
    task: str
    split: str
    items: int = 0
    full: Row | None = None
    blind: Row | None = None
    cells: dict[tuple[str, Keep], Cell] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def classes(self) -> int | None:
        """How many classes pictures are told apart by; None where questions are asked."""
        return next((row["classes"] for row in self.rows if "classes" in row), None)

    @property
    def things(self) -> str:
        return "pictures" if self.classes else "questions"

    @property
    def axis(self) -> str:
        """What a row's `tokens` are."""
        return (
            "patch tokens that leave the encoder"
            if self.classes
            else "image tokens that enter the language model"
        )

    @property
    def methods(self) -> list[str]:
        """Labels, the methods first and the baselines behind them; of questions the best first, judged at
        the reference budget."""
        found = list(dict.fromkeys(method for method, keep in self.cells if keep in self.keeps))
        if not self.classes:
            found.sort(key=lambda method: -self._at_reference(method))
        return sorted(found, key=is_baseline)

    def _at_reference(self, method: str) -> float:
        cell = self.cells.get((method, self.reference))
        return cell.accuracy if cell else -1.0

    @cached_property
    def keeps(self) -> list[float | int]:
        """Budgets that are the same for every picture, from the largest to the smallest."""
        beside = set()
        for method, keep in self.varying:
            cell = self.cells[method, keep]
            beside |= {(method, cell.count), (_fixed_label(cell), cell.count), (RANDOM, cell.count)}
        fixed = [(place, cell) for place, cell in self.cells.items() if not isinstance(place[1], str)]
        sizes = {place[1]: cell.tokens for place, cell in fixed if place not in beside}
        return sorted(sizes, key=lambda keep: -sizes[keep])

    @property
    def varying(self) -> list[tuple[str, str]]:
        """(method's label, keep) of the cells in which pictures keep different numbers of tokens."""
        return [(method, keep) for method, keep in self.cells if isinstance(keep, str)]

    @property
    def reference(self) -> float | int:
        """The budget by which methods are put into an order: the one nearest to 11 % of the tokens."""
        every = self.full["tokens"] if self.full else math.nan

        def share(keep: float | int) -> float:
            return keep if isinstance(keep, float) else keep / every

        return min(self.keeps, key=lambda keep: abs(share(keep) - REFERENCE))

    def fixed(self, method: str, keep: str, of: str | None = None) -> Cell | None:
        """The cell in which every picture keeps as many tokens as those of (method, keep) on average: of the
        same method, or of another label."""
        cell = self.cells[method, keep]
        of = of or _fixed_label(cell)
        found = [
            other
            for (name, budget), other in self.cells.items()
            if name == of and not isinstance(budget, str) and other.count == cell.count
        ]
        return min(found, key=lambda other: abs(other.tokens - cell.tokens), default=None)

    @property
    def kinds(self) -> list[str]:
        """Kinds of question, where there is more than one."""
        found = sorted({kind for row in self.rows for kind in row["kinds"]})
        return found if len(found) > 1 else []

    @property
    def rows(self) -> list[Row]:
        cells = [row for cell in self.cells.values() for row in cell.rows]
        return [row for row in (self.full, self.blind, *cells) if row is not None]

    @property
    def item_errors(self) -> list[str]:
        """Items that could not be asked, and why; they count neither as right nor as wrong."""
        return list(dict.fromkeys(f"{e['item']}: {e['error']}" for row in self.rows for e in row["errors"]))

    @property
    def runs(self) -> list[tuple[str, dict, float | int]]:
        """(method, options, keep) of every cell in `methods` and `keeps`, with the first of its seeds. Not
        of modules, whose tokens are none of the picture's."""
        places = [(method, keep) for keep in self.keeps for method in self.methods]
        firsts = [self.cells[place].rows[0] for place in places if place in self.cells]
        return [(row["method"], row["options"], row["keep"]) for row in firsts if "folder" not in row]

    def relative(self, cell: Cell) -> float | None:
        """Share of the accuracy with all tokens; None where that is unknown or zero."""
        return cell.accuracy / self.full["accuracy"] if self.full and self.full["accuracy"] else None

    def random(self, method: str, keep: Keep) -> Cell | None:
        """Random tokens at the budget, and schedule, of a cell."""
        if isinstance(keep, str):
            return self.fixed(method, keep, RANDOM)
        options = self.cells[method, keep].options
        schedule = {name: value for name, value in options.items() if name == "schedule"}
        return self.cells.get((label("random", schedule), keep))

    def loses(self, method: str, keep: Keep) -> bool:
        """True where the method is below random tokens at the same budget, and schedule."""
        random = self.random(method, keep)
        return random is not None and self.cells[method, keep].accuracy < random.accuracy


def _fixed_label(cell: Cell) -> str:
    row = cell.rows[0]
    return label(row["method"], fixed_options(row))


def is_baseline(method: str) -> bool:
    return method.split(" ")[0] in BASELINES


def boards(rows: list[Row]) -> list[Board]:
    """One board for each model and task; rows of failed runs are listed in its `errors`."""
    found: dict[tuple, Board] = {}
    for row in newest(rows):
        place = (row["model"], row["task"], row["split"], row["n"])
        board = found.setdefault(place, Board(*place[:3]))
        name = label(row["method"], row["options"])
        if "error" in row:
            board.errors.append(f"{name}, keep {row['keep']}: {row['error']}")
        elif row["method"] == FULL:
            board.full = row
        elif row["method"] == BLIND:
            board.blind = row
        else:
            board.cells.setdefault((name, row["keep"]), Cell([])).rows.append(row)
        board.items = max(board.items, row.get("items", 0))
    return [board for board in found.values() if board.rows]
