"""Attention rows and keys of single encoder layers, while the model itself stays on fused attention.

A fused kernel never shows its attention map. So the layers a method names get a copy of their config whose
attention implementation is a thin wrapper: it hands queries and keys to a recorder and then calls the
implementation that was there, with the same arguments. The output is bit-identical; only the rows that are
needed are recomputed, with the softmax in float32 and without gradient.
"""

from __future__ import annotations

import copy
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .hosts import Encoder
from .method import Need, get_method, list_methods
from .threads import ByThread

_PREFIX = "vtc|"  # names in transformers' AttentionInterface; they stay there and do nothing by themselves
_ELEMENTS = 1 << 19  # attention weights held at once, or as many as queries: they stay in a CPU's cache


class Capture:
    """Records `needs` from an encoder during `recording()`; ValueError where the encoder cannot serve one."""

    def __init__(self, encoder: Encoder, needs: tuple[Need, ...], method: str):
        for need in needs:
            if reason := missing(encoder, need):
                raise ValueError(
                    f"method '{method}' needs {reason}; methods that work here: {', '.join(working(encoder))}"
                )
        self.encoder = encoder
        self.needs = {need.kind: need.resolve(len(encoder.blocks)) for need in needs}
        self._layers = {layer for layers in self.needs.values() for layer in layers}
        self._recordings: ByThread[Recording] = ByThread()  # two forwards at once must not mix
        self._wrapped: list[tuple[nn.Module, object]] = []

    def install(self) -> None:
        for layer in self._layers:
            module = self.encoder.attention(layer)
            config = copy.copy(module.config)
            config.vtc_recorder = _Recorder(self, layer)
            self._wrapped.append((module, module.config))
            module.config = config
        self.follow()

    def follow(self) -> None:
        """Takes over the attention implementation of the model, which may have been set anew since."""
        from transformers.modeling_utils import AttentionInterface

        for module, config in self._wrapped:
            name = _PREFIX + (config._attn_implementation or "eager")
            if module.config._attn_implementation != name:
                AttentionInterface.register(name, _record_and_attend)
                module.config._attn_implementation_internal = name

    def remove(self) -> None:
        for module, config in self._wrapped:
            module.config = config
        self._wrapped.clear()
        self._recordings.clear()

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Opens this thread's recording; calls outside of one (in a backward, say) are ignored."""
        recording = Recording(self)
        self._recordings.set(recording)
        try:
            yield recording
        finally:
            self._recordings.pop()


def missing(encoder: Encoder, need: Need) -> str | None:
    """What keeps this encoder from serving a need, or None where it can."""
    if need.kind not in _COMPUTE:
        return f"'{need.kind}', which is none of {', '.join(_COMPUTE)}"
    tower = type(encoder.tower).__name__
    if encoder.latent:
        return f"{need.kind} of patches, but behind {tower} a resampler makes tokens that are no patches"
    if not encoder.blocks:
        return f"attention blocks, which {tower} has not"
    if need.kind == "cls_attention" and not encoder.has_cls:
        return f"a CLS token, which {tower} has not"
    attention = encoder.attention(0)
    if not hasattr(getattr(attention, "config", None), "_attn_implementation"):
        return f"queries and keys that {type(attention).__name__} does not let be read"
    return None


def working(encoder: Encoder) -> list[str]:
    """The methods that this encoder can serve at their default options."""
    methods = (get_method(name) for name in list_methods())
    methods = (method for method in methods if encoder.resizable or not method.lowers_resolution)
    return [m.name for m in methods if not any(missing(encoder, need) for need in m.needs)]


@dataclass
class Recording:
    """What one forward of the encoder left behind."""

    capture: Capture
    found: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)  # (patches of a call, ...) each
    seconds: float = 0.0

    def add(self, layer: int, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> None:
        start, encoder = time.perf_counter(), self.capture.encoder
        for kind, layers in self.capture.needs.items():
            if layer in layers:
                with torch.no_grad():
                    found = _COMPUTE[kind](query, key, scaling, mask, encoder.cls)  # (rows, N_all, ...)
                found = found[:, encoder.prefix : found.shape[1] - encoder.suffix]
                self.found.setdefault((kind, layer), []).append(found.flatten(0, 1))
        self.seconds += time.perf_counter() - start

    def extras(self) -> dict[str, Tensor]:
        """Each need for all patches of the call, in the encoder's order: (patches, layers, ...).

        Raises RuntimeError if a layer was not run.
        """
        found = {}
        for kind, layers in self.capture.needs.items():
            if any((kind, layer) not in self.found for layer in layers):
                raise RuntimeError(
                    f"the vision encoder ran without attention in layers {layers}, so there is no {kind}: "
                    "compress() the model again after changing its attention implementation"
                )
            found[kind] = torch.stack([torch.cat(self.found[kind, layer]) for layer in layers], dim=1)
        return found


@dataclass
class _Recorder:
    capture: Capture
    layer: int

    def __call__(self, *tensors) -> None:
        recording = self.capture._recordings.get()
        if recording is not None:
            recording.add(self.layer, *tensors)


def _record_and_attend(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
    """Registered in transformers' AttentionInterface under "vtc|<implementation>"."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation.removeprefix(_PREFIX)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    starts = kwargs.get("cu_seq_lens_q")  # several images in one row; a fused kernel keeps them apart
    spans = [(0, query.shape[2])] if starts is None else list(zip(starts.tolist(), starts[1:].tolist()))
    for start, stop in spans:
        part = slice(start, stop)
        module.config.vtc_recorder(query[:, :, part], key[:, :, part], scale, attention_mask)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager(type(module)))
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _eager(attention: type[nn.Module]) -> Callable | None:
    """The eager function that an attention class would call; its file may hold several."""
    forward = inspect.unwrap(attention.forward)
    name = next((n for n in forward.__code__.co_names if n.endswith("eager_attention_forward")), "")
    return getattr(sys.modules[attention.__module__], name, None)


def _weights(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Post-softmax attention of the given query rows, float32: (B, H, Q, N)."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped queries share keys
    logits = (query @ key.transpose(2, 3)).float().mul_(scaling)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1)


def _cls_attention(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, cls: int) -> Tensor:
    row = slice(0, 1) if cls == 0 else slice(-1, None)
    first = None if mask is None else mask[..., row, :]
    return _weights(query[:, :, row], key, scaling, first)[:, :, 0].mean(dim=1)  # (B, N)


def _mean_attention(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, cls: int) -> Tensor:
    """The mean over the queries that may see a key: images in one row do not thin each other out."""
    batch, heads, rows, _ = query.shape
    step = max(1, max(_ELEMENTS, query.numel()) // (batch * heads * key.shape[2]))
    total = query.new_zeros(batch, key.shape[2], dtype=torch.float32)
    if mask is None:
        for chunk in query.split(step, dim=2):
            total += _weights(chunk, key, scaling, None).sum(dim=(1, 2))  # (B, N)
        return total / (heads * rows)
    seen = total.clone()  # by how many queries
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    real = allowed[:, 0].any(dim=-2)  # (B, N) padding, which no query may see, asks nothing
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        few, part = (m if m.shape[-2] == 1 else m[..., chunk, :] for m in (mask, allowed))
        part = part[:, :1] & real[:, None, chunk, None]  # (B, 1, Q, N)
        weights = _weights(query[:, :, chunk], key, scaling, few)
        total += weights.masked_fill(~part, 0).sum(dim=(1, 2))
        seen += part.sum(dim=(1, 2))
    return total / (heads * seen.clamp_min(1))


def _keys(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, cls: int) -> Tensor:
    return key.mean(dim=1)  # (B, N, head_dim)


_COMPUTE: dict[str, Callable[..., Tensor]] = {
    "cls_attention": _cls_attention,
    "mean_attention": _mean_attention,
    "keys": _keys,
}
