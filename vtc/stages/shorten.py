"""Removing marked vision tokens in front of the language model, and giving its output back at full length.

A dropped token travels as a row of NaN through the model's own code, which places it in the prompt like any
other feature. In front of the decoder the marked rows are taken out, together with their positions and mask
columns; behind it every removed position repeats the token before it, so logits, labels and losses keep
their shape and a text token after an image is still predicted from the last token that was kept. Later
steps of a conversation are told about the shorter cache by the cache itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Vision
from ..record import Record
from ..restoring import Nearest
from ..tokens import gather
from .bias import GroupBias
from .blocks import BlockMasks
from .cache import (
    CacheState,
    attach,
    declare_shorter,
    kept_at_the_end,
    mark_fitted,
    physical_length,
    physical_mask,
    remember,
    remembered,
    shrink_static,
    state_of,
)
from .calls import Call, Calls
from .groups import Groups, read_sizes, write_groups
from .plan import (
    Plan,
    count_back,
    joined,
    marked_tokens,
    mask2d,
    routed,
    shorten_others,
    take,
    text_row,
    valid_tokens,
)
from .refusals import (
    refuse_foreign_mask,
    refuse_gaps_in_positions,
    refuse_gaps_in_the_cache,
    refuse_packed,
    refuse_unknown_inputs,
    refuse_unknown_padding,
)
from .slots import Slots


class Shortening:
    """The hooks on the decoder; those on the base model are `calls`."""

    def __init__(self, vision: Vision, repack: bool, merge: Nearest | None = None):
        self.base, self.decoder, self.host, self.repack = vision.base, vision.decoder, vision.host, repack
        self._masks = BlockMasks.of(vision)
        self._bias = GroupBias(vision, merge) if merge and merge.biases else None
        self.calls = Calls(vision, self._masks, self._bias)
        self._slots = Slots(vision.decoder, self.calls) if vision.host.slots else None
        self._hooks: list[Any] = []

    def install(self) -> None:
        self.calls.install()
        self._hooks = [
            self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.decoder.register_forward_hook(self._leave, with_kwargs=True),
        ]
        if self._slots:
            self._slots.install()
        if self._bias:
            self._hooks.append(self._bias.install())

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._slots:
            self._slots.remove()
        self.calls.remove()

    def marked(self, features: list[Tensor], records: list[Record]) -> list[Tensor]:
        """Features of images (n, D) that hold dropped rows, with what the decoder is to know of them."""
        if self._bias is None:
            return features
        return [write_groups(x, record.index, record.source) for x, record in zip(features, records)]

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.calls.get()
        x = kwargs.get("inputs_embeds")
        if x is None:
            return None
        if call is None:
            if bool(marked_tokens(x, kwargs).any()):
                raise RuntimeError(
                    f"features that a compressed model marked reached {type(self.decoder).__name__} without "
                    f"passing {type(self.base).__name__}'s hooks: call the model, not its forward()"
                )
            return None
        call.plan, call.reached = None, True  # the plan may be of a call that an exception ended
        if self._bias:
            self._bias.begin()
        if call.vision and not call.seen:
            raise RuntimeError(
                f"nothing was compressed: image inputs reached {type(self.base).__name__} without passing "
                "its get_image_features; pass pixel_values, or features encoded after compress()"
            )
        dropped = marked_tokens(x, kwargs) if call.dropped else None  # (B, L)
        if dropped is None or not bool(dropped.any()):
            kwargs = self._continue(call, kwargs)
        else:
            kwargs = self._shorten(call, kwargs, dropped)
        mark_fitted(kwargs.get("past_key_values"), True)
        return args, kwargs

    def _continue(self, call: Call, kwargs: dict) -> dict:
        """A step without dropped tokens; mask and positions must fit a cache that was shortened earlier."""
        x, cache, mask = (kwargs.get(name) for name in ("inputs_embeds", "past_key_values", "attention_mask"))
        state = state_of(cache)
        if state is None:
            return kwargs
        self._refuse_masks(call, cache)
        past, tail = physical_length(cache), mask2d(mask) if call.mask is None else call.mask
        positions = kwargs.get("position_ids")
        if positions is None and (state.shift is not None or state.groups is not None):
            positions = torch.arange(x.shape[1], device=x.device)[None] + cache.get_seq_length()
        if state.shift is not None:
            positions = positions - state.shift.to(positions.device)[:, None]
            kwargs = {**kwargs, "position_ids": positions}
        types = self._masks.whole(call.types, state, x, past)
        real = physical_mask(cache, state, tail, x.shape[1])  # (B, past + q)
        if real is not None or types is not None or call.foreign_mask:  # else nothing is padding
            kwargs = self._masks.apply({**kwargs, "attention_mask": real}, types)
        if real is not None and call.known_mask and x.shape[1] > 1:
            # Steps behind a text that is padded may not tell of its padding: masks of static caches do not.
            attach(cache, replace(state, length=real.shape[1], mask=real))
        if state.groups is None:
            return kwargs
        if self._bias is None:
            raise RuntimeError(
                "this cache holds merged tokens, which attention is to be biased for: go on from it with the "
                "merge= that it was made with"
            )
        real = torch.ones(len(x), past + x.shape[1]).bool() if real is None else real
        real, positions = real.to(x.device), positions.to(x.device)
        last = text_row(positions).masked_fill(~real[:, past:], 0).amax(dim=1)  # (B,)
        groups = state.groups.followed_by_text(count_back(last, real))
        return self._bias.apply(kwargs, groups, positions, reads=False)

    @torch.compiler.disable
    def _shorten(self, call: Call, kwargs: dict, dropped: Tensor) -> dict:
        x, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get("past_key_values")
        length = x.shape[1]
        state, past = state_of(cache) or CacheState(removed=0, length=0, mask=None), physical_length(cache)
        if past and not self.repack:
            refuse_gaps_in_positions(self.decoder.config)
        refuse_unknown_inputs(kwargs, length, self.host.name)
        self._refuse_masks(call, cache)
        tail = mask2d(mask) if call.mask is None else call.mask
        tail = None if tail is None else tail.to(x.device)  # a model may be spread over devices
        refuse_unknown_padding(past, call.known_mask)
        valid = valid_tokens(mask, tail, past, x)  # (B, L)
        keep = valid & ~dropped
        call.marked = dropped
        plan = call.plan = Plan.of(keep, pad_left=bool(valid[:, -1].all()))
        shrunk = state.shrunk + shrink_static(cache, by=length - plan.k)
        declare_shorter(cache, by=length - plan.k)

        positions = kwargs.get("position_ids")
        if positions is None:  # what the decoder would have counted itself
            positions = torch.arange(length, device=x.device)[None] + past + state.removed
        elif tail is None and cache is None:
            refuse_packed(positions)
        counted = text_row(positions).to(x.device)  # (B or 1, L)
        positions, shift = take(positions.to(x.device), plan.index), state.shift  # (..., B, K)
        if self.repack:
            gone = (valid & dropped).long().cumsum(dim=1)  # (B, L) dropped tokens up to each position
            shift = gone[:, -1] if state.shift is None else gone[:, -1] + state.shift.to(x.device)
            positions = positions - gone.gather(1, plan.index) - (shift - gone[:, -1])[:, None]

        before = None if tail is None else tail[:, : tail.shape[1] - length]
        old = physical_mask(cache, state, before, new=0) if past else None  # (B, past)
        short_mask = joined(old, plan.real, past)
        types = self._masks.whole(call.types, state, x, past, plan)
        removed = state.removed + length - plan.k
        fixed = past + plan.k - kept_at_the_end(keep)
        padded = state.padded or not bool(valid.all())
        groups = None
        if self._bias:
            end = past + state.removed + length
            first = counted.masked_fill(~valid, end).amin(dim=1)  # (B,) where the tokens of x begin
            first = first if state.shift is None else first - state.shift
            real = valid.new_ones(len(x), past) if old is None else old
            groups = (state.groups or Groups.none(x)).followed_by_text(count_back(first - 1, real))
            groups = groups.followed_by(self._groups(call, x, plan, text_row(positions)))
        call.state = CacheState(
            removed, past + plan.k, short_mask, shrunk, shift, types, fixed, padded, groups
        )
        if short_mask is None and cache is None:
            # Positions with gaps and no mask would be taken for several packed sequences.
            short_mask = torch.ones_like(plan.real)
        if past and not bool(plan.real.all()):
            refuse_gaps_in_the_cache(self.decoder.config, self.host.name, past + plan.k)
        padding = ~plan.real[..., None]  # it may have been a marked row
        short = {
            **kwargs,
            **shorten_others(kwargs, plan, keep),
            "inputs_embeds": gather(x, plan.index).masked_fill(padding, 0),  # (B, K, D)
            "position_ids": positions,
            "attention_mask": None if short_mask is None else short_mask.long(),
        }
        if "logits_to_keep" in kwargs:  # in Gemma 4 its last layers leave out what they count as the others
            short["logits_to_keep"] = 0
        short = self._masks.apply(short, types)
        return self._bias.apply(short, groups, positions, reads=True) if self._bias else short

    def _groups(self, call: Call, x: Tensor, plan: Plan, positions: Tensor) -> Groups:
        """Of the tokens of x (B, L, D) that stay, which are at `positions` (B, K)."""
        if call.images is None:
            raise ValueError(
                "which embeddings are an image's is not known without input_ids, and sizes of merged tokens "
                "go by it: give input_ids and pixel_values, or compress with merge='nearest'"
            )
        images = call.images.to(x.device)
        sizes = read_sizes(x, call.marked, images).gather(1, plan.index)  # (B, K)
        kept = images.gather(1, plan.index) & plan.real
        return Groups.of(sizes, kept, positions)

    def _refuse_masks(self, call: Call, cache: Any) -> None:
        foreign = call.foreign_mask and not self.host.reader  # whose generate() makes such masks, too
        refuse_foreign_mask(foreign, cache)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call, cache = self.calls.get(), kwargs.get("past_key_values")
        mark_fitted(cache, False)
        if call is None:
            return None
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if call.plan is None:
            remember(cache, output[0])
            return None
        hidden = output[0]  # (B, K, D)
        full = gather(hidden, call.plan.source)  # (B, L, D)
        before = remembered(cache) if call.state.length > call.plan.k else None
        if before is not None and len(before) == len(full):
            full = torch.where(call.plan.headless[..., None], before.to(full.device), full)
        if cache is not None:
            attach(cache, call.state)
            remember(cache, full)
        if self.host.reader and cache is None:  # it is an encoder's output, to be read without dropped tokens
            full = full.masked_fill(call.marked[..., None], float("nan"))
        if isinstance(output, tuple):
            return (full, *output[1:])
        output.last_hidden_state = full
        if (routes := getattr(output, "router_logits", None)) is not None:  # losses mask them by the prompt
            output.router_logits = tuple(routed(logits, call.plan.source) for logits in routes)
        return output
