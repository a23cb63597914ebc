"""A KV cache that is physically shorter than the conversation it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_STATE = "_vtc_state"


@dataclass
class CacheState:
    """What a shortened cache remembers.

    removed  how many positions the conversation is longer than the cache
    length   how many physical positions `mask` describes
    mask     (B, length) True for real tokens, False for padding; None: no padding
    shrunk   how many positions a static cache gave up
    shift    (B,) by how much positions were moved down; None: tokens keep their positions
    types    kinds of the tokens by name, (B, length) each, for hosts whose masks depend on them; else None
    """

    removed: int
    length: int
    mask: Tensor | None
    shrunk: int = 0
    shift: Tensor | None = None
    types: dict[str, Tensor] | None = None


def state_of(cache: Any) -> CacheState | None:
    return getattr(cache, _STATE, None)


def physical_length(cache: Any) -> int:
    """How many positions the cache really holds."""
    return 0 if cache is None else int(cache.get_query_offset())


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

        def crop(self, tokens_to_remove: int) -> None:
            if physical_length(self) + tokens_to_remove < getattr(self, _STATE).length:
                raise ValueError(
                    f"cannot crop {-tokens_to_remove} tokens: that reaches into the prompt whose image was "
                    "compressed; start again from the prompt, or from a copy of the cache made before it"
                )
            super().crop(tokens_to_remove)

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
    state = getattr(cache, _STATE)
    moved = {name: move(value) for name in ("mask", "shift") if (value := getattr(state, name)) is not None}
    if state.types is not None:
        moved["types"] = {name: move(value) for name, value in state.types.items()}
    setattr(cache, _STATE, replace(state, **moved))


def _rebuild(cls: type, attributes: dict[str, Any]) -> Any:
    """For pickle and copy, which cannot name the subclass."""
    cache = object.__new__(_shortened(cls))
    vars(cache).update(attributes)
    return cache


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


def physical_mask(cache: Any, state: CacheState, tail: Tensor | None, new: int) -> Tensor | None:
    """The 2-D mask over the cache and `new` more tokens: (B, physical + new), or None without padding.

    tail (B, any) is the caller's own mask over the conversation; what follows the shortened part has the
    same length in both, so its last columns are taken.
    """
    if state.mask is None and tail is None:
        return None
    total = physical_length(cache) + new
    rest = max(total - state.length, 0)
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
    return torch.cat([head, end], dim=1)[:, :total]  # shorter than the head after a crop
