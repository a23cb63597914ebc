"""What all modules with weights share: options, saving and loading, the interface of those that resample."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..hosts.opening import open_model
from ..tokens import Reduction
from . import checkpoints
from .adapter import Adapter
from .fingerprint import fingerprint
from .grids import spread

if TYPE_CHECKING:
    from ..method import Method

Grid = tuple[int, int]  # rows, columns


class LearnedModule(nn.Module):
    """A module with a name, options and weights that go to a folder and come back.

    A subclass is decorated with `register_module` and defines

    Config   a frozen dataclass of its options; `self.config` is one
    rename   where weights of it are published in another layout: their state dict turned into this one's
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    weights: ClassVar[str] = "none published"  # the licence of the published weights
    Config: ClassVar[type]
    prefixes: ClassVar[tuple[str, ...]] = ()  # of its parameters in published models that hold more

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.Config):
            raise TypeError(f"{type(self).__name__} takes a {type(self).__name__}.Config, not {config!r}")
        self.config = config
        self.folder: str | None = None  # from which it was loaded, or a name on the Hub
        self.host: dict[str, Any] | None = None  # see `trained_on`
        self.adapter: Adapter | None = None  # see `adapt`

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights; float32 where it has none."""
        return next((weight.dtype for weight in self.parameters()), torch.float32)

    def trained_on(self, model: nn.Module | None) -> Self:
        """Notes the host that it works with, as `save_pretrained` keeps it: kind, widths, and a few of its
        weights. `vtc.compress()` then refuses hosts with another encoder or projector, and where there is an
        adapter with another language model. None: any host will do."""
        self.host = None if model is None else fingerprint(model)
        return self

    def adapt(self, model: nn.Module, rank: int = 16, alpha: float | None = None) -> Self:
        """Gives it low-rank updates of a host's language model, which are trained, saved and attached along
        with it (LoRA, arXiv:2106.09685). A fresh one adds nothing. Raises ValueError where there is none."""
        decoder = getattr(open_model(model), "decoder", None)
        if decoder is None:
            raise ValueError(f"{type(model).__name__} has no language model to adapt: leave the adapter out")
        self.adapter = Adapter.of(decoder, rank, alpha)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, which `from_pretrained` reads."""
        checkpoints.save(self, folder)
        self.folder = str(folder)

    def push_to_hub(self, name: str, *, private: bool | None = None) -> str:
        """Saves it into a repository on the Hugging Face Hub, made if there is none; the address of it."""
        return checkpoints.push(self, name, private)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, **options: Any
    ) -> LearnedModule:
        """A module with its weights, in evaluation mode, from what `save_pretrained` wrote: a folder, or by
        its name on the Hugging Face Hub.

        Called on the class of a module it reads published weights too: a file, or a folder of files that
        together hold them, with `options` for those of its Config that differ from their defaults. Numbers of
        heads and windows change no shape of a weight: they are taken as given.
        Raises ValueError for another module's weights, and for weights that are missing, unknown or of
        another shape.
        """
        return checkpoints.load(cls, name, revision, options)

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a published state dict what lies under one of `prefixes`, without it; all where nothing does."""
        for prefix in cls.prefixes:
            found = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
            if found:
                return found
        return state


class Resampler(LearnedModule):
    """Features of N tokens of an image in, k tokens out. A subclass defines `forward`, and `counts` or
    `counts_for` where not every number is possible.

    forward(x, grid, k=None, levels=()) -> (B, k, out_width)

    x       (B, N, in_width), row by row without CLS, of grid = (rows, columns); N = rows * columns
    k       how many tokens; None: as many as there can be
    levels  features of further layers of the encoder, each (B, N, in_width), for modules with `layers`

    `Resampler.checked` is the first thing a `forward` calls.

    `vtc.compress(model, module, keep=k)` puts it into a host, at the place that the class names:

    "before"   between encoder and projector, whose in_width is the width of both features and tokens. Behind
               a projector that does not work token by token, where the language model is as wide
    "instead"  it is the projector: the host's own runs, and its output is not used
    "behind"   between projector and language model
    """

    ordered: ClassVar[bool] = False  # the first k of more tokens are the tokens of k
    place: ClassVar[str] = "before"
    stages: ClassVar[tuple[str, ...]] = ("features",)  # of a host, its default first

    @property
    def in_width(self) -> int:
        return self.config.in_width

    @property
    def out_width(self) -> int:
        """The width of the features where the options name no other."""
        return getattr(self.config, "out_width", self.in_width)

    @property
    def layers(self) -> tuple[int, ...]:
        """Of which layers `levels` are, as indices of transformers' hidden_states; () where none are read."""
        return ()

    def counts(self, n: int) -> Sequence[int]:
        """The numbers of tokens that n tokens can become, ascending. Where it is the shape of the grid that
        matters, those of a square one; `counts_for` knows the others."""
        return range(1, n + 1)

    def counts_for(self, grid: Grid) -> Sequence[int]:
        """The numbers of tokens that those of a grid (rows, columns) can become, ascending."""
        return self.counts(grid[0] * grid[1])

    def reduction(self, x: Tensor, grid: Grid, k: int, levels: Sequence[Tensor] = ()) -> Reduction:
        """The same k tokens with their places in the grid: spread evenly over it, one in the middle of each
        cell. Arguments as of `forward`. Raises ValueError where there are more tokens than places."""
        k, n = self.checked(x, grid, k, levels), x.shape[1]
        if k > n:
            raise ValueError(f"{self.name} makes {k} tokens of {n}, but a host has {n} places for them")
        index = spread(grid, k)[0].to(x.device).expand(len(x), -1)
        return Reduction(index, self.owners(x, grid, k).to(x.device), new=self(x, grid, k, levels))

    def owners(self, x: Tensor, grid: Grid, k: int) -> Tensor:
        """Which of k tokens each place goes into, as pictures show it: (B, N), -1 for none. Here the cells of
        their own grid (`shape`), or of a grid like it."""
        return spread(grid, k, self.shape(grid, k))[1].expand(len(x), -1)

    def shape(self, grid: Grid, k: int) -> Grid | None:
        """The grid of k tokens, row by row; None where they have none of their own."""
        return None

    def begin(self, found: Sequence[tuple[Tensor, Grid]], projector: nn.Module | None) -> None:
        """What a fresh module takes from its host before it is trained; here nothing.

        found: features (R, N, D) of pictures as the module will be given them, and their grid, for one or
        more grids. projector: the host's, None where it has none.
        """

    def as_method(self) -> Method:
        """What `vtc.compress()` makes of it."""
        from .method import FromModule

        return FromModule(self)

    def draw(self, grid: Grid, generator: torch.Generator | None = None) -> int:
        """A number of tokens for a step of training, here each of `counts_for` equally often. With a
        generator that starts alike everywhere, all processes of a distributed training draw the same."""
        counts = self.counts_for(grid)
        return counts[int(torch.randint(len(counts), (), generator=generator))]

    def checked(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> int:
        """How many tokens to give. Raises ValueError for features that do not fit the module or the grid,
        and for a number of tokens it cannot give."""
        rows, columns = grid
        if x.dim() != 3 or x.shape[2] != self.in_width:
            raise ValueError(
                f"{self.name} takes features (B, N, {self.in_width}), not {tuple(x.shape)}: make it with "
                "the width of the encoder"
            )
        if x.shape[1] != rows * columns or rows < 1:
            raise ValueError(f"{x.shape[1]} tokens are no grid of {rows} rows and {columns} columns")
        if len(levels) != len(self.layers):
            raise ValueError(
                f"{self.name} reads {len(self.layers)} further layers {self.layers}, not {len(levels)}"
            )
        wrong = [tuple(level.shape) for level in levels if level.shape != x.shape]
        if wrong:
            raise ValueError(
                f"further layers have the shape {tuple(x.shape)} of the features, not {wrong[0]}"
            )
        counts = self.counts_for(grid)
        if k is None:
            return counts[-1]
        if (k := operator.index(k)) not in counts:
            raise ValueError(
                f"of {rows} x {columns} tokens, {self.name} makes {told(counts)} tokens, not {k}: keep "
                "such a number"
            )
        return k


def square(n: int) -> Grid:
    """The square grid of n tokens. Raises ValueError where there is none."""
    side = math.isqrt(n)
    if side * side != n or not n:
        raise ValueError(f"{n} tokens are no square grid: use counts_for(grid)")
    return side, side


def told(counts: Sequence[int]) -> str:
    """The possible numbers in few words."""
    if isinstance(counts, range) and counts.step == 1 and len(counts) > 2:
        return f"{counts[0]} to {counts[-1]}"
    shown = [*counts] if len(counts) <= 12 else [*counts[:5], "...", *counts[-5:]]
    return ", ".join(map(str, shown[:-1])) + " or " * (len(shown) > 1) + str(shown[-1])


def from_pretrained(name: str | Path, *, revision: str | None = None) -> LearnedModule:
    """The module that was saved there, whichever it is; see `LearnedModule.from_pretrained`."""
    return LearnedModule.from_pretrained(name, revision=revision)
