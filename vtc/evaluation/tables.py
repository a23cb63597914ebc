"""Markdown tables, every number of which comes from rows of results."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from .board import Board, Cell
from .results import Row

BELOW_RANDOM = "▾"


@dataclass(frozen=True)
class Cost:
    """A column of the table of costs: a field of a row's `cost`, or of the row itself, divided by `unit`."""

    heading: str
    field: str
    unit: float = 1
    digits: int = 0

    def show(self, cell: Cell) -> str:
        values = [(row | row["cost"])[self.field] for row in cell.rows]
        known = [value for value in values if value is not None]
        return f"{mean(known) / self.unit:.{self.digits}f}" if known else "-"


COSTS = (
    Cost("image tokens", "tokens"),
    Cost("tokens per layer, with text", "decoder_tokens"),
    Cost("prefill GFLOPs", "tflops_total", 1e-3, 2),
    Cost("KV cache, KiB", "kv_bytes", 1024),
    Cost("time to first token, %", "first_token_ratio", 1e-2),
    Cost("of it vtc, %", "compressor_share", 1e-2, 1),
    Cost("peak memory, MiB", "peak_memory_bytes", 2**20, 1),
)


def markdown(cells: Iterable[Iterable[str]], align: str) -> str:
    """A table whose first row is the heading; `align` has an l or r per column."""
    escaped = [[text.replace("|", "\\|") for text in row] for row in cells]
    heading, *body = [f"| {' | '.join(row)} |" for row in escaped]
    rule = "|".join({"l": "---", "r": "--:"}[letter] for letter in align)
    return "\n".join([heading, f"|{rule}|", *body])


def accuracy_table(board: Board) -> str:
    """Accuracy in per cent by method and budget, in brackets the share of the accuracy with all tokens."""
    heading = ["method", *(budget(board, keep) for keep in board.keeps)]
    return markdown([heading, *accuracies(board)], "l" + "r" * len(board.keeps))


def accuracies(board: Board) -> list[list[str]]:
    """A line for each method: its name and its cell at each budget."""
    return [
        [method, *(accuracy_cell(board, method, keep) for keep in board.keeps)] for method in board.methods
    ]


def budget(board: Board, keep: float | int) -> str:
    """The heading of a budget: "33 %, 48 tokens"."""
    counts = {round(cell.tokens) for (_, k), cell in board.cells.items() if k == keep}
    tokens = "-".join(str(count) for count in sorted({min(counts), max(counts)})) + " tokens"
    return f"{keep:.0%}, {tokens}".replace("%", " %") if isinstance(keep, float) else tokens


def accuracy_cell(board: Board, method: str, keep: float | int) -> str:
    cell = board.cells.get((method, keep))
    if cell is None:
        return "-"
    text = f"{100 * cell.accuracy:.1f}"
    if cell.spread is not None:
        text += f" ± {100 * cell.spread:.1f}"
    relative = board.relative(cell)
    text += "" if relative is None else f" ({100 * relative:.0f})"
    return f"{text} {BELOW_RANDOM}" if board.loses(method, keep) else text


def bounds(board: Board) -> str:
    """One sentence with what all tokens and no image reach."""
    known = []
    if board.full:
        known.append(f"all {board.full['tokens']:.0f} tokens {100 * board.full['accuracy']:.1f} %")
    if board.blind:
        known.append(f"the question without its image {100 * board.blind['accuracy']:.1f} %")
    return f"For comparison: {', '.join(known)}." if known else ""


def legend(board: Board) -> str:
    """What the numbers and marks of `accuracy_table` mean."""
    error = 196 * math.sqrt(0.25 / board.items)  # of a share near one half, where it is largest
    parts = [f"Accuracy in per cent on {board.items} questions (95 % interval up to ± {error:.1f})"]
    if board.full:
        parts.append("in brackets per cent of the accuracy with all tokens")
    seeds = max((len(cell.rows) for cell in board.cells.values()), default=1)
    if seeds > 1:
        parts.append(f"± the standard deviation over {seeds} seeds")
    if any(board.loses(*place) for place in board.cells):
        parts.append(f"{BELOW_RANDOM} below random tokens at the same budget")
    return "; ".join(parts) + "."


def kinds_table(board: Board, keep: float | int) -> str:
    """Accuracy in per cent by method and kind of question at one budget."""
    kinds = board.kinds
    rows = {"all tokens": board.full, "no image": board.blind}
    body = [[name, *(_kind(row, kind) for kind in kinds)] for name, row in rows.items() if row]
    for method in board.methods:
        cell = board.cells.get((method, keep))
        body += [[method, *(f"{100 * cell.kind(kind):.1f}" for kind in kinds)]] if cell else []
    return markdown([["method", *kinds], *body], "l" + "r" * len(kinds))


def _kind(row: Row, kind: str) -> str:
    return f"{100 * row['kinds'][kind]['accuracy']:.1f}"


def costs_table(board: Board) -> str:
    """What each method costs at each budget."""
    body = [[name, *values] for name, values in costs(board)]
    return markdown([["run", *(cost.heading for cost in COSTS)], *body], "l" + "r" * len(COSTS))


def costs(board: Board) -> list[tuple[str, list[str]]]:
    """A name and the values of COSTS for the full model and every method at every budget."""
    lines = [("all tokens", Cell([board.full]))] if board.full else []
    for keep in board.keeps:
        found = [method for method in board.methods if (method, keep) in board.cells]
        lines += [(f"{method}, keep {keep:g}", board.cells[method, keep]) for method in found]
    return [(name, [cost.show(cell) for cost in COSTS]) for name, cell in lines]
