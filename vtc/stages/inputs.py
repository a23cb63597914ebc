"""What the base model of a vision-language model is called with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..threads import ByThread
from .plan import mask2d
from .refusals import refuse_replica


@dataclass
class Given:
    """One call.

    arguments     by name
    ready         features by kind that were made before
    vision        whether there are images, or features of images
    mask          (B, any) over the conversation
    foreign_mask  the model was given a mask of another form, for the full prompt
    known_mask    and `mask` is what it was made of
    """

    arguments: dict[str, Any]
    ready: dict[str, Any]
    vision: bool
    mask: Tensor | None
    foreign_mask: bool
    known_mask: bool


class Inputs:
    """Reads the calls of one base model."""

    def __init__(self, base: nn.Module):
        self._parameters = list(inspect.signature(type(base).forward).parameters)[1:]
        self._images = [n for n in self._parameters if n.startswith(("pixel_values", "image_patches"))]
        self._noted: ByThread[tuple[Tensor | None]] = ByThread()

    def note_mask(self, mask: Tensor | None, inputs: dict[str, Any]) -> None:
        """generate() makes masks of four dimensions of the caller's mask (B, any) for static caches, in which
        padding of the past can no longer be read: this is what it makes the next step's of."""
        x = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if x is not None and x.shape[1] > 1:  # a token that is generated is no padding
            self._noted.set((mask2d(mask),))

    def forget(self) -> None:
        self._noted.clear()

    def read(self, base: nn.Module, args: tuple, kwargs: dict) -> Given:
        refuse_replica(base)
        given = {**dict(zip(self._parameters, args)), **kwargs}
        ready = {
            kind: out for kind, out in (given.get("mm_encoder_outputs") or {}).items() if out is not None
        }
        mask, noted = given.get("attention_mask"), self._noted.pop()
        foreign = mask is not None and mask2d(mask) is None
        return Given(
            given,
            ready,
            vision=bool(ready) or any(given.get(name) is not None for name in self._images),
            mask=noted[0] if foreign and noted else mask2d(mask),
            foreign_mask=foreign,
            known_mask=not foreign or noted is not None,
        )
