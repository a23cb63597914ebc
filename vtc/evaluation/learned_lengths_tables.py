"""The part of a README about lengths chosen for each image: every number of it comes from rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from .outcomes import unpack
from .ranks import bootstrap
from .results import Row
from .tables import markdown

# Student's t, two-sided 95 %, by degrees of freedom
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12)


@dataclass
class Choice:
    """What came of lengths with one mean: chosen by a halting head, dealt by chance, and the same for all."""

    halting: Row
    shuffled: list[Row]
    fixed: Row | None

    @property
    def lengths(self) -> np.ndarray:
        return np.array(self.halting["lengths"])

    @property
    def accuracies(self) -> list[float]:
        """Per cent, one for each seed."""
        return [100 * row["accuracy"] for row in self.shuffled]

    @property
    def interval(self) -> float:
        """Half of the interval in which one more shuffle falls with 95 %."""
        n = len(self.shuffled)
        return T95[min(n - 1, len(T95)) - 1] * math.sqrt(1 + 1 / n) * stdev(self.accuracies) if n > 1 else 0.0

    def gain(self) -> tuple[float, list[float]]:
        """Points that the choice is worth over dealing, and their 95 % interval over pictures."""
        own = _right(self.halting)
        others = np.mean([_right(row) for row in self.shuffled], axis=0)
        points = 100 * (own - others)  # (N,)
        return float(points.mean()), bootstrap(lambda values: float(values.mean()), points)


def _right(row: Row) -> np.ndarray:
    return np.array(unpack(row["outcomes"], row["items"]), dtype=float)


def choices(rows: Sequence[Row]) -> dict[str, list[Choice]]:
    """By folder, the smallest mean first; of each folder the weights that were run last."""
    ordered = sorted(rows, key=lambda row: row["date"])
    weights = {row["folder"]: row["method"] for row in ordered}
    found: dict[str, list[Choice]] = {}
    for folder, method in weights.items():
        own = [row for row in ordered if (row["folder"], row["method"]) == (folder, method)]
        halting = {row["mean"]: row for row in own if row["kind"] == "halting"}
        fixed = {row["k"]: row for row in own if row["kind"] == "fixed"}
        for wanted, row in sorted(halting.items()):
            dealt = {r["seed"]: r for r in own if r["kind"] == "shuffled" and r["mean"] == wanted}
            near = max(1, round(float(np.mean(row["lengths"]))))
            if dealt:
                choice = Choice(row, list(dealt.values()), fixed.get(near))
                found.setdefault(folder, []).append(choice)
    return found


def lengths_block(rows: Sequence[Row]) -> str:
    """A table for each module that has a halting head."""
    parts = []
    for folder, found in choices(rows).items():
        parts += [lengths_table(found), lengths_legend(found), _source(folder, found)]
    return "\n\n".join(parts)


def lengths_table(found: Sequence[Choice]) -> str:
    heading = ["mean", "p10", "p90", "halting head", "the same lengths, shuffled", "difference"]
    lines = [[*heading, "the same for all", "rank correlation with objects"]]
    for choice in found:
        low, high = np.quantile(choice.lengths, (0.1, 0.9))
        spread = f" ± {stdev(choice.accuracies):.1f}" if len(choice.accuracies) > 1 else ""
        points, (least, most) = choice.gain()
        fixed = choice.fixed
        lines.append([
            f"{choice.lengths.mean():.1f}", f"{low:.0f}", f"{high:.0f}",
            f"{100 * choice.halting['accuracy']:.1f}", f"{mean(choice.accuracies):.1f}{spread}",
            f"{points:+.1f} ({least:+.1f} to {most:+.1f})",
            f"{100 * fixed['accuracy']:.1f} ({fixed['k']})" if fixed else "-",
            f"{choice.halting['correlation']:.2f} ({_interval(choice.halting['correlation_interval'])})",
        ])  # fmt: skip
    return markdown(lines, "r" * len(lines[0]))


def lengths_legend(found: Sequence[Choice]) -> str:
    one = found[0]
    return (
        f"Tokens of a picture, their mean and the 10th and 90th percentile over {one.halting['items']} test "
        "pictures; accuracy in per cent with the lengths that the halting head chooses, with the same "
        f"lengths dealt to the pictures by chance (± the standard deviation over {len(one.shuffled)} seeds), "
        "and the difference in points with its 95 % interval over pictures; accuracy where every picture has "
        "the mean, to a whole token, in brackets; Spearman's rank correlation of the lengths with the number "
        "of objects, with its 95 % interval. The errors that are asked for are set on validation pictures."
    )


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def _source(folder: str, found: Sequence[Choice]) -> str:
    rows = [row for choice in found for row in (choice.halting, *choice.shuffled)]
    newest = max(rows, key=lambda row: row["date"])
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    commits = dict.fromkeys(row["versions"]["commit"] for row in rows)
    commit = ", ".join(commit[:10] for commit in commits if commit)
    commit = f" at commit {commit}" if commit else ""
    return f"`{folder}` on {newest['model']}. Made by {commands}{commit} on {newest['date'][:10]}."
