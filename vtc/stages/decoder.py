"""The decoder stage: vision tokens are removed inside the language model, in front of one of its layers."""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Vision
from ..hosts.host import LayoutFunction
from ..method import Method
from ..record import Record, Tile
from ..threads import ByThread
from ..tokens import Keep, Reduction, check_keep, count_kept
from .alike import unsupported
from .fields import items
from .layer_calls import LAYOUTS
from .layers import LayerCut
from .places import Place
from .reducer import check_reduction
from .refusals import refuse_export
from .rows import Row, assemble, lots_of
from .scene import Scene, View, needed
from .wraps import Wraps


class DecoderStage:
    """Tokens go through the first decoder layers in full and are cut in front of `decoder_layer`, at prefill.

    They keep their positions. The cache holds the full prompt in the first layers and the shorter one in the
    others; logits and the last hidden state have the prompt's length, where a dropped token repeats the one
    before it. `output_hidden_states` and `output_attentions` show deeper layers as they are, shortened.

    A method sees one row per image or video, all tiles or frames together: `tokens.x` is the decoder's final
    norm of what leaves the layer before the cut, (B, N, D), `tokens.layer` and `tokens.depth` count decoder
    layers. It may need, in `decoder_needs` or else in `needs`, whatever layers are named there, of that same
    layer before the cut:

    "keys"       (B, 1, N, d) its keys, rotated by position, mean over heads (of keys, where these are fewer)
    "all_keys"   (B, 1, N, heads * d) those heads side by side
    "text"       tokens.text (B, T, D) what tokens.x is, of the prompt without its images, padded;
                 tokens.text_mask (B, T) True for those that are no padding, tokens.text_after (B, T) for
                 those behind the image, for all where none is
    "text_keys"  (B, 1, T, heads * d) their keys; padding is zeros

    Text is of the same forward, and not of a cache. Where generate() runs without one, every step is a
    prefill, and what was written so far is text, too. A method's own number of tokens (`count`) and budgets
    of score mass are for the features stage.
    """

    name = "decoder"

    def __init__(self, vision: Vision, method: Method, keep: Keep, decoder_layer: int | float | None = None):
        self.vision, self.method = vision, method
        self.decoder_layer = type(method).decoder_layer if decoder_layer is None else decoder_layer
        self._first = _resolved(self.decoder_layer, vision)
        if reason := unsupported(vision, self._first):
            raise ValueError(
                f"tokens cannot be cut inside of the decoder of {vision.host.name} models: {reason}. "
                "stage='features' cuts them in front of it"
            )
        self.needs = needed(vision, method, self._first)
        self.spent = 0.0  # seconds that scoring and reducing took in the last forward
        self._last: list[Record] = []
        self._nested: ByThread[bool] = ByThread()  # True inside one of the wrapped methods
        self.sources = _sources(vision)
        self.wraps = Wraps(vision, "_vtc_decoder")
        keys = any(kind != "text" for kind in self.needs)
        self.cut = LayerCut(vision, self._first, self._choose, keys)
        self.keep = self.check(keep)

    def check(self, keep: Keep) -> Keep:
        """The budget, or an error that says why it cannot be one here."""
        if isinstance(keep, str):
            raise ValueError(f"keep={keep!r} is for stage 'features': give a fraction or a number of tokens")
        return check_keep(keep)

    @property
    def settings(self) -> dict[str, Any]:
        return {"keep": self.keep, "decoder_layer": self.decoder_layer}

    @property
    def last(self) -> list[Record]:
        """Images, then videos, of the last forward that had any."""
        return self._last

    def install(self) -> None:
        for name, original in self.wraps.install(self, self.sources).items():
            self.sources[name].original = original
        self.cut.install()

    def remove(self) -> None:
        self.wraps.remove()
        self.cut.remove()

    def note_mask(self, mask: Tensor | None, inputs: dict[str, Any]) -> None:
        """The mask that the caller of generate() gave, of which it may make a larger one."""
        self.cut.calls.inputs.note_mask(mask, inputs)

    def features(self, name: str, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the model's own method returns, which is told how its features lie."""
        source = self.sources[name]
        if self._nested.get():  # videos of many families go through the method for images
            return source.original(base, *args, **kwargs)
        refuse_export()
        self._nested.set(True)
        try:
            output = source.original(base, *args, **kwargs)
        finally:
            self._nested.pop()
        if isinstance(output, tuple):
            raise ValueError("compressed image features come as an output object: call with return_dict=True")
        given = inspect.signature(source.original).bind(base, *args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        layouts = source.layout(self.vision, given, items(output[self.vision.host.features]))
        setattr(output, LAYOUTS, layouts)
        self.cut.calls.encoded(source.kind, layouts)
        return output

    # -- what is called in front of the layer

    def _choose(self, scene: Scene) -> tuple[Tensor, Tensor]:
        start, hidden = time.perf_counter(), scene.hidden
        places = [replace(p, layout=p.layout.to(hidden.device)) for p in scene.places]
        rows = [_row(image, place, self.keep) for image, place in enumerate(places)]
        groups = defaultdict(list)
        for row, place in zip(rows, places):
            groups[row.tile.grid, row.n, row.k].append((row, place))
        scene, everything = replace(scene, places=places), all(row.k == row.n for row in rows)
        view = None if everything else View(self.vision.decoder, self._first, self.needs, scene)
        merged = [self._reduce_group(group, scene, view) for group in groups.values()]
        dropped, self._last, changes = torch.zeros_like(scene.real), [], []
        for row, place in zip(rows, places):
            prompts = torch.arange(place.row, place.row + place.copies, device=hidden.device)[:, None]
            marked, record = assemble(hidden[place.row, place.columns], place.layout, [row])
            stay = place.columns[record.index]
            dropped[prompts, place.columns] = True
            dropped[prompts, stay] = False
            record.entering["decoder"] = len(record.source)
            record.entering[f"layer {self._first}"] = len(stay)
            self._last.append(record)
            changes.append((prompts, stay, marked[record.index]))
        if any(merged):
            hidden = hidden.clone()
            for prompts, stay, new in changes:
                hidden[prompts, stay] = new
        self.spent = time.perf_counter() - start
        return hidden, dropped

    def _reduce_group(self, group: list[tuple[Row, Place]], scene: Scene, view: View | None) -> bool:
        """Rows of one grid and one budget: the method sees them as one batch. Whether it merged any."""
        row, _ = group[0]
        x = torch.stack([scene.hidden[place.row, place.columns[own.tile.slots]] for own, place in group])
        if row.k == row.n:
            every = torch.arange(row.n, device=x.device).expand(len(group), row.n)
            reduction = Reduction.select(every, row.n)
        else:
            # Scores are what they are, whatever precision the model's own products have.
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                tokens = view.tokens(group)
                reduction = self.method.reduce(tokens, row.k)
            check_reduction(self.method.name, reduction, tokens, row.k)
            reduction = reduction.ascending()
        new = reduction.apply(x)  # (R, k, D)
        for i, (own, _) in enumerate(group):
            own.index, own.source, own.new = reduction.index[i], reduction.source[i], new[i]
        return not reduction.pruned


def _row(image: int, place: Place, keep: Keep) -> Row:
    """All tiles of an image compete in one row; several have no common grid."""
    layout, (tile, *others) = place.layout, place.layout.tiles
    if others:
        tile = Tile(torch.cat([own.slots for own in layout.tiles]), (1, layout.n))
    return Row(image, lots_of(layout.pixels[None])[0], tile, None, count_kept(keep, layout.n))


# -- what is checked at compress()


def _resolved(layer: Any, vision: Vision) -> int:
    """The number of a decoder layer. Raises ValueError unless there is one in front of it."""
    depth = len(getattr(vision.decoder, "layers", ()))
    number = isinstance(layer, (int, float)) and not isinstance(layer, bool)
    first = int(layer * depth + 1e-6) if isinstance(layer, float) else layer
    if not number or not 0 < first < depth:
        raise ValueError(
            f"decoder_layer={layer!r} is no place to cut tokens: give the number of a layer from 1 to "
            f"{depth - 1}, or a fraction of the depth"
        )
    return first


# -- the model's methods that make features


@dataclass
class _Source:
    kind: str
    layout: LayoutFunction
    original: Any = None


def _sources(vision: Vision) -> dict[str, _Source]:
    layouts = {"image": vision.host.layout, "video": vision.host.video}
    return {f"get_{kind}_features": _Source(kind, layout) for kind, layout in layouts.items() if layout}
