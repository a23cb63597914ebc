"""Masks in which the tokens of an image see each other: rebuilt by the family's own code for fewer tokens."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Vision
from .cache import CacheState


@dataclass
class BlockMasks:
    """For families whose base model makes the decoder's masks from kinds of tokens (Gemma 3, PaliGemma).

    build  the family's `create_masks_for_generate`; None for all others, whose decoders make their own masks
    types  the inputs that say of which kind each token is
    """

    config: Any
    build: Callable[..., Any] | None
    types: tuple[str, ...]

    @classmethod
    def of(cls, vision: Vision) -> BlockMasks:
        model = vision.model
        if vision.host.blocks_everywhere:
            build = _blocks_everywhere(vision.base)
        else:
            owners = (type(model), type(model.base_model), type(vision.base))
            build = next((b for o in owners if (b := getattr(o, "create_masks_for_generate", None))), None)
            if build is None and model is model.base_model:  # compressed without its head, which knows
                build = _of_family(type(model))
        names = inspect.signature(build).parameters if build else ()
        if "is_first_iteration" in names:
            build = functools.partial(build, is_first_iteration=True)
        return cls(model.config, build, tuple(name for name in names if name.endswith("token_type_ids")))

    def whole(
        self, given: dict[str, Tensor], state: CacheState, x: Tensor, past: int, plan: Any = None
    ) -> dict[str, Tensor] | None:
        """Kinds of all tokens in the cache and in x (B, L, D), of which `plan` keeps some; None where no
        kinds were given. given: (B, any) each, its last L columns are the tokens of x."""
        if not given:
            return None
        found = {}
        for name, types in given.items():
            new, before = types[:, -x.shape[1] :], types[:, : -x.shape[1]]
            new = new if plan is None else new.gather(1, plan.index.to(new.device))
            if state.types and name in state.types:
                before = state.types[name]
            # what generate() added since is text
            old = before.new_zeros(len(new), past)
            count = min(past, before.shape[1])
            old[:, :count] = before[:, :count]
            found[name] = torch.cat([old, new], dim=1)  # (B, past + K)
        return found

    def apply(self, kwargs: dict, types: dict[str, Tensor] | None) -> dict:
        """Replaces the 2-D mask in the decoder's arguments by those that the family builds of it."""
        if self.build is None or types is None:
            return kwargs
        mask, positions = kwargs["attention_mask"], kwargs.get("position_ids")
        masks = self.build(
            config=self.config,
            inputs_embeds=kwargs["inputs_embeds"],
            attention_mask=None if mask is None else mask.long(),
            past_key_values=kwargs.get("past_key_values"),
            position_ids=positions if positions is None or positions.dim() == 2 else positions[0],
            **types,
        )
        return {**kwargs, "attention_mask": masks}


def _of_family(base: type[nn.Module]) -> Callable[..., Any] | None:
    """What the class with a language head, in the same file as its base model, builds masks with."""
    classes = [c for c in vars(sys.modules[base.__module__]).values() if isinstance(c, type)]
    found = [vars(c).get("create_masks_for_generate") for c in classes if c.__module__ == base.__module__]
    return next((build.__func__ for build in found if build is not None), None)


def _blocks_everywhere(base: nn.Module) -> Callable[..., Any]:
    """What such a base model builds in forward. Its family's `create_masks_for_generate`, which generate()
    calls for static caches only, lets the tokens of an image see each other in sliding layers alone."""
    family = sys.modules[type(base).__module__]

    def build(config: Any, mm_token_type_ids: Tensor, **given: Any) -> Any:
        from transformers.masking_utils import create_masks_for_generate

        blocks = family.get_block_sequence_ids_for_mask(
            mm_token_type_ids, device=given["inputs_embeds"].device
        )
        return create_masks_for_generate(config=config.get_text_config(), block_sequence_ids=blocks, **given)

    return build
