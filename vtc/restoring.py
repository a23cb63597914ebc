"""What becomes of tokens that a pruning method drops: averaged into kept ones, by an add-on to any method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .allocate import built, shown
from .nearest import nearest
from .tokens import Reduction, Tokens


@dataclass(frozen=True)
class Nearest:
    """Every dropped token is averaged, by size, into the kept token of its tile that its features are most
    like. Tiles that keep none are gone."""

    name: ClassVar[str] = "nearest"
    positions: ClassVar[str | None] = None  # what positions= is where nothing is said; None: the method's own
    biases: ClassVar[bool] = False  # whether the attention of the decoder is to know of sizes

    def extend(self, tokens: Tokens, reduction: Reduction) -> Reduction:
        """Puts the tokens that a pruning dropped into its slots. RuntimeError for a reduction that merges."""
        if not reduction.pruned:
            raise RuntimeError(f"merge='{self.name}' takes what a method drops, and this one merges already")
        if reduction.k == tokens.n:
            return reduction
        slot = reduction.source.gather(1, nearest(tokens.x, reduction.index))  # (B, N)
        return replace(reduction, source=slot, weight=tokens.size, pruned=False)

    def shown(self) -> str | dict[str, Any]:
        return shown(self)


@dataclass(frozen=True)
class Restore(Nearest):
    """Dropped tokens join the most similar kept one of their tile, and the decoder attends to a group as to
    its members (RESTORE, arXiv:2606.01711).

    place     where a group stands: "median", at its middle member; "kept", where the kept token stood
    sizes     adds the logarithm of a group's size to the logits of its key. In the first layer all groups of
              a prompt have their mean size
    distance  adds log(2 - g(d)) to the logits of a query and any key, text too, d positions apart, g being
              the mean of cos(d f) over the frequencies f of the decoder's rotary positions
    tokens    "prompt": tokens behind the forward that reads the pictures, generated ones among them, get the
              sizes only, in all layers; "all": they are treated as those of the prompt, so that it makes no
              difference whether they come from a cache

    Departures: the anchors are the tokens that the method keeps, whose number is the budget; the paper picks
    its own by density and distinctness. Only prompts that lost a token are corrected, so that others in the
    batch stay as they are. Positions are the ones in the full prompt, as in the paper, unless compress() says
    positions="repack".
    """

    name = "restore"
    positions = "keep"

    place: str = "median"
    sizes: bool = True
    distance: bool = True
    tokens: str = "prompt"

    def __post_init__(self):
        if self.place not in ("median", "kept"):
            raise ValueError(f"place must be 'median' or 'kept', not {self.place!r}")
        if self.tokens not in ("prompt", "all"):
            raise ValueError(f"tokens must be 'prompt' or 'all', not {self.tokens!r}")
        for option in ("sizes", "distance"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option} is True or False, not {getattr(self, option)!r}")

    @property
    def biases(self) -> bool:
        return self.sizes or self.distance

    def extend(self, tokens: Tokens, reduction: Reduction) -> Reduction:
        merged = super().extend(tokens, reduction)
        if self.place == "median":
            merged = replace(merged, index=medians(merged.source, merged.k))
        return merged.ascending()


def medians(source: Tensor, k: int) -> Tensor:
    """The middle member of each slot, the lower of two, where every token is in one: (B, N) -> (B, K)."""
    order = source.argsort(dim=1, stable=True)  # slot by slot, ascending positions in each
    counts = torch.zeros_like(source[:, :k]).scatter_add(1, source, torch.ones_like(source))  # (B, K)
    first = counts.cumsum(dim=1) - counts
    return order.gather(1, first + (counts - 1) // 2)


MERGES: dict[str, type[Nearest]] = {cls.name: cls for cls in (Nearest, Restore)}


def get_merge(given: str | dict[str, Any] | Nearest | None) -> Nearest | None:
    """An add-on by name, or as `shown` tells it. Raises ValueError for one that there is not."""
    if given is None or isinstance(given, Nearest):
        return given
    options = dict(given) if isinstance(given, dict) else {"name": given}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in MERGES:
        raise ValueError(f"merge must be None or one of {', '.join(MERGES)}, not {name!r}")
    return built(MERGES[name], options, f"merge='{name}'")
