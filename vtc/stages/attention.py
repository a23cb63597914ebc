"""Attention of blocks of a vision tower, replaced by modules that have learned to do it with less."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..allocate import Proportional
from ..hosts import Vision
from ..hosts.trunk import REPLACED, Trunk, open_trunk
from ..learned.base import Grid
from ..learned.replacement import HostAttention
from ..method import get_method
from ..record import Record, Tile
from ..threads import ByThread
from .adapted import Adapted
from .features import FeaturesStage
from .memory import MemoryStage

if TYPE_CHECKING:
    from ..learned.in_tower import ReplacedAttention

_MASKS = ("attention_mask", "attn_mask", "key_padding_mask")


class AttentionStage:
    """Puts a module in the place of the attention of some blocks. All tokens stay.

    opened  the model, of which the vision tower is meant
    module  one replacement for each of its `parts`
    keep    None: they attend; 1.0: the bare model
    Raises ValueError for a tower whose attention cannot be replaced, and for a module made for another.
    """

    name = "attention"

    def __init__(self, opened: Vision | Trunk, module: ReplacedAttention):
        self.trunk = opened if isinstance(opened, Trunk) else _tower(opened)
        self.method, self.keep = module, None
        check_trunk(self.trunk)
        _check(self.trunk, module)
        self.sites = [_Site(self, block) for block in module.parts]
        # of a prompt's images there are records as of the features stage
        self._prompts = _recorder(opened) if isinstance(opened, Vision) else None
        self.vision = opened
        self.adapted = Adapted.of(self, module) if isinstance(opened, Vision) else None
        self._entry: Any = None
        self._clear()

    def check(self, keep: Any) -> float | None:
        if keep is None or (isinstance(keep, float) and keep == 1):
            return keep
        raise ValueError(
            f"replaced attention keeps all tokens, so that there is no keep={keep!r}: None is with the "
            "module, 1.0 the bare model"
        )

    @property
    def settings(self) -> dict[str, Any]:
        return {"keep": self.keep}

    @property
    def spent(self) -> float:
        """What it takes is in the tower's own time."""
        return self._prompts.spent if self._prompts else 0.0

    @property
    def last(self) -> list[Record]:
        if self._prompts:
            return self._prompts.last
        return [_whole(grid, len(self.trunk.blocks)) for grid in self._grids]

    def install(self) -> None:
        self._entry = self.trunk.entry.register_forward_pre_hook(self._start, with_kwargs=True)
        for site in self.sites:
            site.install()
        if self._prompts:
            self._prompts.install()
        if self.adapted:
            self.adapted.install()

    def remove(self) -> None:
        if self.adapted:
            self.adapted.remove()
        if self._prompts:
            self._prompts.remove()
        for site in self.sites:
            site.remove()
        self._entry.remove()
        self._clear()

    def _clear(self) -> None:
        self._current: ByThread[Grid] = ByThread()
        self._known: dict[int, Grid] = {}  # by the number of patches
        self._grids: list[Grid] = []  # of the pictures of the last forward

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]  # (B, 3, H, W)
        self._grids = self.trunk.grids(pixels, args, kwargs)
        rows, columns = self._grids[0]
        self._current.set((rows, columns))
        self._known[rows * columns] = (rows, columns)

    def grid_of(self, patches: int) -> Grid:
        """The grid of the patches that a block is given. In a backward, whose thread may be another, gradient
        checkpointing runs blocks of an earlier forward once more."""
        grid = self._current.get()
        if grid is None or grid[0] * grid[1] != patches:
            grid = self._known.get(patches)
        if grid is None:
            raise RuntimeError(
                f"{patches} patch tokens enter a block of {self.trunk.name}, and no picture that it was "
                "given has as many: replaced attention needs all patches"
            )
        return grid


class _Site:
    """Stands in for the forward of one attention module."""

    def __init__(self, stage: AttentionStage, block: int):
        self.stage, self.block = stage, block
        self.attention = stage.trunk.blocks[block].attention
        self.pair = not hasattr(self.attention, "qkv")  # all but timm's give attention maps too, or None

    def install(self) -> None:
        self._before, self.bare = vars(self.attention).get("forward"), self.attention.forward
        setattr(self.attention, REPLACED, self)
        self.attention.forward = MethodType(_forward, self.attention)

    def remove(self) -> None:
        delattr(self.attention, REPLACED)
        if (
            getattr(vars(self.attention).get("forward"), "__func__", None) is _forward
        ):  # else wrapped once more
            del self.attention.forward
            if self._before is not None:
                self.attention.forward = self._before

    def attend(self, args: tuple, kwargs: dict) -> Tensor | tuple[Tensor, None]:
        x = (
            args[0]
            if args
            else next(kwargs[name] for name in ("hidden_states", "x", "query") if name in kwargs)
        )
        several = isinstance(self.attention, nn.MultiheadAttention)
        masks = [*args[3 if several else 1 :], *map(kwargs.get, _MASKS)]
        if any(isinstance(mask, Tensor) for mask in masks) or kwargs.get("is_causal"):
            raise RuntimeError(
                f"{self.stage.trunk.name} is given a mask of attention, which replacements do not know: "
                "leave it out"
            )
        if kwargs.get("output_attentions"):
            raise RuntimeError("replaced attention has no maps to give: call without output_attentions")
        turned = several and not self.attention.batch_first
        x = x.transpose(0, 1) if turned else x  # (B, prefix + N, width)
        grid = self.stage.grid_of(x.shape[1] - self.stage.trunk.prefix)
        out = self.stage.method(x, grid, self.block)
        out = out.transpose(0, 1) if turned else out
        return (out, None) if self.pair else out


def _forward(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    site = getattr(attention, REPLACED, None)
    if site is None:  # removed, where somebody wrapped this meanwhile
        return type(attention).forward(attention, *args, **kwargs)
    if site.stage.keep is not None:
        return site.bare(*args, **kwargs)
    return site.attend(args, kwargs)


def check_trunk(trunk: Trunk) -> None:
    """Raises ValueError for a tower in which attention is more than a module of tokens and a grid."""
    if trunk.family.rope:
        raise ValueError(
            f"{trunk.name} turns queries and keys by places, which replacements do not: its attention cannot "
            "be replaced"
        )
    if trunk.family.name == "SigLIP 2":
        raise ValueError(
            f"{trunk.name} pads pictures of several sizes to one length, of which replacements of attention "
            "know nothing: its attention cannot be replaced"
        )


def usual_grid(trunk: Trunk) -> Grid | None:
    """Rows and columns of patches of the pictures that a tower is made for; None where it does not say."""
    for part in (trunk.entry, trunk.tower):  # timm, open_clip
        if getattr(part, "grid_size", None):
            return tuple(part.grid_size)
    config = getattr(trunk.tower, "config", None)
    sizes = [getattr(config, name, None) for name in ("image_size", "patch_size")]
    if None in sizes:
        return None
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    return tuple(side // patch for side, patch in zip(*pairs, strict=True))


def _check(trunk: Trunk, module: ReplacedAttention) -> None:
    depth = len(trunk.blocks)
    if unknown := [block for block in module.parts if block >= depth]:
        raise ValueError(f"{trunk.name} has blocks 0 to {depth - 1}, and the module is for {unknown}")
    for block, part in module.parts.items():
        host, config = HostAttention.of(trunk.blocks[block].attention), part.config
        made, there = (config.width, config.heads, config.prefix), (host.width, host.heads, trunk.prefix)
        if made != there:
            raise ValueError(
                "the module was made for attention of width {}, {} heads and {} tokens in front, and {} has "
                "{}, {} and {}: use ReplacedAttention.for_host".format(*made, trunk.name, *there)
            )


def _tower(vision: Vision) -> Trunk:
    if vision.video_encoder is not vision.encoder:
        raise ValueError(
            f"{vision.host.name} has a tower of its own for videos: replace attention in the towers alone"
        )
    return open_trunk(vision.encoder.tower)


def _recorder(vision: Vision) -> FeaturesStage:
    stage = MemoryStage if vision.host.memory else FeaturesStage
    return stage(vision, get_method("uniform"), keep=1.0, positions="keep", allocate=Proportional())


def _whole(grid: Grid, depth: int) -> Record:
    every = torch.arange(grid[0] * grid[1])
    n = len(every)
    return Record(every, every, grid, [Tile(every, grid)], {"encoder": n, "out": n}, {}, every, depth)
