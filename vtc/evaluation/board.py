"""The rows of a model on a task, brought together: seeds averaged, compared with all tokens and random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from .results import Row
from .runner import BLIND, FULL, label

BASELINES = ("random", "uniform", "pool", "downsample")


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
    def options(self) -> dict[str, Any]:
        """Of the method, without its seed."""
        return {name: value for name, value in self.rows[0]["options"].items() if name != "seed"}

    def kind(self, name: str) -> float:
        return self.mean(lambda row: row["kinds"][name]["accuracy"])

    def mean(self, value: Callable[[Row], float]) -> float:
        return mean(value(row) for row in self.rows)


@dataclass
class Board:
    """What is known of a model on a task. `cells` are by (method's label, keep), in the order of the rows."""

    model: str
    task: str
    split: str
    items: int = 0
    full: Row | None = None
    blind: Row | None = None
    cells: dict[tuple[str, float | int], Cell] = field(default_factory=dict)
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
        """Labels, the methods first and the baselines behind them."""
        found = list(dict.fromkeys(method for method, _ in self.cells))
        return sorted(found, key=lambda method: is_baseline(method))

    @property
    def keeps(self) -> list[float | int]:
        """Budgets from the largest to the smallest."""
        sizes = {keep: cell.tokens for (_, keep), cell in self.cells.items()}
        return sorted(sizes, key=lambda keep: -sizes[keep])

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
        """(method, options, keep) of every cell, with the first of its seeds."""
        firsts = [cell.rows[0] for cell in self.cells.values()]
        return [(row["method"], row["options"], row["keep"]) for row in firsts]

    def relative(self, cell: Cell) -> float | None:
        """Share of the accuracy with all tokens; None where that is unknown or zero."""
        return cell.accuracy / self.full["accuracy"] if self.full and self.full["accuracy"] else None

    def loses(self, method: str, keep: float | int) -> bool:
        """True where the method is below random tokens at the same budget, and schedule."""
        cell = self.cells[method, keep]
        schedule = {name: value for name, value in cell.options.items() if name == "schedule"}
        random = self.cells.get((label("random", schedule), keep))
        return random is not None and cell.accuracy < random.accuracy


def is_baseline(method: str) -> bool:
    return method.split(" ")[0] in BASELINES


def boards(rows: list[Row]) -> list[Board]:
    """One board for each model and task; rows of failed runs are listed in its `errors`."""
    found: dict[tuple, Board] = {}
    for row in rows:
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
