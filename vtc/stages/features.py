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

from ..capture import Capture, Recording
from ..hosts import Vision
from ..hosts.host import Layout
from ..method import Method
from ..record import Record, Tile
from ..tokens import Reduction, Tokens, check_keep, count_kept, share
from .resolution import LowResolution
from .shorten import Shortening

_STAGE = "_vtc_features"


class FeaturesStage:
    """Wraps `get_image_features` of one model instance and marks the tokens that a method drops with NaN."""

    name = "features"

    def __init__(self, vision: Vision, method: Method, keep: int | float):
        self.vision, self.method = vision, method
        self.last: list[Record] = []
        self.spent = 0.0  # seconds that capturing, scoring and reducing took in the last forward
        self.capture = Capture(vision.encoder, method.needs, method.name)
        self.shortening = Shortening(vision)
        self.resolution = LowResolution(vision) if method.lowers_resolution else None
        self.keep = self.check(keep)

    def check(self, keep: int | float) -> int | float:
        """The budget, or an error that says why it cannot be one here."""
        if self.resolution:
            self.resolution.check(keep)
        return check_keep(keep)

    def install(self) -> None:
        base = self.vision.base
        self.original = base.get_image_features.__func__
        self.was_wrapped = "get_image_features" in vars(base)
        setattr(base, _STAGE, self)
        self.marking = _marking(self.original)
        base.get_image_features = MethodType(self.marking, base)
        self.capture.install()
        self.shortening.install()
        if self.resolution:
            self.resolution.install(self)

    def remove(self) -> None:
        base = self.vision.base
        delattr(base, _STAGE)
        now = vars(base).get("get_image_features")
        if (
            now is not None and getattr(now, "__func__", None) is self.marking
        ):  # else a caller wrapped it again
            del base.get_image_features
            if self.was_wrapped:
                base.get_image_features = MethodType(self.original, base)
        self.capture.remove()
        self.shortening.remove()
        if self.resolution:
            self.resolution.remove()

    def features(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the model's own get_image_features returns, dropped tokens marked by rows of NaN."""
        # Then nothing has to be scored. A whole number 1 is one token.
        everything = isinstance(self.keep, float) and self.keep == 1
        with nullcontext() if everything else self.capture.recording() as recording:
            output = self.original(base, *args, **kwargs)
        start = time.perf_counter()
        key = self.vision.host.features
        if isinstance(output, tuple):
            raise ValueError("compressed image features come as an output object: call with return_dict=True")
        given = inspect.signature(self.original).bind(base, *args, **kwargs).arguments
        features = list(output[key])
        layouts = self.vision.host.layout(base, given, features)
        lots = _lots(given["pixel_values"])
        rows = [row for image in enumerate(layouts) for row in _rows(*image, self.keep, lots)]
        reduced, self.last = self._reduce(rows, features, layouts, recording)
        dropped = any(new is not old for new, old in zip(reduced, features))
        if dropped:
            output[key] = (
                torch.stack(reduced) if isinstance(output[key], Tensor) else type(output[key])(reduced)
            )
        self.shortening.seen(output, dropped)
        self.spent = time.perf_counter() - start + (0.0 if everything else recording.seconds)
        return output

    def _reduce(
        self,
        rows: list[_Row],
        features: list[Tensor],
        layouts: list[Layout],
        recording: Recording | None,
    ) -> tuple[list[Tensor], list[Record]]:
        """features: for each image (n, D), newline tokens included. Same shapes come back."""
        if all(row.k == row.n for row in rows):
            return features, [_whole(f, layout) for f, layout in zip(features, layouts)]
        if bool(torch.cat([f[:, 0] for f in features]).isnan().any()):
            raise RuntimeError(
                "the image features hold NaN before any token was dropped: the vision encoder overflowed, "
                "load it in bfloat16 or float32"
            )
        extras = recording.extras()
        groups = defaultdict(list)
        for row in rows:
            groups[row.tile.grid, row.k, row.patches.shape[1]].append(row)
        for (_, k, _), group in groups.items():
            self._reduce_group(group, k, features, extras)
        results = [
            _assemble(feature, layout, [row for row in rows if row.image == image])
            for image, (feature, layout) in enumerate(zip(features, layouts))
        ]
        return [feature for feature, _ in results], [record for _, record in results]

    def _reduce_group(
        self, group: list[_Row], k: int, features: list[Tensor], extras: dict[str, Tensor]
    ) -> None:
        """Rows of one grid and one budget: the method sees them as one batch."""
        if k == 0:
            return
        x = torch.stack([features[row.image][row.tile.slots] for row in group])  # (R, n, D)
        if k == group[0].n:
            every = torch.arange(k, device=x.device).expand(len(group), k)
            reduction, new = Reduction.select(every, k), x
        else:
            patches = torch.stack([row.patches for row in group])  # (R, n, m)
            tokens = Tokens(
                x.detach(),
                grid=group[0].tile.grid,
                group=torch.tensor([row.image for row in group], device=x.device),
                lot=torch.stack([row.lot for row in group]).to(x.device),
                thumbnail=torch.tensor([row.tile.thumbnail for row in group], device=x.device),
                extras={kind: _by_token(extra, patches) for kind, extra in extras.items()},
            )
            if self.resolution:
                tokens.extras["cell"] = self.resolution.cells(patches[..., 0])
            # Scores are what they are, whatever precision the model's own products have.
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                reduction = self.method.reduce(tokens, k)
            self._check(reduction, len(group), k)
            new = reduction.apply(x)  # (R, k, D)
        for i, row in enumerate(group):
            row.index, row.source, row.new = reduction.index[i], reduction.source[i], new[i]

    def _check(self, reduction: Reduction, rows: int, k: int) -> None:
        index, slots = reduction.index, torch.arange(k, device=reduction.index.device)
        fine = index.shape == (rows, k) and bool((index.diff(dim=1) > 0).all())
        if not fine or not bool((reduction.source.gather(1, index) == slots).all()):
            raise RuntimeError(
                f"method '{self.method.name}' returned index of shape {tuple(index.shape)} where {rows} rows "
                f"of {k} different ascending positions were due, each in its own slot: mend its reduce()"
            )


def _marking(original: Any) -> Any:
    """The instance's get_image_features. It finds its stage on the model, as a deep copy must."""

    @functools.wraps(original)  # generate() reads the signature
    def get_image_features(base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stage = getattr(base, _STAGE, None)
        return stage.features(base, *args, **kwargs) if stage else original(base, *args, **kwargs)

    return get_image_features


@dataclass
class _Row:
    """One tile, its budget, and what became of it. A row of no budget stays as it is here: all dropped."""

    image: int
    lot: Tensor  # ()
    tile: Tile
    patches: Tensor  # (n, m)
    k: int
    index: Tensor | None = None  # (k,) positions in the tile
    source: Tensor | None = None  # (n,)
    new: Tensor | None = None  # (k, D)

    @property
    def n(self) -> int:
        return len(self.tile.slots)


def _rows(image: int, layout: Layout, keep: int | float, lots: Tensor) -> list[_Row]:
    k = count_kept(keep, layout.n)
    shares = share(k, [len(tile.slots) for tile in layout.tiles])
    rows = zip(layout.tiles, layout.patches, shares, strict=True)
    return [_Row(image, lots[image] + tile, *row) for tile, row in enumerate(rows)]


def _lots(pixels: Tensor) -> Tensor:
    """A number for each image (images, ...) that its own pixels decide, exactly: no batch size or order of
    summation changes it, and tiles of zeros that pad it to another image's number of tiles add nothing."""
    sample = pixels.detach().flatten(1)[:, ::97].contiguous()  # some thousand numbers tell pictures apart
    bits = sample.view(torch.int16 if sample.itemsize == 2 else torch.int32).long()
    return (bits * torch.arange(1, 2 * bits.shape[1], 2, device=bits.device)).sum(dim=1)


def _by_token(extra: Tensor, patches: Tensor) -> Tensor:
    """From patches (rows, layers, N, ...) to tokens made of patches (R, n, m): (R, layers, n, ...)."""
    flat = extra.transpose(1, 2).flatten(0, 1)  # (rows * patches, layers, ...)
    return flat.to(patches.device)[patches].mean(dim=2).transpose(1, 2)


def _assemble(feature: Tensor, layout: Layout, rows: list[_Row]) -> tuple[Tensor, Record]:
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
