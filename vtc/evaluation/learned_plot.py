"""Pictures of modules with weights: beside training-free methods, and lengths chosen for each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from .board import RANDOM
from .learned_lengths_tables import Choice
from .learned_tables import Contest
from .plot import FONT, GRID, INK, SOFT, blank_figure
from .style import COLOURS, DASHES, GREYS, MARKERS, PLAIN

FREE = GREYS[2]
LEAST_LOSS = 0.1  # points: below, a loss is drawn here


def plot_learned(contest: Contest, path: str | Path) -> None:
    """Accuracy against tokens, and what is lost of all tokens, on logarithmic axes."""
    import matplotlib

    with matplotlib.rc_context(FONT):
        figure = blank_figure(9.6, 5.0)
        left, right = figure.subplots(1, 2)
        for axes, value in ((left, _accuracy), (right, _loss)):
            _lines(axes, contest, value)
            counts = sorted({int(keep) for keep in contest.board.keeps})
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_xlabel(contest.board.axis)
            _plain(axes)
        left.axhline(
            _percent(contest.board.full), color=INK, linewidth=1.2, dashes=(6, 3), label=_all(contest)
        )
        if contest.board.blind:
            left.axhline(
                _percent(contest.board.blind), color=INK, linewidth=1.2, dashes=(1, 2), label="no image"
            )
        left.set_ylim(-2, 102)
        left.set_title("accuracy (%)", loc="left", fontsize=10.5, fontweight="bold", pad=10)
        _third(right, contest)
        right.set_yscale("log")
        right.set_ylim(LEAST_LOSS, 100)
        right.set_yticks([0.1, 0.3, 1, 3, 10, 30, 100], ["≤ 0.1", "0.3", "1", "3", "10", "30", "100"])
        right.minorticks_off()
        right.set_title(
            "points lost against all tokens", loc="left", fontsize=10.5, fontweight="bold", pad=10
        )
        handles, names = left.get_legend_handles_labels()
        more, others = right.get_legend_handles_labels()
        new = [(handle, name) for handle, name in zip(more, others, strict=True) if name not in names]
        handles, names = handles + [handle for handle, _ in new], names + [name for _, name in new]
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, handlelength=2.6)
        figure.savefig(path, dpi=200)


def _lines(axes, contest: Contest, value) -> None:
    board = contest.board
    others = [method for method in contest.free if not method.startswith(RANDOM)]
    for i, method in enumerate(others):
        name = f"{len(others)} training-free methods" if i == 0 else f"_{method}"
        axes.plot(*_points(contest, method, value), color=PLAIN, linewidth=1.0, zorder=1.5, label=name)
    best = {keep: contest.best(keep) for keep in board.keeps}
    places = [(keep, value(contest, method, keep)) for keep, method in best.items() if method]
    (line,) = axes.plot(*zip(*places, strict=True), color=FREE, linewidth=2.0, marker="s", markersize=5)
    line.set(label="the best of them at each number", markeredgecolor="white", zorder=3)
    if RANDOM in contest.free:
        (line,) = axes.plot(*_points(contest, RANDOM, value), color=GREYS[0], linewidth=1.4, marker="x")
        line.set(dashes=DASHES[0], label=RANDOM, zorder=2)
    flagship = contest.flagship
    for i, method in enumerate(sorted(contest.learned, key=lambda method: method != flagship)):
        first = method == flagship
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}
        (line,) = axes.plot(*_points(contest, method, value), linewidth=2.6 if first else 1.5, **look)
        line.set(markersize=7 if first else 5, markeredgecolor="white", markeredgewidth=0.8)
        line.set(label=contest.name(method), zorder=5 if first else 4)


def _third(axes, contest: Contest) -> None:
    """A third of what the best training-free method loses, where few tokens are left."""
    places = [(keep, contest.best(keep)) for keep in contest.few]
    places = [(keep, max(LEAST_LOSS, contest.loss(method, keep) / 3)) for keep, method in places if method]
    if contest.flagship and places:
        label = "a third of what the best loses"
        axes.plot(*zip(*places, strict=True), color=FREE, linewidth=1.2, dashes=(2, 2), label=label, zorder=2)


def _points(contest: Contest, method: str, value) -> tuple[list[float], list[float]]:
    keeps = [keep for keep in contest.board.keeps if contest.cell(method, keep)]
    return keeps, [value(contest, method, keep) for keep in keeps]


def _accuracy(contest: Contest, method: str, keep: int) -> float:
    return 100 * contest.cell(method, keep).accuracy


def _loss(contest: Contest, method: str, keep: int) -> float:
    return max(LEAST_LOSS, contest.loss(method, keep))


def _percent(row: dict) -> float:
    return 100 * row["accuracy"]


def _all(contest: Contest) -> str:
    return f"all {contest.board.full['tokens']:.0f} tokens"


def plot_lengths(found: Sequence[Choice], path: str | Path) -> None:
    """Accuracy against the mean length, and the mean length of pictures by their number of objects."""
    import matplotlib

    with matplotlib.rc_context(FONT):
        figure = blank_figure(9.6, 4.0)
        left, right = figure.subplots(1, 2)
        means = [float(choice.lengths.mean()) for choice in found]
        own = [_percent(choice.halting) for choice in found]
        (line,) = left.plot(means, own, color=COLOURS[0], marker="o", linewidth=2.4, markersize=7)
        line.set(label="the halting head's own", markeredgecolor="white", zorder=4)
        left.errorbar(
            means, [mean(choice.accuracies) for choice in found], [choice.interval for choice in found],
            color=COLOURS[1], marker="s", linewidth=2.0, markersize=5, capsize=4, elinewidth=1.4, zorder=3,
            label=f"the same, shuffled ({len(found[0].shuffled)} seeds, 95 %)",
        )  # fmt: skip
        fixed = [choice.fixed for choice in found if choice.fixed]
        if fixed:
            (line,) = left.plot([row["k"] for row in fixed], [_percent(row) for row in fixed])
            line.set(color=GREYS[0], marker="x", linewidth=1.4, dashes=DASHES[0], zorder=2)
            line.set_label("the same for all pictures")
        left.set_xticks(means, [f"{value:.0f}" for value in means])
        left.set_xlabel("image tokens of a picture, on average")
        left.set_title("accuracy (%) by lengths", loc="left", fontsize=10.5, fontweight="bold", pad=10)
        left.legend(loc="lower right", frameon=False)
        for i, choice in enumerate(found):
            by = {int(count): length for count, length in choice.halting["by_objects"].items()}
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            right.plot(list(by), list(by.values()), linewidth=1.8, markeredgecolor="white", **look)
            last = max(by)
            right.annotate(
                f"mean {means[i]:.0f}", (last, by[last]), (8, 0), textcoords="offset points", va="center"
            )
        counts = sorted({int(count) for choice in found for count in choice.halting["by_objects"]})
        right.set_xticks(counts)
        right.set_xlim(min(counts) - 0.3, max(counts) + 0.7)
        right.set_ylim(bottom=0)
        right.set_xlabel("objects in the picture")
        right.set_title(
            "tokens that the halting head gives", loc="left", fontsize=10.5, fontweight="bold", pad=10
        )
        for axes in (left, right):
            _plain(axes)
        figure.savefig(path, dpi=200)


def _plain(axes) -> None:
    axes.minorticks_off()
    axes.tick_params(length=0, colors=SOFT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
