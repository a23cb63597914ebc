"""Taking tokens out in front of one decoder layer, and giving the decoder's output back at full length.

The first layers see the whole prompt. In front of the one where tokens are cut, hidden states are gathered,
and from there on each layer is given positions, rotations and masks of the tokens that are left; what the
model's own loop over its layers hands on is for the full prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Vision
from ..taps import Call, Tap
from ..tokens import gather
from .alike import unknown_attention
from .cache import kept_at_the_end, remember, remembered, state_of
from .layer_calls import LayerCall, LayerCalls
from .places import find_places
from .plan import GATHERED, Plan, gathered, routed, valid_tokens
from .refusals import refuse_foreign_mask, refuse_packed, refuse_unknown_padding
from .scene import Scene
from .uneven import Uneven, attach, deeper_mask, mark_fitted, shrink_deeper, uneven

# Gives hidden states, of which merged ones are new, and which tokens are dropped: (B, L, D), (B, L).
Choose = Callable[[Scene], tuple[Tensor, Tensor]]


class LayerCut:
    """The hooks on the decoder and its layers from number `layer` on; those on the base model are `calls`."""

    def __init__(self, vision: Vision, layer: int, choose: Choose, wants_keys: bool):
        self.vision, self.decoder, self.layer = vision, vision.decoder, layer
        self.choose = choose
        self.calls = LayerCalls(vision.base)
        self._names = list(inspect.signature(type(self._layers[0]).forward).parameters)[1:]
        attention = self._layers[layer - 1].self_attn
        self._tap = Tap(attention, self._wanted, self._see) if wants_keys else None
        self._hooks: list[Any] = []

    @property
    def _layers(self) -> nn.ModuleList:
        return self.decoder.layers

    def install(self) -> None:
        hook = self._enter_layer
        self.calls.install()
        self._hooks = [
            self.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            *(x.register_forward_pre_hook(hook, with_kwargs=True) for x in self._layers[self.layer :]),
            self.decoder.register_forward_hook(self._leave_decoder, with_kwargs=True),
        ]
        if self._tap:
            self._tap.install()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.calls.remove()
        if self._tap:
            self._tap.remove()

    # -- the decoder

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        call, x, cache = self.calls.get(), kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if call is None or x is None:
            return
        if call.entered:  # an exception ended that call, and the decoder is run by itself
            self.calls.drop()
            return
        self._check(call, cache)
        call.entered, call.uneven, call.length = True, uneven(cache) is not None, x.shape[1]
        mark_fitted(cache, True)
        if call.mask is not None:
            call.mask = call.mask.to(x.device)  # a model may be spread over devices
        if not call.vision:
            return
        if call.ids is None:
            raise ValueError(
                "stage 'decoder' reads off input_ids which tokens are of an image: give them in place of "
                "inputs_embeds, or compress at stage 'features'"
            )
        call.past = 0 if cache is None else int(cache.get_query_offset())
        call.real = valid_tokens(kwargs.get("attention_mask"), call.mask, call.past, x)
        call.places = find_places(call.ids.to(x.device), call.layouts, self.vision.model.config)
        if self._tap:
            self._tap.follow()

    def _check(self, call: LayerCall, cache: Any) -> None:
        """Raises for what would go wrong without a word."""
        if call.vision and (not call.layouts or None in call.layouts.values()):
            raise RuntimeError(
                "nothing was compressed: features of images did not come from this model as it is compressed "
                "now, or in pieces; leave out prefill_chunk_size, and pass pixel_values, or features encoded "
                "after compress()"
            )
        state = uneven(cache)
        if call.vision or state is not None:
            refuse_foreign_mask(call.foreign_mask, cache)
        if (state is not None and state.layer != self.layer) or state_of(cache) is not None:
            raise ValueError(
                "this cache was shortened by another compression: go on from it with a model that is "
                "compressed in the same way, or start again from the prompt"
            )
        if call.vision or state is not None:
            implementation = self.decoder.config._attn_implementation or "eager"
            if reason := unknown_attention(implementation):
                raise ValueError(reason)

    # -- the layers

    def _enter_layer(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.calls.get()
        if call is None or not (call.places or call.uneven):
            return None
        hidden, given = self._arguments(args, kwargs)
        if module is self._layers[self.layer]:
            hidden = self._cut(call, hidden, given) if call.places else hidden
            if call.uneven and call.plan is None:
                self._go_on(call, hidden, given.get("past_key_values"))
        if not call.uneven:
            return None
        given = {**given, "attention_mask": call.mask4d}
        if call.plan is not None:
            for name in GATHERED & given.keys():
                given[name] = gathered(given[name], call.plan.index, name)
        return (hidden,), given

    def _arguments(self, args: tuple, kwargs: dict) -> tuple[Tensor, dict]:
        given = {**dict(zip(self._names, args)), **kwargs}
        return given.pop(self._names[0]), given

    @torch.compiler.disable
    def _cut(self, call: LayerCall, hidden: Tensor, given: dict) -> Tensor:
        """Takes out what the method drops: (B, L, D) -> (B, K, D). Makes the masks of the deeper layers."""
        cache, real = given.get("past_key_values"), call.real
        hidden, dropped = self.choose(Scene(hidden, call.keys, real, call.places))
        call.keys = None
        if not bool(dropped.any()):
            return hidden
        state, past = uneven(cache), self._past(cache)
        self._refuse(call, given, past)
        keep, length = real & ~dropped, real.shape[1]
        plan = call.plan = Plan.of(keep, pad_left=bool(real[:, -1].all()))
        shrunk = shrink_deeper(cache, self.layer, by=length - plan.k)
        mask = deeper_mask(state, past, call.before, plan.real, padded=not bool(plan.real.all()))
        hidden = gather(hidden, plan.index).masked_fill(~plan.real[..., None], 0)
        call.uneven, call.mask4d = True, self._mask4d(hidden, mask, cache)
        call.state = Uneven(
            self.layer,
            fewer=length - plan.k + (state.fewer if state else 0),
            length=past + plan.k,
            mask=mask,
            shrunk=shrunk + (state.shrunk if state else 0),
            fixed=call.past + length - kept_at_the_end(keep),
        )
        return hidden

    def _go_on(self, call: LayerCall, hidden: Tensor, cache: Any) -> None:
        """Nothing is cut, but the deeper layers of the cache are shorter already."""
        batch, length, _ = hidden.shape
        new = hidden.new_ones(batch, length, dtype=torch.bool)
        if call.mask is not None:
            new = call.mask[:, -length:].bool()
        state, past = uneven(cache), self._past(cache)
        mask = deeper_mask(state, past, call.before, new, padded=False)
        call.mask4d = self._mask4d(hidden, mask, cache)
        if mask is not None and length > 1:  # later steps over a static cache are not told its padding
            call.state = replace(state, length=past + length, mask=mask, fitted=False)

    def _past(self, cache: Any) -> int:
        """How many positions the deeper layers hold."""
        return 0 if cache is None else int(cache.get_query_offset(self.layer))

    def _mask4d(self, hidden: Tensor, mask: Tensor | None, cache: Any) -> Any:
        from transformers.masking_utils import create_causal_mask

        return create_causal_mask(
            config=self.decoder.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=cache,
            layer_idx=self.layer,
        )

    def _refuse(self, call: LayerCall, given: dict, past: int) -> None:
        refuse_unknown_padding(past, call.known_mask)
        positions = given.get("position_ids")
        if call.mask is None and given.get("past_key_values") is None and positions is not None:
            refuse_packed(positions)
        for name, value in given.items():
            unknown = name not in GATHERED | {"attention_mask"} and isinstance(value, Tensor)
            if unknown and call.real.shape[1] in value.shape:
                raise ValueError(
                    f"the decoder layers of {self.vision.host.name} are given '{name}' of shape "
                    f"{tuple(value.shape)}, one entry per token, which vtc cannot shorten: compress at stage "
                    "'features'"
                )

    def _wanted(self) -> bool:
        call = self.calls.get()
        return call is not None and bool(call.places)

    def _see(self, call: Call) -> None:
        """Keys of the new tokens, in the layer in front of the cut."""
        own = self.calls.get()
        length = own.real.shape[1]
        keys = call.key[:, :, own.past : own.past + length]  # a static cache has room behind them
        own.keys = keys.detach().transpose(1, 2)  # (B, L, heads, d)

    def _leave_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call, cache = self.calls.get(), kwargs.get("past_key_values")
        mark_fitted(cache, False)
        if call is None or not call.entered:
            return None
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if call.state is not None and cache is not None:
            attach(cache, call.state)
        if call.plan is None:
            remember(cache, output[0])
            return None
        hidden, source = output[0], call.plan.source
        full = gather(hidden, source.to(hidden.device))  # (B, L, D)
        before = remembered(cache) if call.past else None
        if before is not None and len(before) == len(full):
            full = torch.where(call.plan.headless[..., None].to(full.device), before.to(full.device), full)
        if cache is not None:
            remember(cache, full)
        if isinstance(output, tuple):
            return (full, *output[1:])
        output.last_hidden_state = full
        if (routes := getattr(output, "router_logits", None)) is not None:  # losses mask them by the prompt
            short = len(source) * call.plan.k
            output.router_logits = tuple(routed(r, source) if len(r) == short else r for r in routes)
        return output
