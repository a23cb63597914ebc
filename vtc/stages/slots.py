"""Places in a shorter cache for layers that choose blocks of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .cache import state_of
from .calls import Calls


class Slots:
    """The hooks on the sparse layers of a decoder, whose positions count places; rotary ones are apart."""

    def __init__(self, decoder: nn.Module, calls: Calls):
        self.decoder, self.calls = decoder, calls
        self._hooks: list[Any] = []

    def install(self) -> None:
        sparse = [m for m in self.decoder.modules() if getattr(m, "indexer", None) is not None]
        self._hooks = [m.register_forward_pre_hook(self._count, with_kwargs=True) for m in sparse]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _count(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call, cache, x = self.calls.get(), kwargs.get("past_key_values"), kwargs["hidden_states"]
        if call is None:  # run again in a backward: positions with gaps tell
            if not bool((kwargs["position_ids"].diff(dim=-1) > 1).any()):
                return None
        elif call.plan is None and state_of(cache) is None:
            return None
        past = 0 if cache is None else int(cache.get_query_offset(module.layer_idx))
        return args, {**kwargs, "position_ids": torch.arange(x.shape[1], device=x.device)[None] + past}
