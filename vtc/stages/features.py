"""The features stage: patch tokens are reduced after the vision encoder, before the language model."""

from __future__ import annotations

import functools
import inspect
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..allocate import ALLOCATIONS
from ..capture import Capture, Recording
from ..hosts import Vision, features_owner
from ..hosts.host import Layout, LayoutFunction
from ..method import Method
from ..record import Record, Tile
from ..threads import ByThread
from ..tokens import COMBINE, Reduction, Tokens, check_keep, count_kept
from .fields import items, join, put
from .late import LateProjector
from .readers import Reader
from .resolution import LowResolution
from .shorten import Shortening

_STAGE = "_vtc_features"
_PREPARE = "prepare_inputs_for_generation"


class FeaturesStage:
    """Wraps the methods of one model instance that make features of images and videos, and marks the tokens
    that a method drops with NaN."""

    name = "features"

    def __init__(self, vision: Vision, method: Method, keep: int | float, positions: str, allocate: str):
        self.vision, self.method = vision, method
        self.positions, self.allocate = positions, allocate
        self.spent = 0.0  # seconds that capturing, scoring and reducing took in the last forward
        self._records: dict[str, list[Record]] = {}  # by source, of the last forward
        self._nested: ByThread[bool] = ByThread()  # True inside one of the wrapped methods
        self.sources = _sources(vision, method)
        self.shortening = Shortening(vision, repack=positions == "repack")
        self.resolution = LowResolution(vision, self) if method.lowers_resolution else None
        self.late = LateProjector(vision.projector) if vision.host.late else None
        reader = Reader(vision.reader) if vision.reader else None
        parts = [*self._captures(), self.shortening, self.late, reader, self.resolution]
        self._parts = [part for part in parts if part]  # what puts hooks onto the model
        self.keep = self.check(keep)

    def check(self, keep: int | float) -> int | float:
        """The budget, or an error that says why it cannot be one here."""
        if self.resolution:
            self.resolution.check(keep)
        return check_keep(keep)

    @property
    def settings(self) -> dict[str, Any]:
        return {"keep": self.keep, "positions": self.positions, "allocate": self.allocate}

    @property
    def last(self) -> list[Record]:
        """Images, then videos, of the last forward that had any."""
        return [record for name in self.sources for record in self._records.get(name, ())]

    def install(self) -> None:
        base = self.vision.base
        setattr(base, _STAGE, self)
        for name, source in self.sources.items():
            source.original = getattr(base, name).__func__
            source.was_wrapped = name in vars(base)
            source.marking = _marking(name, source.original)
            setattr(base, name, MethodType(source.marking, base))
        self._wrap_generate()
        for part in self._parts:
            part.install()

    def remove(self) -> None:
        base = self.vision.base
        delattr(base, _STAGE)
        for name, source in self.sources.items():
            if getattr(vars(base).get(name), "__func__", None) is source.marking:  # else wrapped once more
                delattr(base, name)
                if source.was_wrapped:
                    setattr(base, name, MethodType(source.original, base))
        model = self.vision.model
        if self._noting and getattr(vars(model).get(_PREPARE), "__func__", None) is self._noting:
            delattr(model, _PREPARE)
        for part in self._parts:
            part.remove()

    def _wrap_generate(self) -> None:
        """Lets the shortening see the caller's mask where generate() makes a larger one of it."""
        model, self._noting = self.vision.model, None
        if hasattr(model, _PREPARE) and _PREPARE not in vars(model):
            self._noting = _noting(getattr(model, _PREPARE).__func__)
            setattr(model, _PREPARE, MethodType(self._noting, model))

    def _captures(self) -> list[Capture]:
        return list({id(source.capture): source.capture for source in self.sources.values()}.values())

    def features(self, name: str, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the model's own method returns, dropped tokens marked by rows of NaN."""
        source = self.sources[name]
        if self._nested.get():  # videos of many families go through the method for images
            return source.original(base, *args, **kwargs)
        self._refuse_changes(base)
        source.capture.follow()
        # Then nothing has to be scored. A whole number 1 is one token.
        everything = isinstance(self.keep, float) and self.keep == 1
        self._nested.set(True)
        try:
            with nullcontext() if everything else source.capture.recording() as recording:
                output = source.original(base, *args, **kwargs)
        finally:
            self._nested.pop()
        start = time.perf_counter()
        if isinstance(output, tuple):
            raise ValueError("compressed image features come as an output object: call with return_dict=True")
        given = inspect.signature(source.original).bind(base, *args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        self._mark(name, output, given, recording)
        if self.resolution:
            self.resolution.forget()
        self.spent += time.perf_counter() - start + (0.0 if everything else recording.seconds)
        return output

    def _refuse_changes(self, base: nn.Module) -> None:
        """Raises RuntimeError for what was done to the model since install() and leaves hooks behind."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(
                "a compressed model cannot be exported or traced, because its data decide how many tokens "
                "each prompt keeps: remove() the compression before, or use torch.compile"
            )
        hooked = self.vision.projector if self.late or self.resolution else None
        if hooked is not None and base.get_submodule(self.vision.host.projector) is not hooked:
            raise RuntimeError(
                f"the projector was replaced after compress(), as PEFT's modules_to_save does, but "
                f"'{self.method.name}' works with it: call compress() with replace=True"
            )

    @torch.compiler.disable
    def _mark(self, name: str, output: Any, given: dict[str, Any], recording: Recording | None) -> None:
        """Reduces the features in an output object, image by image, and notes what became of each."""
        host = self.vision.host
        layouts = self.sources[name].layout(self.vision, given, items(output[host.features]))
        tokens, width = join(output, host.features, host.deep)  # (all tokens, D and more)
        if sum(layout.length for layout in layouts) != len(tokens):
            raise RuntimeError(
                f"{host.name} made {len(tokens)} features where its layout expects "
                f"{[layout.length for layout in layouts]}: please report this with the inputs' shapes"
            )
        features = tokens.split([layout.length for layout in layouts])
        rows = self._rows(layouts)
        reduced, records = self._reduce(rows, features, layouts, recording, width)
        dropped = any(new is not old for new, old in zip(reduced, features))
        if dropped:
            put(output, host.features, host.deep, torch.cat(reduced))
        self.shortening.seen(output, dropped)
        if self.shortening.begins():
            self._records.clear()
            self.spent = 0.0
        before = self._records.get(name, []) if self.shortening.inside() else []
        self._records[name] = [*before, *records]  # videos of some families come by the method for images

    def _reduce(
        self,
        rows: list[Row],
        features: tuple[Tensor, ...],
        layouts: list[Layout],
        recording: Recording | None,
        width: int,
    ) -> tuple[list[Tensor], list[Record]]:
        """features: for each image (n, D and more), newline tokens included. Same shapes come back.

        The method sees the first `width` columns; all columns are reduced.
        """
        if all(row.k == row.n for row in rows):
            return list(features), [_whole(f, layout) for f, layout in zip(features, layouts)]
        if bool(torch.cat([f[:, 0] for f in features]).isnan().any()):
            raise RuntimeError(
                "the image features hold NaN before any token was dropped: the vision encoder overflowed, "
                "load it in bfloat16 or float32"
            )
        extras = self._extras(recording)
        groups = defaultdict(list)
        for row in rows:
            merged = None if row.patches is None else row.patches.shape[1]
            groups[row.tile.grid, row.n, row.k, merged].append(row)
        for (_, _, k, _), group in groups.items():
            self._reduce_group(group, k, features, extras, width)
        results = [
            _assemble(feature, layout, [row for row in rows if row.image == image])
            for image, (feature, layout) in enumerate(zip(features, layouts))
        ]
        return [feature for feature, _ in results], [record for _, record in results]

    def _rows(self, layouts: list[Layout]) -> list[Row]:
        return rows_of(layouts, self.keep, self.allocate)

    def _extras(self, recording: Recording | None) -> dict[str, Tensor]:
        """What the method needs of each patch of the call: (patches, layers, ...)."""
        return recording.extras()

    def _reduce_group(
        self,
        group: list[Row],
        k: int,
        features: tuple[Tensor, ...],
        extras: dict[str, Tensor],
        width: int,
    ) -> None:
        """Rows of one grid and one budget: the method sees them as one batch."""
        if k == 0:
            return
        x = torch.stack([features[row.image][row.tile.slots] for row in group])  # (R, n, D and more)
        if k == group[0].n:
            every = torch.arange(k, device=x.device).expand(len(group), k)
            reduction, new = Reduction.select(every, k), x
        else:
            tokens = Tokens(
                x[..., :width].detach(),
                grid=group[0].tile.grid,
                group=torch.tensor([row.image for row in group], device=x.device),
                lot=torch.stack([row.lot for row in group]).to(x.device),
                thumbnail=torch.tensor([row.tile.thumbnail for row in group], device=x.device),
            )
            if extras or self.resolution:
                patches = torch.stack([row.patches for row in group])  # (R, n, m)
                tokens.extras = {kind: _by_token(extra, patches) for kind, extra in extras.items()}
            if self.resolution:
                tokens.extras["cell"] = self.resolution.cells(patches[..., 0])
            # Scores are what they are, whatever precision the model's own products have.
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                reduction = self.method.reduce(tokens, k)
            check_reduction(self.method.name, reduction, tokens, k)
            reduction = reduction.ascending()
            new = reduction.apply(x)  # (R, k, D and more)
        for i, row in enumerate(group):
            row.index, row.source, row.new = reduction.index[i], reduction.source[i], new[i]


def check_reduction(name: str, reduction: Any, tokens: Tokens, k: int, contents: bool = True) -> None:
    """Raises RuntimeError unless a method has put every token of each row into one of k slots or none, with
    k different places in their own slots. Without `contents`, what takes no look into tensors."""
    rows, n = tokens.x.shape[:2]
    wrong = None
    if not isinstance(reduction, Reduction):
        wrong = f"{type(reduction).__name__} where a Reduction was due"
    elif reduction.index.shape != (rows, k) or reduction.source.shape != (rows, n):
        shapes = tuple(reduction.index.shape), tuple(reduction.source.shape)
        wrong = f"index and source of shapes {shapes} where {(rows, k)} and {(rows, n)} were due"
    elif reduction.combine not in COMBINE:
        wrong = f"combine={reduction.combine!r}, which is none of {', '.join(COMBINE)}"
    elif reduction.mix is not None and reduction.mix.shape != (rows, k, n):
        wrong = f"mix of shape {tuple(reduction.mix.shape)} where {(rows, k, n)} was due"
    elif contents:
        index, source = reduction.index, reduction.source
        slots = torch.arange(k, device=index.device)
        fine = not rows or (int(index.min()) >= 0 and int(index.max()) < n)
        fine = fine and bool((index.sort(dim=1).values.diff(dim=1) > 0).all())
        fine = fine and bool((source.gather(1, index) == slots).all())
        if not fine or bool(((source < -1) | (source >= k)).any()):
            wrong = f"no {k} different places of {n} that are each in their own slot"
    if wrong:
        raise RuntimeError(f"method '{name}' returned {wrong}: mend its reduce()")


@dataclass
class _Source:
    """One of the model's methods that make features."""

    layout: LayoutFunction
    capture: Capture
    original: Any = None
    marking: Any = None
    was_wrapped: bool = False


def _sources(vision: Vision, method: Method) -> dict[str, _Source]:
    """Raises ValueError where an encoder cannot serve what the method needs."""
    sources = {}
    if vision.host.layout:
        capture = Capture(vision.encoder, method.needs, method.name)
        sources["get_image_features"] = _Source(vision.host.layout, capture)
    if vision.host.video:
        same = sources and vision.video_encoder is vision.encoder
        capture = capture if same else Capture(vision.video_encoder, method.needs, method.name)
        sources["get_video_features"] = _Source(vision.host.video, capture)
    return sources


def _marking(name: str, original: Any) -> Any:
    """The instance's own method. It finds its stage on the model, as a deep copy must."""

    @functools.wraps(original)  # generate() reads the signature
    def get_features(base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stage = getattr(base, _STAGE, None)
        return stage.features(name, base, *args, **kwargs) if stage else original(base, *args, **kwargs)

    return get_features


def _noting(original: Any) -> Any:
    """The model's own prepare_inputs_for_generation; the shortening of the model is told the mask."""

    @functools.wraps(original)
    def prepare_inputs_for_generation(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = original(model, *args, **kwargs)
        if stage := getattr(features_owner(model), _STAGE, None):
            stage.shortening.note_mask(kwargs.get("attention_mask"), inputs)
        return inputs

    return prepare_inputs_for_generation


@dataclass
class Row:
    """One tile, its budget, and what became of it. A row of no budget stays as it is here: all dropped."""

    image: int
    lot: Tensor  # ()
    tile: Tile
    patches: Tensor | None  # (n, m)
    k: int
    index: Tensor | None = None  # (k,) positions in the tile
    source: Tensor | None = None  # (n,)
    new: Tensor | None = None  # (k, D)

    @property
    def n(self) -> int:
        return len(self.tile.slots)


def rows_of(layouts: list[Layout], keep: int | float, allocate: str) -> list[Row]:
    """What a method is to reduce: each tile of each image, with its share of the image's budget."""
    return [row for image, layout in enumerate(layouts) for row in _rows(image, layout, keep, allocate)]


def whole_rows(layouts: list[Layout]) -> list[Row]:
    """Each tile of each image with a budget of all its tokens."""
    return rows_of(layouts, 1.0, "proportional")


def _rows(image: int, layout: Layout, keep: int | float, allocate: str) -> list[Row]:
    k, tiles = count_kept(keep, layout.n), layout.tiles
    patches = layout.patches or [None] * len(tiles)
    if allocate == "joint" and len(tiles) > 1:  # they have no common grid
        tiles = [Tile(torch.cat([tile.slots for tile in tiles]), (1, layout.n))]
        patches = [None if layout.patches is None else torch.cat(patches)]
    split = ALLOCATIONS[allocate]
    shares = [k] if split is None or len(tiles) == 1 else split(k, [len(tile.slots) for tile in tiles])
    lot = lots_of(layout.pixels[None])[0]
    return [Row(image, lot + tile, *row) for tile, row in enumerate(zip(tiles, patches, shares, strict=True))]


def lots_of(pictures: Tensor) -> Tensor:
    """A number that the pixels of an image decide, exactly: no batch size or order of summation changes it,
    and tiles of zeros that pad it to another image's number of tiles add nothing. (B, ...) -> (B,)."""
    sample = pictures.detach().flatten(1)[:, ::97].contiguous()  # some thousand numbers tell pictures apart
    bits = sample.view(torch.int16 if sample.itemsize == 2 else torch.int32).long()
    return (bits * torch.arange(1, 2 * bits.shape[1], 2, device=bits.device)).sum(dim=1)


def _by_token(extra: Tensor, patches: Tensor) -> Tensor:
    """From patches (P, layers, ...) to tokens made of patches (R, n, m): (R, layers, n, ...)."""
    return extra.to(patches.device)[patches].mean(dim=2).transpose(1, 2)


def _assemble(feature: Tensor, layout: Layout, rows: list[Row]) -> tuple[Tensor, Record]:
    """Puts an image's kept tokens in their places and marks all others, newline tokens among them."""
    if all(row.k == row.n for row in rows):
        return feature, _whole(feature, layout)
    kept = [row for row in rows if row.k]
    places = torch.cat([row.tile.slots[row.index] for row in kept])  # (K,)
    marked = torch.full_like(feature, float("nan")).index_copy(
        0, places, torch.cat([row.new for row in kept])
    )
    index = places.sort().values
    source = torch.full((len(feature),), -1, dtype=torch.long, device=feature.device)
    for row in kept:
        slot = torch.searchsorted(index, row.tile.slots[row.index])  # of the tile's tokens within the image's
        source[row.tile.slots] = torch.where(row.source < 0, -1, slot[row.source.clamp_min(0)])
    return marked, _record(index, source, layout)


def _whole(feature: Tensor, layout: Layout) -> Record:
    every = torch.arange(len(feature), device=feature.device)
    return _record(every, every, layout)


def _record(index: Tensor, source: Tensor, layout: Layout) -> Record:
    entering = {"features": len(source), "decoder": len(index)}
    return Record(index, source, layout.tiles[0].grid, layout.tiles, entering)
