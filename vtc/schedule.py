"""How many tokens leave each block of an encoder: schedules become exact counts before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

from .tokens import check_keep, count_kept

NAMES = ("constant", "decreasing", "staged", "once")
Entry = int | float
Budget = int | float | list[Entry] | dict[int, Entry]
Schedule = str | tuple[int, ...]


def check_budget(keep: Budget) -> Budget:
    """A budget as given, or with the blocks of a dict as numbers, which JSON makes text of.

    A fraction or number as everywhere; or by block, as a list from block 0 on or a dict: a float is the share
    of tokens entering the block that leave it, an int >= 1 how many leave it, an int <= 0 how many are
    removed in it (ToMe's r, negative). Raises ValueError or TypeError for anything else.
    """
    if isinstance(keep, (Mapping, Sequence)) and not keep:
        raise ValueError("an empty budget would reduce nothing: give what is to leave at least one block")
    if isinstance(keep, Mapping):
        return {_block(block): _entry(entry) for block, entry in keep.items()}
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        return [_entry(entry) for entry in keep]
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r} is for stage='features': in an encoder give a share, or a number")
    return check_keep(keep)


def check_schedule(schedule: Schedule | Sequence[int]) -> Schedule:
    """A schedule, with the blocks of a list as a tuple. Raises ValueError for what is none."""
    if isinstance(schedule, str) and schedule in NAMES:
        return schedule
    if isinstance(schedule, Sequence) and not isinstance(schedule, str) and schedule:
        blocks = tuple(schedule)
        if all(isinstance(b, int) and b >= 0 for b in blocks) and list(blocks) == sorted(set(blocks)):
            return blocks
    raise ValueError(
        f"schedule must be one of {', '.join(NAMES)}, or ascending blocks such as (3, 6, 9), not {schedule!r}"
    )


def counts(keep: Budget, schedule: Schedule, n: int, depth: int) -> tuple[int, ...]:
    """How many of an image's n patch tokens leave each of `depth` blocks, exactly.

    schedule  "constant"    the same number is removed in every block (ToMe's r)
              "decreasing"  twice as many as that in the first block, falling linearly to none
              "staged"      the same share stays at a quarter, half and three quarters of the depth: blocks
                            3, 6, 9 of 12 (EViT, ATC, DynamicViT)
              "once"        all at a quarter of the depth
              (3, 6, 9)     the same share stays at each of these blocks
    A budget by block needs no schedule: its shares multiply, and n times their product is rounded down, as
    the codes of ATC and the token reduction benchmark do. A number above what enters the block removes
    nothing. Raises ValueError for a block that does not exist.
    """
    if isinstance(keep, (list, dict)):
        entries = keep if isinstance(keep, dict) else dict(enumerate(keep))
        return _by_block(entries, n, depth)
    k = count_kept(keep, n)
    if schedule in ("constant", "decreasing"):
        weights = [1] * depth if schedule == "constant" else list(range(depth - 1, -1, -1))
        total, removed, left = max(1, sum(weights)), 0, []
        for weight in weights:
            removed += weight
            left.append(n - math.floor((n - k) * removed / total + 0.5))
        return (*left[:-1], k)
    blocks, rate = _blocks(schedule, depth), keep if isinstance(keep, float) else k / n
    left = []
    for block in range(depth):
        done = sum(b <= block for b in blocks)
        share = rate ** (done / len(blocks))
        left.append(k if done == len(blocks) else max(k, math.floor(n * share + 1e-6)))
    return tuple(left)


def show(left: Sequence[int]) -> str:
    """Counts in a line: "196 x 3, 137 x 3" says that 196 tokens leave each of three blocks."""
    runs: list[list[int]] = []
    for count in left:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return ", ".join(f"{count} x {times}" if times > 1 else str(count) for count, times in runs)


def _blocks(schedule: Schedule, depth: int) -> list[int]:
    if schedule == "staged":
        return sorted({depth * part // 4 for part in (1, 2, 3)})
    if schedule == "once":
        return [depth // 4]
    return [_existing(block, depth) for block in schedule]


def _by_block(entries: dict[int, Entry], n: int, depth: int) -> tuple[int, ...]:
    for block in entries:
        _existing(block, depth)
    left, now, exact = [], n, float(n)
    for block in range(depth):
        entry = entries.get(block, 1.0)
        if isinstance(entry, float):
            exact *= entry
        else:
            exact = float(min(entry, now) if entry >= 1 else now + entry)
        now = max(1, min(now, math.floor(exact + 1e-6)))
        left.append(now)
    return tuple(left)


def _existing(block: int, depth: int) -> int:
    if block >= depth:
        raise ValueError(f"there is no block {block}: this encoder reduces tokens in blocks 0 to {depth - 1}")
    return block


def _block(block: object) -> int:
    if isinstance(block, str) and block.isdigit():
        return int(block)
    if isinstance(block, Integral) and not isinstance(block, bool) and block >= 0:
        return int(block)
    raise ValueError(f"a budget by block names blocks 0, 1, ..., not {block!r}")


def _entry(entry: object) -> Entry:
    if isinstance(entry, Integral) and not isinstance(entry, bool):
        return int(entry)
    if isinstance(entry, Real) and not isinstance(entry, bool) and 0 < entry <= 1:
        return float(entry)
    raise ValueError(
        "for each block give the share of tokens that stay in (0, 1], how many stay (>= 1), or how many go "
        f"(<= 0): not {entry!r}"
    )
