"""What a method is given as one row: a tile of an image, a frame of a video, or several of them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..allocate import Allocation, Group, Part
from ..hosts.host import Layout
from ..record import Record, Tile
from ..tokens import Keep, count_kept

Grid = tuple[int, int]  # rows, columns
Extras = dict[str, Tensor]  # of one tile's tokens, by the names of needs: (layers, n, ...), or (n, ...)


@dataclass
class Row:
    """Tokens reduced together, their budget, and what became of them. A row of no budget stays as it is
    here: all dropped."""

    image: int
    lot: Tensor  # ()
    tile: Tile
    patches: Tensor | None  # (n, m)
    k: int
    anew: bool = False  # whether its tokens are others than before even where all stay
    in_front: bool = False  # whether the method is given what the projector was given
    extras: Extras = field(default_factory=dict)
    index: Tensor | None = None  # (k,) positions in the tile, ascending
    source: Tensor | None = None  # (n,)
    new: Tensor | None = None  # (k, D), what is put into the places at `index`

    @property
    def n(self) -> int:
        return len(self.tile.slots)


def rows_of(
    layouts: list[Layout],
    keep: Keep | None,
    allocation: Allocation,
    parts: Callable[[int], list[Part]],
    extras: Callable[[int], list[Extras]],
    most: Callable[[Grid], int] | None = None,
) -> list[Row]:
    """Each image's tiles, grouped and given budgets by the allocation; tiles that it leaves out are dropped.

    parts   an image's tiles as the allocation sees them
    extras  what the method needs of each tile of an image
    most    the budget of a tile by its grid, where keep is None
    """
    rows = []
    for image, layout in enumerate(layouts):
        own = extras(image)
        if keep is None:
            lot = lots_of(layout.pixels[None])[0]
            budgets = [most(tile.grid) for tile in layout.tiles]
            rows += [_row(image, lot + tile, layout, [tile], k, own) for tile, k in enumerate(budgets)]
            continue
        k = count_kept(keep, layout.n)
        single = [([0], k)] if len(layout.tiles) == 1 else None
        lot = lots_of(layout.pixels[None])[0]
        groups = single or _checked(allocation.split(parts(image), k), layout, k, allocation.name)
        for number, (tiles, budget) in enumerate(groups):
            rows.append(_row(image, lot + number, layout, tiles, budget, own))
    return rows


def _checked(groups: list[Group], layout: Layout, k: int, name: str) -> list[Group]:
    """Raises RuntimeError unless k tokens are shared over groups of different tiles, none above its size."""
    tiles = [tile for own, _ in groups for tile in own]
    sizes = [sum(len(layout.tiles[tile].slots) for tile in own) for own, _ in groups]
    fits = all(0 <= budget <= size for (_, budget), size in zip(groups, sizes))
    if len(set(tiles)) < len(tiles) or not fits or sum(budget for _, budget in groups) != k:
        raise RuntimeError(
            f"allocate='{name}' gave {groups} where {k} tokens were to share: mend its split()"
        )
    return groups


def whole_rows(layouts: list[Layout]) -> list[Row]:
    """Each tile of each image with a budget of all its tokens."""
    return [
        _row(image, lots_of(layout.pixels[None])[0] + tile, layout, [tile], len(layout.tiles[tile].slots), [])
        for image, layout in enumerate(layouts)
        for tile in range(len(layout.tiles))
    ]


def _row(image: int, lot: Tensor, layout: Layout, numbers: list[int], k: int, extras: list[Extras]) -> Row:
    """Tiles that are one row have no common grid."""
    tiles = [layout.tiles[number] for number in numbers]
    patches = None if layout.patches is None else [layout.patches[number] for number in numbers]
    if len(tiles) == 1:
        own = extras[numbers[0]] if extras else {}
        return Row(image, lot, tiles[0], patches and patches[0], k, extras=own)
    slots = torch.cat([tile.slots for tile in tiles])
    own = [extras[number] for number in numbers] if extras else [{}]
    joined = {name: torch.cat([each[name] for each in own], dim=_token_axis(name)) for name in own[0]}
    return Row(image, lot, Tile(slots, (1, len(slots))), patches and torch.cat(patches), k, extras=joined)


def _token_axis(name: str) -> int:
    return 0 if name == "vision" else 1


def lots_of(pictures: Tensor) -> Tensor:
    """A number that the pixels of an image decide, exactly: no batch size or order of summation changes it,
    and tiles of zeros that pad it to another image's number of tiles add nothing. (B, ...) -> (B,)."""
    sample = pictures.detach().flatten(1)[:, ::97].contiguous()  # some thousand numbers tell pictures apart
    bits = sample.view(torch.int16 if sample.itemsize == 2 else torch.int32).long()
    return (bits * torch.arange(1, 2 * bits.shape[1], 2, device=bits.device)).sum(dim=1)


def assemble(feature: Tensor, layout: Layout, rows: list[Row]) -> tuple[Tensor, Record]:
    """Puts an image's kept tokens in their places and marks all others, newline tokens among them. Where all
    patch tokens stay, or as many are made, the others do too."""
    kept = [row for row in rows if row.k]
    complete = rows and all(row.k == row.n for row in rows) and sum(row.n for row in rows) == layout.n
    if complete and not any(row.anew for row in rows):
        return feature, whole(feature, layout)
    places = torch.cat([row.tile.slots[row.index] for row in kept])  # (K,)
    if complete:
        return feature.index_copy(0, places, torch.cat([row.new for row in kept])), whole(feature, layout)
    marked = torch.full_like(feature, float("nan")).index_copy(
        0, places, torch.cat([row.new for row in kept])
    )
    index = places.sort().values
    source = torch.full((len(feature),), -1, dtype=torch.long, device=feature.device)
    for row in kept:
        slot = torch.searchsorted(index, row.tile.slots[row.index])  # of the tile's tokens within the image's
        source[row.tile.slots] = torch.where(row.source < 0, -1, slot[row.source.clamp_min(0)])
    return marked, _record(index, source, layout)


def whole(feature: Tensor, layout: Layout) -> Record:
    every = torch.arange(len(feature), device=feature.device)
    return _record(every, every, layout)


def _record(index: Tensor, source: Tensor, layout: Layout) -> Record:
    entering = {"features": len(source), "decoder": len(index)}
    return Record(index, source, layout.tiles[0].grid, layout.tiles, entering)
