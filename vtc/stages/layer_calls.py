"""Calls of a base model inside whose decoder tokens are cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..hosts.host import Layout
from ..threads import ByThread
from .inputs import Inputs
from .places import Place
from .plan import Plan
from .uneven import Uneven

LAYOUTS = "_vtc_layouts"  # on what get_image_features returned: how its features lie


@dataclass
class LayerCall:
    """One call of the base model, between its hooks."""

    ids: Tensor | None
    vision: bool
    mask: Tensor | None  # (B, any) over the conversation
    foreign_mask: bool  # the model was given a mask of another form
    known_mask: bool  # and `mask` is what it was made of
    layouts: dict[str, list[Layout]] = field(default_factory=dict)  # of "image" and "video"
    entered: bool = False  # the decoder was
    past: int = 0  # positions in the first layers of the cache before
    length: int = 0  # of the prompt, L
    real: Tensor | None = None  # (B, L) False for padding
    places: list[Place] = field(default_factory=list)  # where the images are, if there are any
    keys: Tensor | None = None  # (B, L, heads, d) of the layer before the cut
    plan: Plan | None = None
    state: Uneven | None = None  # what the cache will remember
    mask4d: Any = None  # of the deeper layers
    uneven: bool = False  # deeper layers need what is theirs

    @property
    def before(self) -> Tensor | None:
        """The mask of what is in the cache."""
        return None if self.mask is None else self.mask[:, : self.mask.shape[1] - self.length]


class LayerCalls:
    """The hooks on the base model."""

    def __init__(self, base: nn.Module):
        self.base, self.inputs = base, Inputs(base)
        self._calls: ByThread[LayerCall] = ByThread()
        self._hooks: list[Any] = []

    def install(self) -> None:
        self._hooks = [
            self.base.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.base.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls.clear()
        self.inputs.forget()

    def get(self) -> LayerCall | None:
        """The one that runs in this thread."""
        return self._calls.get()

    def drop(self) -> None:
        self._calls.pop()

    def encoded(self, kind: str, layouts: list[Layout]) -> None:
        """The model made features of images or videos in its forward."""
        if call := self._calls.get():
            call.layouts[kind] = [*call.layouts.get(kind, ()), *layouts]

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self.inputs.read(module, args, kwargs)
        self._calls.set(
            LayerCall(
                ids=given.arguments.get("input_ids"),
                vision=given.vision,
                mask=given.mask,
                foreign_mask=given.foreign_mask,
                known_mask=given.known_mask,
                layouts={kind: getattr(out, LAYOUTS, None) for kind, out in given.ready.items()},
            )
        )

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._calls.pop()
