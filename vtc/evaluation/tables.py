"""Markdown tables, every number of which comes from rows of results."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from ..schedule import show
from .board import Board, Cell
from .results import Row
from .runner import label, text

READS = "reads"
BELOW_RANDOM = "▾"
SLOWER = "▿"


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
ENCODER_COSTS = (
    Cost("patch tokens at the end", "tokens"),
    Cost("per block", "block_tokens"),
    Cost("GFLOPs", "gflops", 1, 3),
    Cost("of them vtc", "compressor_gflops", 1, 3),
    Cost("times as fast", "speed", 1, 2),
    Cost("time of vtc, %", "compressor_share", 1e-2, 1),
    Cost("similarity", "similarity", 1, 3),
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
    return lines_table(accuracy_lines(board), len(board.keeps))


def accuracy_lines(board: Board, corner: str = "method") -> list[list[str]]:
    """The lines of `accuracy_table`, its heading first: a method's name, what it reads, and its cells."""
    lines = [[corner, READS, *(budget(board, keep) for keep in board.keeps)]]
    for method in board.methods:
        cells = [accuracy_cell(board, method, keep) for keep in board.keeps]
        lines.append([method, reads(board, method), *cells])
    return lines if any(line[1] for line in lines[1:]) else [[line[0], *line[2:]] for line in lines]


def lines_table(lines: list[list[str]], numbers: int) -> str:
    """A Markdown table of lines whose last columns are numbers."""
    return markdown(lines, "l" * (len(lines[0]) - numbers) + "r" * numbers)


def reads(board: Board, method: str) -> str:
    """What a method reads of that which not every encoder or prompt has: "CLS", "text"."""
    return next(cell.reads for (name, _), cell in board.cells.items() if name == method)


def budget(board: Board, keep: float | int) -> str:
    """The heading of a budget: "33 %, 48 tokens"."""
    counts = {round(cell.tokens) for (_, k), cell in board.cells.items() if k == keep}
    tokens = "-".join(str(count) for count in sorted({min(counts), max(counts)})) + " tokens"
    return f"{keep:.0%}, {tokens}".replace("%", " %") if isinstance(keep, float) else tokens


def accuracy_cell(board: Board, method: str, keep: float | int) -> str:
    cell = board.cells.get((method, keep))
    if cell is None:
        return "-"
    relative = board.relative(cell)
    shown = accuracy(cell) + ("" if relative is None else f" ({100 * relative:.0f})")
    return f"{shown} {BELOW_RANDOM}" if board.loses(method, keep) else shown


def bounds(board: Board) -> str:
    """One sentence with what all tokens and no image, or chance, reach."""
    known = []
    if board.full:
        gflops = f" with {board.full['cost']['gflops']:#.3g} GFLOPs" if board.classes else ""
        known.append(f"all {board.full['tokens']:.0f} tokens {100 * board.full['accuracy']:.1f} %{gflops}")
    if board.blind:
        known.append(f"the question without its image {100 * board.blind['accuracy']:.1f} %")
    if board.classes:
        known.append(f"chance {100 / board.classes:.1f} %")
    return f"For comparison: {', '.join(known)}." if known else ""


def legend(board: Board, costs: bool = False) -> str:
    """What the numbers and marks of `accuracy_table` mean; with costs, those of `encoder_table`."""
    error = 196 * math.sqrt(0.25 / board.items)  # of a share near one half, where it is largest
    what = f"{board.items} {board.things}" + (f" of {board.classes} classes" if board.classes else "")
    parts = [f"Accuracy in per cent on {what} (95 % interval up to ± {error:.1f})"]
    if costs:
        batches = {str(row["cost"]["images"]) for row in board.rows}
        parts += [
            "then GFLOPs of a picture, those of the method included",
            f"then pictures per second where those with all tokens are 1, {'/'.join(batches)} at a time",
        ]
    elif board.full:
        parts.append("in brackets per cent of the accuracy with all tokens")
    seeds = max((len(cell.rows) for cell in board.cells.values()), default=1)
    if seeds > 1:
        parts.append(f"± the standard deviation over {seeds} seeds")
    if any(board.loses(method, keep) for method, keep in board.cells if keep in board.keeps):
        parts.append(f"{BELOW_RANDOM} below random tokens at the same budget")
    if costs and any(_speed(cell) < 1 for cell in board.cells.values()):
        parts.append(f"{SLOWER} slower than with all tokens")
    if not costs and any(cell.reads for cell in board.cells.values()):
        parts.append(f"*{READS}*: CLS, what the encoder's CLS token attends to; text, the question")
    return "; ".join(parts) + "."


def encoder_table(board: Board) -> str:
    """Accuracy, GFLOPs and speed by method, schedule and budget; below it the tokens after each block."""
    heading, *body = encoder_lines(board)
    left = "\n".join(f"- {name}: {told}" for name, told in left_blocks(board))
    table = markdown([heading, *body], "ll" + "r" * len(board.keeps))
    return f"{table}\n\nPatch tokens that leave each block:\n\n{left}"


def encoder_lines(board: Board) -> list[list[str]]:
    """The lines of `encoder_table`, its heading first: all methods of one schedule, then of the next."""
    cells = {method: cell for (method, _), cell in board.cells.items()}  # one of each method
    schedules = list(dict.fromkeys(_schedule(cell) for cell in cells.values()))
    lines = [["method", "schedule", *(budget(board, keep) for keep in board.keeps)]]
    for method in sorted(board.methods, key=lambda method: schedules.index(_schedule(cells[method]))):
        options = {name: value for name, value in cells[method].options.items() if name != "schedule"}
        name = label(cells[method].rows[0]["method"], options)
        values = [_encoder_cell(board, method, keep) for keep in board.keeps]
        lines.append([name, _schedule(cells[method]), *values])
    return lines


def left_blocks(board: Board) -> list[tuple[str, str]]:
    """For every schedule and budget the patch tokens that leave each block; those of each method if they
    differ."""
    found: dict[str, dict[str, None]] = {}
    for keep in board.keeps:
        for (_, own), cell in board.cells.items():
            if own == keep:
                name = f"{_schedule(cell)}, keep {keep:g}"
                found.setdefault(name, {}).update({show(row["cost"]["blocks"]): None for row in cell.rows})
    return [(name, " or ".join(told)) for name, told in found.items()]


def _encoder_cell(board: Board, method: str, keep: float | int) -> str:
    cell = board.cells.get((method, keep))
    if cell is None:
        return "-"
    shown = accuracy(cell) + (f" {BELOW_RANDOM}" if board.loses(method, keep) else "")
    gflops = cell.mean(lambda row: row["cost"]["gflops"])
    return f"{shown} / {gflops:#.3g} / {_speed(cell):.2f}{SLOWER if _speed(cell) < 1 else ''}"


def accuracy(cell: Cell) -> str:
    spread = "" if cell.spread is None else f" ± {100 * cell.spread:.1f}"
    return f"{100 * cell.accuracy:.1f}{spread}"


def _speed(cell: Cell) -> float:
    return cell.mean(lambda row: row["cost"]["speed"])


def _schedule(cell: Cell) -> str:
    return text(cell.options.get("schedule", ""))


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
    columns = cost_columns(board)
    return markdown([["run", *(cost.heading for cost in columns)], *body], "l" + "r" * len(columns))


def cost_columns(board: Board) -> tuple[Cost, ...]:
    return ENCODER_COSTS if board.classes else COSTS


def costs(board: Board) -> list[tuple[str, list[str]]]:
    """A name and the values of `cost_columns` for the full model and every method at every budget."""
    lines = [("all tokens", Cell([board.full]))] if board.full else []
    for keep in board.keeps:
        found = [method for method in board.methods if (method, keep) in board.cells]
        lines += [(f"{method}, keep {keep:g}", board.cells[method, keep]) for method in found]
    return [(name, [cost.show(cell) for cost in cost_columns(board)]) for name, cell in lines]
