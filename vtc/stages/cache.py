"""A KV cache that is physically shorter than the conversation it stands for."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    removed: int
    length: int
    mask: Tensor | None


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

        def reset(self) -> None:
            super().reset()
            delattr(self, _STATE)
            self.__class__ = cls

    Shortened.__name__ = f"Shortened{cls.__name__}"
    _subclasses[cls] = Shortened
    return Shortened


def shrink_static(cache: Any, by: int) -> None:
    """Lets a static cache allocate `by` fewer positions, while its layers are not yet allocated."""
    for layer in getattr(cache, "layers", ()):
        if getattr(layer, "max_cache_len", None) and not layer.is_initialized and not layer.is_sliding:
            layer.max_cache_len -= by


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
