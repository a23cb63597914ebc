"""Decoders of their own that read what an encoder made of the prompt: its output, or its cache.

An encoder's output goes on at full length with dropped tokens marked by NaN, since generate() keeps it beside
the prompt's mask and repeats both for beams; here marked rows are taken out of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tokens import gather
from .cache import CacheState, physical_mask, state_of
from .plan import Plan


class Reader:
    """The hook on such a decoder."""

    def __init__(self, decoder: nn.Module):
        self.decoder = decoder
        self._hook: Any = None

    def install(self) -> None:
        self._hook = self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden, cache = kwargs.get("encoder_hidden_states"), kwargs.get("past_key_values")
        if hidden is not None:
            return args, {**kwargs, **_shortened(hidden, kwargs.get("encoder_attention_mask"))}
        state = state_of(cache)
        return args, kwargs if state is None else {**kwargs, **_canvas(module, kwargs, cache, state)}


def _shortened(hidden: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """hidden (B, L, D), mask (B, L): both (B, K), without the marked tokens."""
    dropped = hidden[..., 0].isnan()
    if not bool(dropped.any()):
        return {}
    real = torch.ones_like(dropped) if mask is None else mask.bool()
    plan = Plan.of(real & ~dropped, pad_left=bool(real[:, -1].all()))
    short = gather(hidden, plan.index).masked_fill(~plan.real[..., None], 0)
    return {"encoder_hidden_states": short, "encoder_attention_mask": plan.real.long()}


def _canvas(module: nn.Module, kwargs: dict, cache: Any, state: CacheState) -> dict[str, Any]:
    """DiffusionGemma's canvas sees all of the cache that is no padding, and goes on from its positions."""
    canvas, positions = kwargs["decoder_input_ids"], kwargs.get("decoder_position_ids")
    mask = physical_mask(cache, state, None, canvas.shape[1])
    if mask is None and cache.is_compileable:  # places that are still empty are to be masked, too
        total = cache.get_query_offset() + canvas.shape[1]
        mask = torch.ones(len(canvas), total, dtype=torch.bool, device=canvas.device)
    masks = module.create_diffusion_decoder_attention_mask(
        config=module.config,
        inputs_embeds=canvas[..., None],
        past_key_values=cache,
        decoder_attention_mask=mask,
    )
    if state.shift is None:
        return {"decoder_attention_mask": masks}
    if positions is None:
        positions = torch.arange(canvas.shape[1], device=canvas.device)[None] + cache.get_seq_length()
    shift = state.shift.to(positions.device)[:, None]
    return {"decoder_attention_mask": masks, "decoder_position_ids": positions - shift}
