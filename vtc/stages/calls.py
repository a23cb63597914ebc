"""Calls of a base model whose prompts are shortened, up to where embeddings and features are mixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..hosts import Vision
from ..threads import ByThread
from .bias import GroupBias
from .blocks import BlockMasks
from .cache import CacheState
from .inputs import Inputs
from .plan import Plan, mask2d
from .tagged import TAG, tagged


@dataclass
class Call:
    """One call of the base model, between its hooks."""

    vision: bool = False
    fresh: bool = False  # it got no features from before, and has made none so far
    seen: bool = False  # the features of this call went through the stage
    dropped: bool = False  # and some of their rows are marked, or may be
    reached: bool = False  # the decoder was run
    mask: Tensor | None = None
    foreign_mask: bool = False  # the model was given a mask of another form, for the full prompt
    known_mask: bool = True  # and `mask` is what it was made of
    types: dict[str, Tensor] = field(default_factory=dict)  # (B, any) kinds of tokens, for block masks
    images: Tensor | None = None  # (B, L) which tokens are an image's, where sizes are read
    plan: Plan | None = None
    marked: Tensor | None = None  # (B, L) the tokens that the plan drops
    state: CacheState | None = None


class Calls:
    """The hooks on the base model."""

    def __init__(self, vision: Vision, masks: BlockMasks, bias: GroupBias | None):
        self.base, self.decoder, self.host = vision.base, vision.decoder, vision.host
        self.inputs, self._masks, self._bias = Inputs(vision.base), masks, bias
        self._calls: ByThread[Call] = ByThread()
        self._over: ByThread[bool] = ByThread()  # True where the last forward with images has ended
        self._hooks: list[Any] = []

    def install(self) -> None:
        self._hooks = [
            self.base.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.base.register_forward_hook(self._leave),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls.clear()
        self.inputs.forget()

    def get(self) -> Call | None:
        """The one that runs in this thread."""
        return self._calls.get()

    def seen(self, output: Any, dropped: bool) -> None:
        """The stage reports features that went through it. generate() encodes first and passes them later."""
        output.__class__ = tagged(type(output), dropped)
        if call := self._calls.get():
            call.seen = True
            call.dropped |= dropped

    def begins(self) -> bool:
        """Whether features that come now are the first of a new forward."""
        call = self._calls.get()
        begins = bool(self._over.pop()) or (call is not None and call.fresh)
        if call is not None:
            call.fresh = False
        return begins

    def inside(self) -> bool:
        """Whether the base model is running, so that all features are of one forward."""
        return self._calls.get() is not None

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self.inputs.read(module, args, kwargs)
        arguments, ready = given.arguments, list(given.ready.values())
        call = Call(
            vision=given.vision,
            fresh=not ready,
            seen=bool(ready) and all(hasattr(output, TAG) for output in ready),
            # embeddings that a caller mixed may hold marked features too
            dropped=arguments.get("inputs_embeds") is not None or any(getattr(r, TAG, False) for r in ready),
            mask=given.mask,
            foreign_mask=given.foreign_mask,
            known_mask=given.known_mask,
            types=self._types(arguments),
            images=self._bias and self._bias.images(arguments.get("input_ids")),
        )
        self._calls.set(call)

    def _types(self, given: dict) -> dict[str, Tensor]:
        """DiffusionGemma ignores kinds of tokens in forward, not in the masks that its generate() makes."""
        if self.host.reader and mask2d(given.get("attention_mask")) is not None:
            return {}
        return {name: given[name] for name in self._masks.types if given.get(name) is not None}

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        call = self._calls.pop()
        if call is not None and call.vision:
            self._over.set(True)
            if call.dropped and not call.reached:
                raise RuntimeError(
                    f"marked features did not reach {type(self.decoder).__name__}, because the decoder was "
                    "replaced after compress(): call compress() with replace=True"
                )
        for name in ("image_hidden_states", "video_hidden_states"):
            shown = getattr(output, name, None)
            if call is not None and call.plan is not None and isinstance(shown, Tensor):
                setattr(output, name, shown[~shown[..., 0].isnan()])  # (kept tokens of all images, D)
        return output
