"""Removing marked vision tokens in front of the language model, and giving its output back at full length.

A dropped token travels as a row of NaN through the model's own code, which places it in the prompt like any
other feature. In front of the decoder the marked rows are taken out, together with their positions and mask
columns; behind it every removed position repeats the token before it, so logits, labels and losses keep
their shape and a text token after an image is still predicted from the last token that was kept. Later
steps of a conversation are told about the shorter cache by the cache itself.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Vision
from ..record import Record
from ..restoring import Nearest
from ..threads import ByThread
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
from .groups import Groups, read_sizes, write_groups
from .plan import (
    PER_TOKEN,
    VISUAL,
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

_HANDLED = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
_UNUSED = {"labels", "shift_labels"}  # some families hand them on to a decoder that makes no loss
_TAG = "_vtc_dropped"  # on the class of what get_image_features returned: whether it holds marked rows


@dataclass
class _Call:
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


class Shortening:
    """The hooks on the base model and its decoder."""

    def __init__(self, vision: Vision, repack: bool, merge: Nearest | None = None):
        self.base, self.decoder, self.host, self.repack = vision.base, vision.decoder, vision.host, repack
        self._parameters = list(inspect.signature(type(vision.base).forward).parameters)[1:]
        self._inputs = [
            name for name in self._parameters if name.startswith(("pixel_values", "image_patches"))
        ]
        self._masks = BlockMasks.of(vision)
        self._bias = GroupBias(vision, merge) if merge and merge.biases else None
        self._calls: ByThread[_Call] = ByThread()
        self._noted: ByThread[tuple[Tensor | None]] = ByThread()  # see note_mask()
        self._over: ByThread[bool] = ByThread()  # True where the last forward with images has ended
        self._hooks: list[Any] = []

    def install(self) -> None:
        self._hooks = [
            self.base.register_forward_pre_hook(self._enter_base, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._leave_decoder, with_kwargs=True),
            self.base.register_forward_hook(self._leave_base),
        ]
        if self.host.slots:
            sparse = [m for m in self.decoder.modules() if getattr(m, "indexer", None) is not None]
            self._hooks += [m.register_forward_pre_hook(self._count_slots, with_kwargs=True) for m in sparse]
        if self._bias:
            self._hooks.append(self._bias.install())

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls.clear()

    def marked(self, features: list[Tensor], records: list[Record]) -> list[Tensor]:
        """Features of images (n, D) that hold dropped rows, with what the decoder is to know of them."""
        if self._bias is None:
            return features
        return [write_groups(x, record.index, record.source) for x, record in zip(features, records)]

    def seen(self, output: Any, dropped: bool) -> None:
        """The stage reports features that went through it. generate() encodes first and passes them later."""
        output.__class__ = _tagged(type(output), dropped)
        if call := self._calls.get():
            call.seen = True
            call.dropped |= dropped

    def note_mask(self, mask: Tensor | None, inputs: dict[str, Any]) -> None:
        """generate() makes masks of four dimensions of the caller's mask (B, any) for static caches, in which
        padding of the past can no longer be read: this is what it makes the next step's of."""
        x = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if x is not None and x.shape[1] > 1:  # a token that is generated is no padding
            self._noted.set((mask2d(mask),))

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

    # -- the base model: what came in, before embeddings and features are mixed

    def _enter_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel runs copies whose image features the first of them would make: train "
                "with DistributedDataParallel (torchrun or accelerate launch), or show one GPU only"
            )
        given = {**dict(zip(self._parameters, args)), **kwargs}
        ready = [output for output in (given.get("mm_encoder_outputs") or {}).values() if output is not None]
        mask, noted = given.get("attention_mask"), self._noted.pop()
        foreign = mask is not None and mask2d(mask) is None
        call = _Call(
            vision=bool(ready) or any(given.get(name) is not None for name in self._inputs),
            fresh=not ready,
            seen=bool(ready) and all(hasattr(output, _TAG) for output in ready),
            # embeddings that a caller mixed may hold marked features too
            dropped=given.get("inputs_embeds") is not None or any(getattr(r, _TAG, False) for r in ready),
            mask=noted[0] if foreign and noted else mask2d(mask),
            foreign_mask=foreign,
            known_mask=not foreign or noted is not None,
            types=self._types(given),
            images=self._bias and self._bias.images(given.get("input_ids")),
        )
        self._calls.set(call)

    def _types(self, given: dict) -> dict[str, Tensor]:
        """DiffusionGemma ignores kinds of tokens in forward, not in the masks that its generate() makes."""
        if self.host.reader and mask2d(given.get("attention_mask")) is not None:
            return {}
        return {name: given[name] for name in self._masks.types if given.get(name) is not None}

    def _leave_base(self, module: nn.Module, args: tuple, output: Any) -> Any:
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

    # -- the decoder: the shorter sequence

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self._calls.get()
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

    def _continue(self, call: _Call, kwargs: dict) -> dict:
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
    def _shorten(self, call: _Call, kwargs: dict, dropped: Tensor) -> dict:
        x, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get("past_key_values")
        length = x.shape[1]
        state, past = state_of(cache) or CacheState(removed=0, length=0, mask=None), physical_length(cache)
        self._refuse_unknown(kwargs, length, past)
        self._refuse_masks(call, cache)
        tail = mask2d(mask) if call.mask is None else call.mask
        tail = None if tail is None else tail.to(x.device)  # a model may be spread over devices
        if past and not call.known_mask:
            raise ValueError(
                "which tokens of this static cache are padding is not known, because generate() of a wrapper "
                "was called: use the model's own, or a dynamic cache"
            )
        valid = valid_tokens(mask, tail, past, x)  # (B, L)
        keep = valid & ~dropped
        call.marked = dropped
        plan = call.plan = Plan.of(keep, pad_left=bool(valid[:, -1].all()))
        shrunk = state.shrunk + shrink_static(cache, by=length - plan.k)
        declare_shorter(cache, by=length - plan.k)

        positions = kwargs.get("position_ids")
        if positions is None:  # what the decoder would have counted itself
            positions = torch.arange(length, device=x.device)[None] + past + state.removed
        elif tail is None and cache is None and positions.dim() == 2 and bool((positions.diff() < 0).any()):
            raise ValueError(
                "several prompts packed into one row cannot be compressed: give each its own row, padded"
            )
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
            self._refuse_gaps_in_the_cache(past + plan.k)
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

    def _groups(self, call: _Call, x: Tensor, plan: Plan, positions: Tensor) -> Groups:
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

    def _count_slots(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Places in the shorter cache for layers that choose blocks of keys; rotary positions are apart."""
        call, cache, x = self._calls.get(), kwargs.get("past_key_values"), kwargs["hidden_states"]
        if call is None:  # run again in a backward: positions with gaps tell
            if not bool((kwargs["position_ids"].diff(dim=-1) > 1).any()):
                return None
        elif call.plan is None and state_of(cache) is None:
            return None
        past = 0 if cache is None else int(cache.get_query_offset(module.layer_idx))
        return args, {**kwargs, "position_ids": torch.arange(x.shape[1], device=x.device)[None] + past}

    def _refuse_masks(self, call: _Call, cache: Any) -> None:
        """transformers builds masks of four dimensions for caches it compiles; others are a caller's own."""
        own = call.foreign_mask and not self.host.reader  # whose generate() makes such masks, too
        if own and not getattr(cache, "is_compileable", False):
            raise ValueError(
                "an attention mask of more than two dimensions cannot be shortened: give one of two "
                "dimensions, 1 for tokens and 0 for padding, or remove() the compression"
            )

    def _refuse_gaps_in_the_cache(self, total: int) -> None:
        """Rows that keep different numbers of tokens are padded again, here behind tokens of the past: a
        sliding window would count that padding, a recurrent state run through it."""
        config = self.decoder.config
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        window = getattr(config, "sliding_window", None)
        if window is not None and kinds <= {"sliding_attention"}:
            kinds = {"sliding_attention"} if window < total else set()
        if kinds:
            raise ValueError(
                f"prompts that keep different numbers of tokens cannot share a batch here: {self.host.name} "
                f"has layers of {', '.join(sorted(kinds))}, which would count the padding between them; run "
                "the prompt in one piece instead of chunks, or one prompt at a time"
            )

    def _refuse_unknown(self, kwargs: dict, length: int, past: int) -> None:
        gaps = not self.repack
        if past and gaps and "flash" in (self.decoder.config._attn_implementation or ""):
            raise ValueError(
                "flash attention takes positions with gaps behind a cache for several packed prompts: to add "
                "an image to a chat, compress with positions='repack' or load with attn_implementation='sdpa'"
            )
        known = _HANDLED | _UNUSED | PER_TOKEN | VISUAL.keys()
        for name, value in kwargs.items():
            if name not in known and isinstance(value, Tensor) and length in value.shape:
                raise ValueError(
                    f"the decoder of {self.host.name} was given '{name}' of shape {tuple(value.shape)}, one "
                    "entry per token, which vtc cannot shorten: leave it out or remove() the compression"
                )

    def _leave_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call, cache = self._calls.get(), kwargs.get("past_key_values")
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


_subclasses: dict[tuple[type, bool], type] = {}


def _tagged(cls: type, dropped: bool) -> type:
    """A subclass that says so; of features that it cuts into chunks, generate() keeps the class only."""
    if (cls, dropped) not in _subclasses:

        def reduce(output: Any) -> tuple:
            _, args, *rest = cls.__reduce__(output)
            return _rebuild, (cls, dropped, args), *rest

        _subclasses[cls, dropped] = type(cls.__name__, (cls,), {_TAG: dropped, "__reduce__": reduce})
    return _subclasses[cls, dropped]


def _rebuild(cls: type, dropped: bool, args: tuple) -> Any:
    """For pickle, which cannot name the subclass."""
    return _tagged(cls, dropped)(*args)
