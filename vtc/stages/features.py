"""The features stage: patch tokens are reduced after the vision encoder, before the language model."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..allocate import Allocation, Part, Proportional, get_allocation
from ..capture import Capture, Recording, inside, missing
from ..hosts import Vision
from ..hosts.host import Layout, LayoutFunction
from ..method import Method, Need
from ..record import Record
from ..restoring import Nearest
from ..threads import ByThread
from ..tokens import Keep, check_keep, fraction_of_scores
from .adapted import Adapted
from .evidence import Evidence, around
from .fields import items, join, put
from .fit import check_fit
from .late import LateProjector
from .levels import Found, Levels
from .projection import Projection
from .prompt import Prompt
from .readers import Reader
from .reducer import Reducer
from .resolution import LowResolution
from .rows import Extras, Row, assemble, rows_of, whole, whole_rows
from .shorten import Shortening
from .source import TowerSource
from .wraps import Wraps


class FeaturesStage:
    """Wraps the methods of one model instance that make features of images and videos, and marks the tokens
    that a method drops with NaN."""

    name = "features"

    def __init__(
        self,
        vision: Vision,
        method: Method,
        keep: Keep | None,
        positions: str,
        allocate: Allocation,
        merge: Nearest | None = None,
    ):
        if method.module is not None:
            check_fit(vision, method.module)
        self.vision, self.method = vision, method
        self.positions, self.allocate, self.merge = positions, allocate, merge
        self.spent = 0.0  # seconds that capturing, scoring and reducing took in the last forward
        self._records: dict[str, list[Record]] = {}  # by source, of the last forward
        self._nested: ByThread[bool] = ByThread()  # True inside one of the wrapped methods
        self.sources = _sources(vision, method, allocate)
        self.wraps = Wraps(vision, "_vtc_features")
        self.prompt = Prompt(vision) if around(method.needs, "text") else None
        front = method.before_projector or around(method.needs, "vision")
        own = not (vision.host.late or vision.host.memory)  # a projector between the encoder and the prompt
        self.projection = Projection(vision) if front and own else None
        self.shortening = Shortening(vision, repack=positions == "repack", merge=merge)
        self.resolution = LowResolution(vision, self) if method.lowers_resolution else None
        self.source = TowerSource(vision, method.source, self) if method.source is not None else None
        layers = () if method.module is None else method.module.layers
        self.levels = Levels(vision, layers, method.name) if layers else None
        self.adapted = Adapted.of(self, method.module)
        self.late = LateProjector(vision.projector) if vision.host.late else None
        reader = Reader(vision.reader) if vision.reader else None
        parts = [*self._captures(), self.shortening, self.late, reader, self.resolution]
        parts += [self.prompt, self.projection, self.source, self.levels, self.adapted]
        self._parts = [part for part in parts if part]  # what puts hooks onto the model
        self.keep = self.check(keep)

    def check(self, keep: Keep | None) -> Keep | None:
        """The budget, or an error that says why it cannot be one here. None is one for modules alone."""
        if keep is None and self.method.module is not None:
            if self.allocate != get_allocation(self.method.allocate):
                raise ValueError("without keep there is no budget to share over tiles: leave allocate out")
            return None
        if self.resolution:
            self.resolution.check(keep)
        if self.source:
            self.source.check(keep)
        if fraction_of_scores(check_keep(keep)) is not None:
            if not getattr(self.method, "scored", False):
                raise ValueError(
                    f"keep={keep!r} is a share of scores, but '{self.method.name}' does not choose by scores "
                    "of tokens: give a share of tokens such as 0.25, or a number"
                )
            if self.allocate != get_allocation(self.method.allocate):
                raise ValueError(
                    f"keep={keep!r} itself says what each tile or frame keeps: leave allocate out"
                )
        return check_keep(keep)

    @property
    def settings(self) -> dict[str, Any]:
        merge = self.merge and self.merge.shown()
        where = {"positions": self.positions, "allocate": self.allocate.shown(), "merge": merge}
        return {"keep": self.keep, **where}

    @property
    def last(self) -> list[Record]:
        """Images, then videos, of the last forward that had any."""
        return [record for name in self.sources for record in self._records.get(name, ())]

    def install(self) -> None:
        for name, original in self.wraps.install(self, self.sources).items():
            self.sources[name].original = original
        for part in self._parts:
            part.install()

    def remove(self) -> None:
        self.wraps.remove()
        for part in self._parts:
            part.remove()

    def note_mask(self, mask: Tensor | None, inputs: dict[str, Any]) -> None:
        """Lets the shortening see the caller's mask where generate() makes a larger one of it."""
        self.shortening.note_mask(mask, inputs)

    def _captures(self) -> list[Capture]:
        return list({id(source.capture): source.capture for source in self.sources.values()}.values())

    def features(self, name: str, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the model's own method returns, dropped tokens marked by rows of NaN."""
        source = self.sources[name]
        if self._nested.get():  # videos of many families go through the method for images
            return source.original(base, *args, **kwargs)
        self._refuse_changes(base)
        source.capture.follow()
        self._nested.set(True)
        try:
            with self._recording(source) as recorded:
                output = source.original(base, *args, **kwargs)
        finally:
            self._nested.pop()
        start = time.perf_counter()
        if isinstance(output, tuple):
            raise ValueError("compressed image features come as an output object: call with return_dict=True")
        given = inspect.signature(source.original).bind(base, *args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        self._mark(name, output, given, recorded)
        if self.resolution:
            self.resolution.forget()
        self.spent += time.perf_counter() - start + (recorded.attention.seconds if recorded else 0.0)
        return output

    @contextmanager
    def _recording(self, source: _Source) -> Iterator[Recorded | None]:
        """What the encoder and the projector do meanwhile. None where nothing has to be scored: the whole
        number 1 is one token."""
        if isinstance(self.keep, float) and self.keep == 1:
            yield None
            return
        with ExitStack() as stack:
            attention = stack.enter_context(source.capture.recording())
            projected = stack.enter_context(self.projection.recording()) if self.projection else []
            levels = stack.enter_context(self.levels.recording()) if self.levels else {}
            yield Recorded(attention, projected, levels)

    def _refuse_changes(self, base: nn.Module) -> None:
        """Raises RuntimeError for what was done to the model since install() and leaves hooks behind."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(
                "a compressed model cannot be exported or traced, because its data decide how many tokens "
                "each prompt keeps: remove() the compression before, or use torch.compile"
            )
        hooked = self.vision.projector if self.late or self.resolution or self.projection else None
        if hooked is not None and base.get_submodule(self.vision.host.projector) is not hooked:
            raise RuntimeError(
                f"the projector was replaced after compress(), as PEFT's modules_to_save does, but "
                f"'{self.method.name}' works with it: call compress() with replace=True"
            )

    @torch.compiler.disable
    def _mark(self, name: str, output: Any, given: dict[str, Any], recorded: Recorded | None) -> None:
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
        if recorded and self.prompt:
            recorded.texts = self.prompt.texts(name, layouts)
        reduced, records = self._reduce(features, layouts, recorded, width)
        dropped = any(new is not old for new, old in zip(reduced, features))
        if dropped:
            put(output, host.features, host.deep, torch.cat(self.shortening.marked(reduced, records)))
        self.shortening.seen(output, dropped)
        if self.shortening.begins():
            self._records.clear()
            self.spent = 0.0
        before = self._records.get(name, []) if self.shortening.inside() else []
        self._records[name] = [*before, *records]  # videos of some families come by the method for images

    def _reduce(
        self, features: tuple[Tensor, ...], layouts: list[Layout], recorded: Recorded | None, width: int
    ) -> tuple[list[Tensor], list[Record]]:
        """features: for each image (n, D and more), newline tokens included. Same shapes come back.

        The method sees the first `width` columns; all columns are reduced.
        """
        vision = None
        if recorded and self.projection:
            vision = self.projection.given(recorded.projected, layouts)
            if vision is not None:
                recorded.single = self.projection.single(recorded.projected, layouts)
        evidence = recorded and Evidence(recorded.attention, layouts, features, vision)
        levels = self.levels.of(recorded.levels, layouts) if recorded and self.levels else None
        rows = self._rows(layouts, evidence, levels)
        module = self.method.module if recorded else None
        for row in rows:
            row.in_front = bool(recorded and recorded.single and recorded.single[row.image])
            if module is not None:
                row.anew, row.in_front = (
                    True,
                    vision is not None and (row.in_front or module.place == "instead"),
                )
        reducer = Reducer(self, features, width, recorded)
        if recorded:
            reducer.choose(rows)
        complete = all(row.k == row.n for row in rows)
        if complete and module is None and sum(row.n for row in rows) == sum(i.n for i in layouts):
            return list(features), [whole(f, layout) for f, layout in zip(features, layouts)]
        if bool(torch.cat([f[:, 0] for f in features]).isnan().any()):
            raise RuntimeError(
                "the image features hold NaN before any token was dropped: the vision encoder overflowed, "
                "load it in bfloat16 or float32"
            )
        reducer.reduce(rows)
        results = [
            assemble(feature, layout, [row for row in rows if row.image == image])
            for image, (feature, layout) in enumerate(zip(features, layouts))
        ]
        return [feature for feature, _ in results], [record for _, record in results]

    def _rows(
        self, layouts: list[Layout], evidence: Evidence | None, levels: list[list[Tensor]] | None
    ) -> list[Row]:
        if evidence is None:
            return whole_rows(layouts)
        needs = self.method.needs
        if self.method.before_projector and not around(needs, "vision"):
            needs = (*needs, Need("vision"))

        def parts(image: int) -> list[Part]:
            found = evidence.of(self.allocate.needs, image)
            return [Part(tile, extras) for tile, extras in zip(layouts[image].tiles, found)]

        def extras(image: int) -> list[Extras]:
            found = evidence.of(needs, image)
            for own, states in zip(found, levels[image] if levels else ()):
                own["levels"] = states
            return found

        module = self.method.module
        most = None if module is None else lambda grid: module.counts_for(grid)[-1]
        return rows_of(layouts, self.keep, self.allocate, parts, extras, most)


@dataclass
class Recorded:
    """What was seen of one call.

    attention  of the encoder
    projected  what the projector was given
    levels     what left some blocks of the encoder
    single     for each image whether its tokens can be reduced in front of it
    texts      for each image the prompt around it (T, D), and which of it is behind the image (T,)
    """

    attention: Recording
    projected: list[tuple[Tensor, int]]
    levels: Found = field(default_factory=dict)
    single: list[bool] = field(default_factory=list)
    texts: list[tuple[Tensor, Tensor]] | None = None


@dataclass
class _Source:
    """One of the model's methods that make features."""

    layout: LayoutFunction
    capture: Capture
    original: Any = None


def _sources(vision: Vision, method: Method, allocate: Allocation) -> dict[str, _Source]:
    """Raises ValueError where an encoder cannot serve what the method or the allocation needs."""
    sources = {}
    shares = bool(vision.host.tiled or vision.host.video)
    if not shares and allocate not in (Proportional(), get_allocation(method.allocate)):
        raise ValueError(
            f"allocate='{allocate.name}' shares a budget over tiles or frames, but to {vision.host.name} "
            "each of them is an image of its own: leave it out"
        )
    encoders = (vision.encoder, vision.video_encoder) if shares else ()
    for encoder in encoders:
        if any(missing(encoder, need) for need in inside(method.needs)):
            break  # that is told below
        for need in inside(allocate.needs):
            if reason := missing(encoder, need):
                raise ValueError(f"allocate='{allocate.name}' needs {reason}: use allocate='proportional'")
    needs, signal = (*method.needs, *(allocate.needs if shares else ())), hasattr(method, "signal")
    if vision.host.layout:
        capture = Capture(vision.encoder, needs, method.name, signal)
        sources["get_image_features"] = _Source(vision.host.layout, capture)
    if vision.host.video:
        same = sources and vision.video_encoder is vision.encoder
        capture = capture if same else Capture(vision.video_encoder, needs, method.name, signal)
        sources["get_video_features"] = _Source(vision.host.video, capture)
    return sources
