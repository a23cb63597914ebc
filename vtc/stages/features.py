"""The features stage: patch tokens are reduced after the vision encoder, before the language model."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..allocate import Allocation, Part, get_allocation
from ..capture import Capture
from ..hosts import Vision
from ..hosts.host import Layout
from ..method import Method, Need
from ..record import Record
from ..restoring import Nearest
from ..threads import ByThread
from ..tokens import Keep, check_keep, fraction_of_scores
from .adapted import Adapted
from .budgets import check_share_of_scores
from .evidence import Evidence, around
from .feature_sources import Source, sources_of
from .fields import items, join, put
from .fit import check_fit
from .late import LateProjector
from .levels import Levels
from .projection import Projection
from .prompt import Prompt
from .readers import Reader
from .recorded import Recorded
from .reducer import Reducer
from .refusals import refuse_export
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
        self.sources = sources_of(vision, method, allocate)
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
            check_share_of_scores(keep, self.method, self.allocate)
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
        self.shortening.calls.inputs.note_mask(mask, inputs)

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
    def _recording(self, source: Source) -> Iterator[Recorded | None]:
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
        refuse_export()
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
        self.shortening.calls.seen(output, dropped)
        if self.shortening.calls.begins():
            self._records.clear()
            self.spent = 0.0
        before = self._records.get(name, []) if self.shortening.calls.inside() else []
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
