"""A KV cache whose deeper layers hold fewer tokens than its first ones.

The first layers hold the whole conversation, so that all that transformers reads off a cache - positions, and
how much of a prompt is still to be run - is right as it is. Only the masks of the deeper layers are not, and
this one cache knows of what to make them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .cache import shrink_static

_STATE = "_vtc_uneven"
_LAST = "_vtc_last"  # what cache.remember() keeps


@dataclass
class Uneven:
    """What such a cache remembers.

    layer   the first of the deeper layers
    fewer   how many positions they hold less than the first layer
    length  how many of their positions `mask` describes
    mask    (B, length) True for real tokens, False for padding; None: no padding
    shrunk  how many positions they gave up in a static cache
    fixed   how many positions of the first layer cannot be cropped: behind them no row lost a token
    fitted  True while a forward runs whose masks were made for this cache
    """

    layer: int
    fewer: int
    length: int
    mask: Tensor | None
    shrunk: int = 0
    fixed: int = 0
    fitted: bool = False

    def cut(self, length: int) -> Uneven:
        """What it says of the deeper layers where `length` positions of the first one are left."""
        length = min(self.length, length - self.fewer)
        return replace(self, length=length, mask=None if self.mask is None else self.mask[:, :length])


def uneven(cache: Any) -> Uneven | None:
    return getattr(cache, _STATE, None)


def attach(cache: Any, state: Uneven) -> None:
    """The instance gets a subclass of its class, and nothing that refers back to it."""
    if uneven(cache) is None:
        cache.__class__ = _subclass(type(cache))
    setattr(cache, _STATE, state)


def mark_fitted(cache: Any, fitted: bool) -> None:
    """Notes that a forward begins whose masks fit this cache, or that it has ended."""
    if (state := uneven(cache)) is not None:
        state.fitted = fitted


def shrink_deeper(cache: Any, layer: int, by: int) -> int:
    """Lets the deeper layers of a static cache allocate `by` fewer positions, as `shrink_static` does."""
    return shrink_static(SimpleNamespace(layers=getattr(cache, "layers", [])[layer:]), by)


def deeper_mask(
    state: Uneven | None, past: int, before: Tensor | None, new: Tensor, padded: bool
) -> Tensor | None:
    """The 2-D mask over `past` positions of the deeper layers and the new tokens, None without padding.

    before  (B, any) the caller's own mask over the conversation so far
    new     (B, q) which tokens that these layers are given now are no padding; padded: whether any is
    """
    old, length = (None, 0) if state is None else (state.mask, state.length)
    if old is None and (before is None or not past) and not padded:
        return None
    head = new.new_ones(len(new), length) if old is None else old
    rest = past - length  # what came since has the same length in all layers
    told = before is not None and before.shape[1] >= rest
    end = before[:, before.shape[1] - rest :].bool() if told else new.new_ones(len(new), rest)
    return torch.cat([head, end, new], dim=1)


_subclasses: dict[type, type] = {}


def _subclass(cls: type) -> type:
    if cls in _subclasses:
        return _subclasses[cls]

    class UnevenCache(cls):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not getattr(self, _STATE).fitted:
                raise RuntimeError(
                    "deeper layers of this cache hold fewer tokens, because images were compressed inside "
                    "the decoder: go on from it with a model that is compressed at stage 'decoder', in front "
                    "of the same layer, or start again from the prompt"
                )
            return super().update(*args, **kwargs)

        def crop(self, tokens_to_remove: int) -> None:
            state, length = getattr(self, _STATE), int(self.get_seq_length()) + tokens_to_remove
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
            state = getattr(self, _STATE)
            if state.shrunk:
                shrink_deeper(self, state.layer, by=-state.shrunk)
            delattr(self, _STATE)
            self.__class__ = cls

        def __reduce__(self) -> tuple:
            return _rebuild, (cls, vars(self))

    UnevenCache.__name__ = f"Uneven{cls.__name__}"
    _subclasses[cls] = UnevenCache
    return UnevenCache


def _move_rows(cache: Any, move: Callable[[Tensor], Tensor]) -> None:
    """What is known of the rows goes with them."""
    vars(cache).pop(_LAST, None)
    state = getattr(cache, _STATE)
    if state.mask is not None:
        setattr(cache, _STATE, replace(state, mask=move(state.mask)))


def _rebuild(cls: type, attributes: dict[str, Any]) -> Any:
    """For pickle and copy, which cannot name the subclass."""
    cache = object.__new__(_subclass(cls))
    vars(cache).update(attributes)
    return cache
