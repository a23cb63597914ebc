"""Accuracy against kept tokens as PNG files."""

from __future__ import annotations

from pathlib import Path

from .board import Board
from .style import looks

INK, SOFT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
FONT = {"font.family": ["DejaVu Sans"], "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK}


def plot_accuracy(board: Board, path: str | Path) -> None:
    """One line per method; dashed is the model with all tokens, dotted the question without its image."""
    import matplotlib

    with matplotlib.rc_context(FONT):
        figure = blank_figure(7.2, 4.4)
        axes = figure.add_subplot()
        _curves(axes, board)
        axes.set_xlabel(board.axis)
        axes.set_ylabel("accuracy (%)")
        axes.set_title(_title(board), loc="left", fontsize=11, fontweight="bold", pad=12)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=2.6)
        figure.savefig(path, dpi=200)


def plot_kinds(board: Board, path: str | Path) -> None:
    """The same, a small picture for each kind of question."""
    import matplotlib

    columns = min(4, len(board.kinds) + 1)
    rows = -(-(len(board.kinds) + 1) // columns)  # one more place, for the legend
    with matplotlib.rc_context(FONT):
        figure = blank_figure(2.8 * columns, 2.4 * rows)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for i, kind in enumerate(board.kinds):
            axes = grid[i]
            _curves(axes, board, kind, scale=0.65)
            axes.set_title(kind, loc="left", fontsize=10, fontweight="bold")
            axes.tick_params(labelbottom=i + columns >= len(board.kinds))  # no curves below it
        for axes in grid[len(board.kinds) :]:
            axes.axis("off")
        handles, names = grid[0].get_legend_handles_labels()
        grid[len(board.kinds)].legend(handles, names, loc="center left", frameon=False, handlelength=2.6)
        figure.supxlabel(board.axis, fontsize=9.5)
        figure.supylabel("accuracy (%)", fontsize=9.5)
        figure.savefig(path, dpi=200)


def blank_figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # without pyplot, which would keep every figure and look for a display
    return figure


def _title(board: Board) -> str:
    return f"{board.model.split('@')[0]} on {board.task}, {board.items} {board.things}"


def _curves(axes, board: Board, kind: str | None = None, scale: float = 1) -> None:
    found = looks(board)
    others = [method for method, look in found.items() if look.plain]
    for method, look in found.items():
        cells = [board.cells[method, keep] for keep in board.keeps if (method, keep) in board.cells]
        y = [100 * (cell.kind(kind) if kind else cell.accuracy) for cell in cells]
        (line,) = axes.plot(
            [cell.tokens for cell in cells], y, color=look.colour, label=_name(method, others)
        )
        line.set(
            marker=look.marker,
            markersize=6 * scale,
            linewidth=look.width * scale,
            zorder=1.5 if look.plain else 2 if look.dashes else 3,
        )
        line.set(markeredgecolor=look.colour if look.dashes else "white", markeredgewidth=0.8 * scale)
        if look.dashes:
            line.set_dashes(look.dashes)
    for row, dashes in ((board.full, (6, 3)), (board.blind, (1, 2))):
        if row:
            level = 100 * (row["kinds"][kind] if kind else row)["accuracy"]
            name = f"all {row['tokens']:.0f} tokens" if row is board.full else "no image"
            axes.axhline(level, color=INK, linewidth=1.2, dashes=dashes, label=name, zorder=1)
    _ticks(axes, board)


def _name(method: str, others: list[str]) -> str:
    """What the legend says: of the plain lines one stands for all, and an underscore hides a line."""
    if method not in others:
        return method
    return f"{len(others)} other methods" if method == others[-1] else f"_{method}"


def _ticks(axes, board: Board) -> None:
    cells = [cell for (_, keep), cell in board.cells.items() if keep in board.keeps]
    counts = sorted({round(cell.tokens) for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.tick_params(length=0, colors=SOFT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylim(-2, 102)
    axes.set_yticks(range(0, 101, 20))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
