"""A KV cache that is physically shorter than the conversation it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .groups import Groups

_STATE, _LAST = "_vtc_state", "_vtc_last"


@dataclass
class CacheState:
    """What a shortened cache remembers.

    removed  how many positions the conversation is longer than the cache
    length   how many physical positions `mask` describes
    mask     (B, length) True for real tokens, False for padding; None: no padding
    shrunk   how many positions a static cache gave up
    shift    (B,) by how much positions were moved down; None: tokens keep their positions
    types    kinds of the tokens by name, (B, length) each, for hosts whose masks depend on them; else None
    fixed    how many positions cannot be cropped: behind them no row lost a token, so there positions and
             those of the conversation go in step
    padded   whether some of the removed positions were padding
    groups   what each of the first keys stands for, where attention is biased by it; else None
    fitted   True while a forward runs whose masks and positions were made for this cache
    """

    removed: int
    length: int
    mask: Tensor | None
    shrunk: int = 0
    shift: Tensor | None = None
    types: dict[str, Tensor] | None = None
    fixed: int = 0
    padded: bool = False
    groups: Groups | None = None
    fitted: bool = False

    @property
    def needs_fitting(self) -> bool:
        """Whether masks and positions for the whole conversation are wrong for this cache."""
        kept = (self.mask, self.shift, self.groups)
        return self.padded or any(part is not None for part in kept)

    def cut(self, length: int) -> CacheState:
        """What it says of the first `length` positions."""
        if length >= self.length:
            return self
        mask = None if self.mask is None else self.mask[:, :length]
        types = self.types and {name: kinds[:, :length] for name, kinds in self.types.items()}
        groups = self.groups and self.groups.map(lambda part: part[:, :length])
        return replace(self, length=length, mask=mask, types=types, groups=groups)


def state_of(cache: Any) -> CacheState | None:
    return getattr(cache, _STATE, None)


def physical_length(cache: Any) -> int:
    """How many positions the cache really holds."""
    return 0 if cache is None else int(cache.get_query_offset())


def mark_fitted(cache: Any, fitted: bool) -> None:
    """Notes that a forward begins whose masks and positions fit this cache, or that it has ended."""
    if (state := state_of(cache)) is not None:
        state.fitted = fitted


def attach(cache: Any, state: CacheState) -> None:
    """Makes `get_seq_length` of this one cache logical, for positions; masks keep the physical offset.

    transformers reads positions and the part of a prompt still to be run from `get_seq_length`, and the
    shape of masks from `get_query_offset` and `get_mask_sizes`; so no other code has to know. The instance
    gets a subclass of its class, and nothing that refers back to it: a cache must go when its user lets go.
    """
    if state_of(cache) is None:
        cache.__class__ = _shortened(type(cache))
    setattr(cache, _STATE, state)


_subclasses: dict[type, type] = {}


def _shortened(cls: type) -> type:
    if cls in _subclasses:
        return _subclasses[cls]

    class Shortened(cls):
        def get_seq_length(self, layer_idx: int = 0) -> int:
            return super().get_seq_length(layer_idx) + getattr(self, _STATE).removed

        def get_query_offset(self, layer_idx: int = 0) -> int:
            return super().get_seq_length(layer_idx)

        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            state = getattr(self, _STATE)
            if state.needs_fitting and not state.fitted:
                raise RuntimeError(
                    "this cache holds a prompt whose images were compressed, and a model that is not "
                    "compressed mistakes its padding or positions: go on from it with a compressed model, or "
                    "start again from the prompt"
                )
            return super().update(*args, **kwargs)

        def crop(self, tokens_to_remove: int) -> None:
            state, length = getattr(self, _STATE), physical_length(self) + tokens_to_remove
            if length < state.fixed:
                raise ValueError(
                    f"cannot crop {-tokens_to_remove} tokens: that reaches into the prompt whose image was "
                    "compressed; start again from the prompt, or from a copy of the cache made before it"
                )
            super().crop(tokens_to_remove)
            setattr(self, _STATE, state.cut(length))
            vars(self).pop(_LAST, None)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            _move_rows(self, lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            _move_rows(self, lambda rows: rows.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            _move_rows(self, lambda rows: rows[indices])

        def reset(self) -> None:
            super().reset()
            shrink_static(self, by=-getattr(self, _STATE).shrunk)
            delattr(self, _STATE)
            self.__class__ = cls

        def __reduce__(self) -> tuple:
            return _rebuild, (cls, vars(self))

    Shortened.__name__ = f"Shortened{cls.__name__}"
    _subclasses[cls] = Shortened
    return Shortened


def _move_rows(cache: Any, move: Callable[[Tensor], Tensor]) -> None:
    """What is known of the rows goes with them."""
    vars(cache).pop(_LAST, None)
    state = getattr(cache, _STATE)
    moved = {name: move(value) for name in ("mask", "shift") if (value := getattr(state, name)) is not None}
    if state.types is not None:
        moved["types"] = {name: move(value) for name, value in state.types.items()}
    if state.groups is not None:
        moved["groups"] = state.groups.map(move)
    setattr(cache, _STATE, replace(state, **moved))


def _rebuild(cls: type, attributes: dict[str, Any]) -> Any:
    """For pickle and copy, which cannot name the subclass."""
    cache = object.__new__(_shortened(cls))
    vars(cache).update(attributes)
    return cache


def remember(cache: Any, hidden: Tensor) -> None:
    """Keeps the last state of a piece of prompt (B, L, D), for a next one that begins with dropped tokens."""
    if cache is not None and hidden.shape[1] > 1:
        setattr(cache, _LAST, hidden[:, -1:].detach())


def remembered(cache: Any) -> Tensor | None:
    """(B, 1, D)"""
    return getattr(cache, _LAST, None)


def shrink_static(cache: Any, by: int) -> int:
    """Lets a static cache allocate `by` fewer positions, or returns 0 if it has allocated all already.

    A negative number gives the positions back and frees the smaller allocation.
    """
    shrunk = 0
    for layer in getattr(cache, "layers", ()):
        if (
            getattr(layer, "max_cache_len", None)
            and not layer.is_sliding
            and (by < 0 or not layer.is_initialized)
        ):
            layer.max_cache_len -= by
            layer.is_initialized = False
            shrunk = by
    return shrunk


def declare_shorter(cache: Any, by: int) -> None:
    """Corrects layers that were told the length of the prompt before it was shortened: Unlimited-OCR keeps
    the prompt for good and lets go of what it generated."""
    for layer in getattr(cache, "layers", ()):
        declared = getattr(layer, "prefill_length", None)
        if declared is not None and layer.prefill_cumulative_length < declared:
            layer.prefill_length = declared - by


def kept_at_the_end(keep: Tensor) -> int:
    """How many of the last positions all rows keep, by keep (B, L)."""
    return int(keep.all(dim=0).flip(0).long().cumprod(0).sum())


def physical_mask(cache: Any, state: CacheState, tail: Tensor | None, new: int) -> Tensor | None:
    """The 2-D mask over the cache and `new` more tokens: (B, physical + new), or None without padding.

    tail (B, any) is the caller's own mask over the conversation; what follows the shortened part has the
    same length in both, so its last columns are taken.
    """
    if state.mask is None and tail is None:
        return None
    total = physical_length(cache) + new
    rest = total - state.length
    like = tail if state.mask is None else state.mask
    head = (
        torch.ones(len(like), state.length, dtype=torch.bool, device=like.device)
        if state.mask is None
        else state.mask
    )
    if tail is None or tail.shape[1] < rest:
        end = torch.ones(len(like), rest, dtype=torch.bool, device=like.device)
    else:
        end = tail[:, tail.shape[1] - rest :].bool()
    return torch.cat([head, end], dim=1)
