"""The features stage of models whose decoder looks at pictures through cross-attention.

The prompt keeps its length. What gets shorter is the memory that layers of cross-attention look at, their
keys and values in the cache with it, and the mask that says which token sees which picture.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.memory import count_tiles
from ..threads import ByThread
from ..tokens import gather
from .features import FeaturesStage
from .fields import items
from .plan import Plan
from .recorded import Recorded

_KEPT = "_vtc_memory"  # on a cache: the plan its memory was shortened by


@dataclass
class _Call:
    """One call of the base model with pictures, between its hooks."""

    arguments: dict[str, Any]
    recorded: Recorded | None
    context: ExitStack


class MemoryStage(FeaturesStage):
    """Hooks on the base model, for what the encoder is given, and on its decoder, for the memory."""

    def install(self) -> None:
        base = self.vision.base
        self._parameters = list(inspect.signature(type(base).forward).parameters)[1:]
        self._calls: ByThread[_Call] = ByThread()
        for part in self._watching():
            part.install()
        self._hooks = [
            base.register_forward_pre_hook(self._enter_base, with_kwargs=True),
            self.vision.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            base.register_forward_hook(self._leave_base, always_call=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for part in self._watching():
            part.remove()

    def _watching(self) -> list[Any]:
        parts = [*self._captures(), self.projection, self.prompt]
        return [part for part in parts if part]

    def _enter_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = {**dict(zip(self._parameters, args)), **kwargs}
        if given.get("pixel_values") is None:
            return
        context = ExitStack()
        (source,) = self.sources.values()
        self._calls.set(_Call(given, context.enter_context(self._recording(source)), context))

    def _leave_base(self, module: nn.Module, args: tuple, output: Any) -> None:
        if call := self._calls.pop():
            call.context.close()

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        cache, call = kwargs.get("past_key_values"), self._calls.get()
        states, mask = kwargs.get("cross_attention_states"), kwargs.get("cross_attention_mask")
        plan = getattr(cache, _KEPT, None)
        if states is not None:
            if plan is not None and int(cache.get_seq_length()):  # else it was reset
                raise ValueError(
                    "pictures of this chat are in its cache, compressed; others cannot be added: leave out "
                    "pixel_values, or start again without the cache"
                )
            if call is None:
                raise RuntimeError(
                    "nothing was compressed: cross_attention_states were given ready-made; pass pixel_values"
                )
            states, plan = self._reduce_memory(call, states)
            if cache is not None:
                setattr(cache, _KEPT, plan)
                if plan is not None:
                    self._shrink(cache, plan.k)
        if plan is None:
            return None
        like = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
        mask = _shorten_mask(mask, plan, like.shape[:2], self.vision.base.dtype)
        return args, {**kwargs, "cross_attention_states": states, "cross_attention_mask": mask}

    def _reduce_memory(self, call: _Call, states: Tensor) -> tuple[Tensor, Plan | None]:
        """states (any, tokens of a tile, D): what stays of them (prompts, K, D), and which they are."""
        counts, tile = count_tiles(call.arguments), states.shape[1]
        most = call.arguments["pixel_values"].shape[2]
        pictures = states.reshape(counts.numel(), most * tile, -1)
        lengths = (counts.flatten() * tile).tolist()
        features = tuple(own[:length] for own, length in zip(pictures, lengths) if length)
        ((name, source),) = self.sources.items()
        layouts = source.layout(self.vision, call.arguments, items(features))
        if call.recorded and self.prompt:
            call.recorded.texts = self.prompt.texts(name, layouts)
        reduced, records = self._reduce(features, layouts, call.recorded, states.shape[-1])
        self._records = {name: records}
        self.spent = 0.0 if call.recorded is None else call.recorded.attention.seconds
        if all(new is old for new, old in zip(reduced, features)):
            return states, None
        memory, left = torch.full_like(pictures, float("nan")), iter(reduced)
        for picture, length in enumerate(lengths):
            if length:
                memory[picture, :length] = next(left)
        memory = memory.view(len(counts), -1, states.shape[-1])  # (prompts, pictures * tiles * tokens, D)
        plan = Plan.of(~memory[..., 0].isnan(), pad_left=False)
        return gather(memory, plan.index).masked_fill(~plan.real[..., None], 0), plan

    def _shrink(self, cache: Any, k: int) -> None:
        """Lets layers of a static cache allocate what is kept only."""
        for layer in self.vision.decoder.cross_attention_layers:
            if layer < len(cache.layers) and getattr(cache.layers[layer], "max_cache_len", None):
                if cache.layers[layer].is_initialized and cache.layers[layer].max_cache_len != k:
                    raise ValueError(
                        "this static cache was made for another number of picture tokens: use a new one"
                    )
                cache.layers[layer].max_cache_len = k


def _shorten_mask(mask: Tensor | None, plan: Plan, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Of a mask (B, 1, L, tokens of all pictures) what is about the tokens that stay: (B, 1, L, K).

    A prompt without pictures sees zeros, which add nothing; others do not see what pads them.
    """
    if mask is None:
        mask = torch.zeros(shape[0], 1, shape[1], int(plan.index.max()) + 1, dtype=dtype)
        mask = mask.to(plan.index.device)
    repeats = len(mask) // len(plan.index)  # beams
    index, real = (part.repeat_interleave(repeats, dim=0)[:, None, None] for part in (plan.index, plan.real))
    short = mask.gather(3, index.to(mask.device).expand(*mask.shape[:3], -1))
    hidden = (~real & real.any(dim=-1, keepdim=True)).to(mask.device)
    return short.masked_fill(hidden, torch.finfo(mask.dtype).min)
