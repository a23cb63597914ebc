"""A module of one's own makes the features in the place of the host's vision tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..hosts import Vision

_MARK = "_vtc_source"


class TowerSource:
    """Stands in for the forward of one vision tower: what a source makes takes the first places of each row,
    the others are zero, and the features stage drops them."""

    def __init__(self, vision: Vision, source: nn.Module, stage: Any):
        if not vision.encoder.resizable:
            raise ValueError(
                "a token source takes the place of a tower that gives one grid of tokens to a picture and "
                f"has a projector of single tokens, as LLaVA's; {vision.host.name} with "
                f"{type(vision.encoder.tower).__name__} has not"
            )
        tower = vision.encoder.tower
        if (width := tower.config.hidden_size) != source.width:
            raise ValueError(
                f"the projector is given {width} numbers to a token, the source makes {source.width}"
            )
        self.tower, self.source, self._stage = tower, source, stage  # its `keep` may change between calls
        self.prefix = vision.encoder.prefix
        self.places = (tower.config.image_size // tower.config.patch_size) ** 2

    def install(self) -> None:
        setattr(self.tower, _MARK, self)
        self._stage.wraps.wrap(self.tower, "forward", _forward)

    def remove(self) -> None:
        delattr(self.tower, _MARK)

    def check(self, keep: Any) -> None:
        most = min(self.places, self.source.tokenizer.max_tokens)
        if not isinstance(keep, int) or keep > most:
            raise ValueError(
                f"a token source takes keep as the most tokens of an image, 1 to {most} here, not {keep!r}"
            )

    def features(self, pixels: Tensor) -> BaseModelOutputWithPooling:
        """Pixels (rows, 3, H, W) to (rows, CLS and places, D), the same for every layer that is read."""
        tokens, _ = self.source(pixels, self._stage.keep)  # (rows, K, D)
        rows, k, width = tokens.shape
        if k > self.places:
            raise ValueError(
                f"{k} tokens do not fit the {self.places} places that this host has for an image"
            )
        dtype = next(self.tower.parameters()).dtype
        x = torch.zeros(rows, self.prefix + self.places, width, dtype=dtype, device=tokens.device)
        x[:, self.prefix : self.prefix + k] = tokens.to(dtype)
        layers = (x,) * (self.tower.config.num_hidden_layers + 1)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x[:, 0], hidden_states=layers)


def _forward(tower: nn.Module, pixel_values: Tensor, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
    source = getattr(tower, _MARK, None)
    if source is None:  # removed, where somebody wrapped this meanwhile
        return type(tower).forward(tower, pixel_values, *args, **kwargs)
    return source.features(pixel_values)
