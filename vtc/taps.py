"""Seeing what one attention module attends with, and biasing it, while the model stays on fused attention.

A fused kernel never shows its attention map, but queries, keys and values go into it. Modules of transformers
get a copy of their config whose attention implementation is a thin wrapper around the one that was there. For
torch's own MultiheadAttention, which hides its products, those that are read are computed once more. In all
other modules `scaled_dot_product_attention` is watched while they run, by a mode that ends with them. Nothing
is patched, and where nobody watches, nothing is different.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .threads import ByThread

_PREFIX = "vtc|"  # names in transformers' AttentionInterface; they stay there and do nothing by themselves


@dataclass
class Call:
    """What attention is computed from.

    query, key, value  (B, H, M, d), normalised and rotated; keys and values may have fewer heads
    scaling            of the logits
    mask               as the module gives it: boolean (True: seen), additive, or None
    starts             where images begin that share one row, and the end; None for one image per row
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Tensor | None
    starts: Tensor | None = None

    def mean_key(self) -> Tensor:
        """The mean over heads of the keys: (B, M, d)."""
        return self.key.mean(dim=1)

    def cut(self, rows: Tensor, m: int) -> Call:
        """The first m tokens of some rows, which have nothing behind them but padding."""
        query, key, value = (x[rows, :, :m] for x in (self.query, self.key, self.value))
        mask = self.mask
        if mask is not None:
            mask = mask.expand(len(self.query), *mask.shape[1:])[rows, :, :m, :m]
        return Call(query, key, value, self.scaling, mask)

    def biased(self, bias: Tensor) -> Call:
        return replace(self, mask=biased(self.mask, bias.to(self.query.dtype)))


# Returns what is added to the logits, broadcast over (B, H, M, M), or None.
See = Callable[[Call], Tensor | None]


class Tap:
    """Shows the calls of one attention module to `see` whenever `wanted` says so."""

    def __init__(self, attention: nn.Module, wanted: Callable[[], bool], see: See):
        self.attention, self.wanted, self.see = attention, wanted, see
        self._hooks: list[Any] = []
        self._modes: ByThread[_Watching] = ByThread()

    def install(self) -> None:
        if _has_interface(self.attention):
            _join(self.attention, self)
        else:
            self._hooks = [
                self.attention.register_forward_pre_hook(self._begin, with_kwargs=True),
                self.attention.register_forward_hook(self._end, always_call=True),
            ]

    def remove(self) -> None:
        if _has_interface(self.attention):
            _part(self.attention, self)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._modes.clear()

    def follow(self) -> None:
        """Takes over the attention implementation of the model, which may have been set anew since."""
        if _has_interface(self.attention):
            _follow(self.attention)

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.wanted():
            return None
        if isinstance(module, nn.MultiheadAttention):
            return _multihead(module, args, kwargs, self.see)
        mode = _Watching(self.see)
        self._modes.set(mode)
        mode.__enter__()
        return None

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        mode = self._modes.pop()
        if mode is None:
            return
        mode.__exit__(None, None, None)
        if output is not None and not mode.seen:
            raise RuntimeError(
                f"{type(module).__name__} ran without torch's scaled_dot_product_attention, so that vtc does "
                "not see what it attends to: switch fused attention on before the model is made"
            )


def refusal(attention: nn.Module) -> str | None:
    """Why an attention module cannot be tapped, or None where it can."""
    if _has_interface(attention) or isinstance(attention, nn.MultiheadAttention):
        return None
    if getattr(attention, "fused_attn", None) is True:
        return None
    name = type(attention).__name__
    if getattr(attention, "fused_attn", None) is False:
        return (
            f"fused attention, which is switched off in {name}: call timm.layers.set_fused_attn(True) before "
            "the model is made"
        )
    return f"queries and keys that {name} does not let be read"


class _Watching(TorchFunctionMode):
    """Hands every call of fused attention to `see`."""

    def __init__(self, see: See):
        super().__init__()
        self.see, self.seen = see, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        self.seen = True
        names = ("query", "key", "value", "attn_mask")
        given = {**dict(zip(names, args)), **kwargs}
        scale = given.get("scale") or given["query"].shape[-1] ** -0.5
        mask = given.get("attn_mask")
        bias = self.see(Call(given["query"], given["key"], given["value"], scale, mask))
        if bias is not None:
            mask = biased(mask, bias.to(given["query"].dtype))
            args, kwargs = (*args[:3], mask, *args[4:]), {n: v for n, v in kwargs.items() if n != "attn_mask"}
        return function(*args, **kwargs)


class _Projected(Call):
    """The call of a MultiheadAttention, whose products are made here when they are read."""

    def __init__(self, module: nn.MultiheadAttention, x: tuple[Tensor, ...], mask: Tensor | None):
        self.module, self.x, self.mask, self.starts = module, x, mask, None
        self.scaling = module.head_dim**-0.5

    def biased(self, bias: Tensor) -> Call:
        return _Projected(self.module, self.x, biased(self.mask, bias.to(self.x[0].dtype)))

    @property
    def query(self) -> Tensor:
        return self._heads(0)

    @property
    def key(self) -> Tensor:
        return self._heads(1)

    @property
    def value(self) -> Tensor:
        return self._heads(2)

    def mean_key(self) -> Tensor:
        """The mean over heads is linear, so that it takes a head's work and not that of all."""
        weight, bias = self._weights(1)  # (heads d, D), (heads d,)
        heads = self.module.num_heads
        mean = weight.unflatten(0, (heads, -1)).mean(dim=0)  # (d, D)
        return F.linear(self.x[1], mean, None if bias is None else bias.view(heads, -1).mean(dim=0))

    def _heads(self, which: int) -> Tensor:
        projected = F.linear(self.x[which], *self._weights(which))  # (B, M, heads d)
        return projected.unflatten(2, (self.module.num_heads, -1)).transpose(1, 2)

    def _weights(self, which: int) -> tuple[Tensor, Tensor | None]:
        module, part = self.module, slice(which * self.module.embed_dim, (which + 1) * self.module.embed_dim)
        bias = None if module.in_proj_bias is None else module.in_proj_bias[part]
        if module.in_proj_weight is None:  # keys and values of other widths
            return (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[which], bias
        return module.in_proj_weight[part], bias


def _multihead(
    module: nn.MultiheadAttention, args: tuple, kwargs: dict, see: See
) -> tuple[tuple, dict] | None:
    """Shows a call of torch's own attention, and gives it what is to be added as a mask."""
    names = ("query", "key", "value")
    query, key, value = ({**dict(zip(names, args)), **kwargs}[name] for name in names)
    batched = [x if module.batch_first else x.transpose(0, 1) for x in (query, key, value)]  # (B, M, D)
    mask = kwargs.get("attn_mask")
    bias = see(_Projected(module, tuple(batched), mask))
    if bias is None:
        return None
    rows, keys = batched[0].shape[1], batched[1].shape[1]
    bias = bias.expand(-1, module.num_heads, -1, -1).flatten(0, 1).to(query.dtype)  # (B heads, 1 or M, M)
    # Its fast path for inference, which is for one tensor three times, would write the mask out.
    args = (query, key.view_as(key), value, *args[3:])
    kwargs = {name: given for name, given in kwargs.items() if name not in names}
    return args, {**kwargs, "attn_mask": biased(mask, bias.expand(-1, rows, keys))}


def biased(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A mask with a bias added to the logits of what it lets through."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


# Modules of transformers: `config.vtc_taps` of a copied config lists who watches.


def _has_interface(attention: nn.Module) -> bool:
    return hasattr(getattr(attention, "config", None), "_attn_implementation")


def _join(attention: nn.Module, tap: Tap) -> None:
    if not hasattr(attention.config, "vtc_taps"):
        config = copy.copy(attention.config)
        config.vtc_taps, config.vtc_config = [], attention.config
        attention.config = config
    attention.config.vtc_taps.append(tap)
    _follow(attention)


def _part(attention: nn.Module, tap: Tap) -> None:
    attention.config.vtc_taps.remove(tap)
    if not attention.config.vtc_taps:
        attention.config = attention.config.vtc_config


def _follow(attention: nn.Module) -> None:
    from transformers.modeling_utils import AttentionInterface

    config = attention.config
    name = _PREFIX + (config.vtc_config._attn_implementation or "eager")
    if config._attn_implementation != name:
        AttentionInterface.register(name, _tapped)
        config._attn_implementation_internal = name


def _tapped(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
    """Registered in transformers' AttentionInterface under "vtc|<implementation>"."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation.removeprefix(_PREFIX)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    for tap in module.config.vtc_taps:
        if tap.wanted():
            bias = tap.see(Call(query, key, value, scale, attention_mask, kwargs.get("cu_seq_lens_q")))
            if bias is not None:
                if "flash" in name:
                    raise RuntimeError(
                        f"{name} takes no bias of attention, which merged tokens need: load the encoder with "
                        'attn_implementation="sdpa", or give the method proportional=False'
                    )
                attention_mask = biased(attention_mask, bias.to(query.dtype))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager(type(module)))
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _eager(attention: type[nn.Module]) -> Callable | None:
    """The eager function that an attention class would call; its file may hold several."""
    forward = inspect.unwrap(attention.forward)
    name = next((n for n in forward.__code__.co_names if n.endswith("eager_attention_forward")), "")
    return getattr(sys.modules[attention.__module__], name, None)
