"""How the budget of an image is shared over its tiles, or that of a video over its frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from .method import Need
from .record import Tile
from .tokens import share

# Numbers of the tiles that are reduced as one row, and the budget of that row.
Group = tuple[list[int], int]


@dataclass(frozen=True)
class Part:
    """A tile or frame as an allocation sees it.

    extras  what the allocation declared in `needs`, of this tile's tokens, read as attributes:
            part.cls_attention (layers, n)
    """

    tile: Tile
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.tile.slots)

    def __getattr__(self, name: str) -> Tensor:
        extras = self.__dict__.get("extras", {})
        if name in extras:
            return extras[name]
        raise AttributeError(f"a tile carries no '{name}', only what `needs` declares: {sorted(extras)}")


@dataclass(frozen=True)
class Allocation:
    """A rule that shares a budget over tiles. Its fields are its options; any method can carry it."""

    name: ClassVar[str]

    @property
    def needs(self) -> tuple[Need, ...]:
        """What `split` reads from the parts beyond their tiles."""
        return ()

    def split(self, parts: Sequence[Part], k: int) -> list[Group]:
        """Budgets that sum to k, none above its group's size; tiles in no group are dropped."""
        raise NotImplementedError

    def shown(self) -> str | dict[str, Any]:
        return shown(self)


ALLOCATIONS: dict[str, type[Allocation]] = {}


def allocation(cls: type[Allocation]) -> type[Allocation]:
    """Class decorator that makes an allocation known by its `name`."""
    ALLOCATIONS[cls.name] = cls
    return cls


def get_allocation(given: str | dict[str, Any] | Allocation) -> Allocation:
    """An allocation by name, or as `shown` tells it. Raises ValueError for one that there is not."""
    from . import allocations  # noqa: F401  those that come from papers register themselves

    if isinstance(given, Allocation):
        return given
    options = dict(given) if isinstance(given, dict) else {"name": given}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in ALLOCATIONS:
        raise ValueError(f"allocate must be one of {', '.join(sorted(ALLOCATIONS))}, not {name!r}")
    return built(ALLOCATIONS[name], options, f"allocate='{name}'")


def shown(rule: Any) -> str | dict[str, Any]:
    """A dataclass with a name as `compress()` takes it and JSON holds it: the name, with its options where
    they are others than usual."""
    options = {option.name: getattr(rule, option.name) for option in dataclasses.fields(rule)}
    changed = any(options[option.name] != option.default for option in dataclasses.fields(rule))
    return {"name": rule.name, **options} if changed else rule.name


def built(cls: type[Any], options: dict[str, Any], what: str) -> Any:
    """A dataclass by its options. Raises ValueError for one that it has not, or of a wrong type."""
    has = [option.name for option in dataclasses.fields(cls)]
    if unknown := sorted(set(options) - set(has)):
        raise ValueError(f"{what} has no option {unknown[0]!r}; its options: {', '.join(has) or 'none'}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"{what} has options of a wrong type, {options}: {error}") from error


@allocation
@dataclass(frozen=True)
class Proportional(Allocation):
    """Each tile by its size: every frame of a video gets the same, every tile is reduced by itself."""

    name = "proportional"

    def split(self, parts: Sequence[Part], k: int) -> list[Group]:
        return alone(share(k, [part.n for part in parts]))


@allocation
@dataclass(frozen=True)
class Uniform(Allocation):
    """Each tile the same number, whatever its size; what does not fit into a small one goes to the others."""

    name = "uniform"

    def split(self, parts: Sequence[Part], k: int) -> list[Group]:
        return alone(weighted(k, [1.0] * len(parts), [part.n for part in parts]))


@allocation
@dataclass(frozen=True)
class Whole(Allocation):
    """As many whole tiles as fit, spread evenly over their sequence; one more gets what is left.

    With `uniform` this is the temporal baseline of evenly spaced frames.
    """

    name = "whole"

    def split(self, parts: Sequence[Part], k: int) -> list[Group]:
        sizes = [part.n for part in parts]
        total, budgets = sum(sizes), [0] * len(sizes)
        tiles = min(len(sizes), max(1, -(-k * len(sizes) // total)))  # how many get anything
        chosen = [(2 * i + 1) * len(sizes) // (2 * tiles) for i in range(tiles)]
        rest = [tile for tile in range(len(sizes)) if tile not in chosen]  # where tiles differ in size
        for tile in chosen + rest:
            budgets[tile] = min(sizes[tile], k)
            k -= budgets[tile]
        return alone(budgets)


@allocation
@dataclass(frozen=True)
class Joint(Allocation):
    """No split: all tiles are one row in which tokens compete, and the method decides."""

    name = "joint"

    def split(self, parts: Sequence[Part], k: int) -> list[Group]:
        return [(list(range(len(parts))), k)]


@allocation
@dataclass(frozen=True)
class Thumbnail(Allocation):
    """The thumbnail keeps its own tokens as far as the budget goes, the crops compete for the rest in one
    row. Without a thumbnail all tiles do."""

    name = "thumbnail"

    def split(self, parts: Sequence[Part], k: int) -> list[Group]:
        whole = [number for number, part in enumerate(parts) if part.tile.thumbnail]
        crops = [number for number in range(len(parts)) if number not in whole]
        first = min(k, sum(parts[number].n for number in whole))
        groups = [(whole, first), (crops, k - first)]
        return [(numbers, budget) for numbers, budget in groups if numbers and budget]


def alone(budgets: Sequence[int]) -> list[Group]:
    """Each tile by itself."""
    return [([number], budget) for number, budget in enumerate(budgets)]


def weighted(k: int, weights: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Splits k by weight, exactly: largest remainders get the odd tokens, earlier tiles first on ties; what
    exceeds a tile's size goes to the others by their weights."""
    budgets, open_ = [0] * len(sizes), [i for i in range(len(sizes)) if sizes[i]]
    while k and open_:
        total = sum(weights[i] for i in open_)
        parts = [weights[i] / total if total > 0 else 1 / len(open_) for i in open_]
        full = [i for i, part in zip(open_, parts) if budgets[i] + k * part >= sizes[i]]
        if full:  # a tile that is filled leaves more to the others, which may then be filled as well
            for i in full:
                taken = min(k, sizes[i] - budgets[i])
                budgets[i] += taken
                k -= taken
            open_ = [i for i in open_ if i not in full]
            continue
        exact = [k * part for part in parts]
        order = sorted(range(len(open_)), key=lambda j: (int(exact[j]) - exact[j], j))
        for j, i in enumerate(open_):
            budgets[i] += int(exact[j])
        for j in order[: k - sum(map(int, exact))]:
            budgets[open_[j]] += 1
        k = 0
    return budgets
