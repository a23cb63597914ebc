"""A KV cache that is physically shorter than the conversation it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

_STATE = "_vtc_state"
_WRAPPED = ("get_seq_length", "get_query_offset", "reset")


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
    return 0 if cache is None else int(type(cache).get_seq_length(cache))


def attach(cache: Any, state: CacheState) -> None:
    """Makes `get_seq_length` logical, for positions, while masks keep the physical offset.

    transformers reads positions and the part of a prompt still to be run from `get_seq_length`, and the
    shape of masks from `get_query_offset` and `get_mask_sizes`; so no other code has to know.
    """
    if state_of(cache) is None:
        for name, function in zip(_WRAPPED, (_logical_length, _query_offset, _reset), strict=True):
            setattr(cache, name, MethodType(function, cache))
    setattr(cache, _STATE, state)


def _logical_length(cache: Any, layer_idx: int = 0) -> int:
    return type(cache).get_seq_length(cache, layer_idx) + getattr(cache, _STATE).removed


def _query_offset(cache: Any, layer_idx: int = 0) -> int:
    return type(cache).get_seq_length(cache, layer_idx)


def _reset(cache: Any) -> None:
    for name in (*_WRAPPED, _STATE):
        delattr(cache, name)
    cache.reset()


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
