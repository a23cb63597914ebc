"""What methods need from inside an encoder block: attention rows, keys, values, read off its own attention.

Only the rows that are needed are recomputed, with the softmax in float32 and without gradient; the model's
own output stays what it was, bit for bit (see taps.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .hosts import Encoder
from .method import Need, get_method, list_methods
from .taps import Call, Tap, refusal
from .threads import ByThread

_ELEMENTS = 1 << 19  # attention weights held at once, or as many as queries: they stay in a CPU's cache


class Capture:
    """Records `needs` from an encoder during `recording()`; ValueError where the encoder cannot serve one.

    signal  whether the method has that option, by which it may do without CLS
    """

    def __init__(self, encoder: Encoder, needs: tuple[Need, ...], method: str, signal: bool = False):
        for need in inside(needs):
            if reason := missing(encoder, need):
                other = "; with signal='mean_attention' it does without" if signal else ""
                other = other if need.kind in OF_CLS and not encoder.has_cls else ""
                raise ValueError(
                    f"method '{method}' needs {reason}{other}; methods that work here: "
                    f"{', '.join(working(encoder))}"
                )
        self.encoder = encoder
        self.kinds: dict[int, list[str]] = {}  # by layer
        for need in inside(needs):
            for layer in need.resolve(len(encoder.blocks)):
                kinds = self.kinds.setdefault(layer, [])
                kinds += [need.kind] if need.kind not in kinds else []
        self._recordings: ByThread[Recording] = ByThread()  # two forwards at once must not mix
        layers = sorted(self.kinds)
        self._taps = [Tap(encoder.attention(n), self._open, partial(self._see, n)) for n in layers]

    def install(self) -> None:
        for tap in self._taps:
            tap.install()

    def follow(self) -> None:
        """Takes over the attention implementation of the model, which may have been set anew since."""
        for tap in self._taps:
            tap.follow()

    def remove(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._recordings.clear()

    def _open(self) -> bool:
        return self._recordings.get() is not None

    def _see(self, layer: int, call: Call) -> None:
        recording = self._recordings.get()
        starts = call.starts  # a fused kernel keeps images apart that share one row
        if starts is None:
            recording.add(layer, call)
            return
        for start, stop in zip(starts.tolist(), starts[1:].tolist()):
            part = slice(start, stop)
            tensors = (call.query[:, :, part], call.key[:, :, part], call.value[:, :, part])
            recording.add(layer, Call(*tensors, call.scaling, call.mask))

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
    if need.kind in INSIDE:
        return f"'{need.kind}', which exists inside of encoder blocks only (stage='encoder')"
    if need.kind not in KINDS:
        return f"'{need.kind}', which is none of {', '.join((*KINDS, *AROUND))}"
    tower = type(encoder.tower).__name__
    if encoder.latent:
        return f"{need.kind} of patches, but behind {tower} a resampler makes tokens that are no patches"
    if not encoder.blocks:
        return f"attention blocks, which {tower} has not"
    if need.kind in OF_CLS and not encoder.has_cls:
        return f"a CLS token, which {tower} has not"
    return refusal(encoder.attention(0))


def working(encoder: Encoder) -> list[str]:
    """The methods that this encoder can serve at their default options."""
    methods = (get_method(name) for name in list_methods("features"))
    methods = (method for method in methods if encoder.resizable or not method.lowers_resolution)
    return [m.name for m in methods if not any(missing(encoder, need) for need in inside(m.needs))]


def inside(needs: Iterable[Need]) -> list[Need]:
    """Those that are read off the encoder's blocks."""
    return [need for need in needs if need.kind not in AROUND]


@dataclass
class Recording:
    """What one forward of the encoder left behind."""

    capture: Capture
    found: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)  # (patches of a call, ...) each
    seconds: float = 0.0

    def add(self, layer: int, call: Call) -> None:
        start, encoder = time.perf_counter(), self.capture.encoder
        for kind in self.capture.kinds[layer]:
            found = computed(kind, call, encoder.cls, encoder.prefix, encoder.suffix)  # (rows, N, ...)
            self.found.setdefault((kind, layer), []).append(found.flatten(0, 1))
        self.seconds += time.perf_counter() - start

    def read(self, need: Need) -> Tensor:
        """A need for all patches of the call, in the encoder's order: (patches, layers, ...).

        Raises RuntimeError if a layer was not run.
        """
        layers = need.resolve(len(self.capture.encoder.blocks))
        if any((need.kind, layer) not in self.found for layer in layers):
            raise RuntimeError(
                f"the vision encoder ran without attention in layers {layers}, so there is no {need.kind}: "
                "compress() the model again after changing its attention implementation"
            )
        return torch.stack([torch.cat(self.found[need.kind, layer]) for layer in layers], dim=1)


@torch.no_grad()
def computed(kind: str, call: Call, cls: int, prefix: int, suffix: int = 0) -> Tensor:
    """A need of one layer, for the tokens between the first `prefix` and the last `suffix`: (B, N, ...).

    cls  the index of the CLS token in a row; whole maps keep all tokens: (B, H, M, M)
    """
    if kind == "attention":
        return _weights(call.query, call.key, call.scaling, call.mask)
    if kind == "patch_attention":
        found = _mean_attention(call, cls, prefix, suffix)
    else:
        found = _COMPUTE[kind](call, cls)  # (B, M, ...)
    return found[:, prefix : found.shape[1] - suffix]


def _weights(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Post-softmax attention of the given query rows, float32: (B, H, Q, N)."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped queries share keys
    logits = (query @ key.transpose(2, 3)).float().mul_(scaling)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits.add_(mask)
    return logits.softmax(dim=-1)


def _asking(call: Call, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Some of the queries, and the mask of what they see. Values may have to be made, so nothing asks for
    them here."""
    mask = call.mask
    return call.query[:, :, rows], mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]


def _cls(cls: int) -> slice:
    return slice(0, 1) if cls == 0 else slice(-1, None)


def _cls_row(call: Call, cls: int) -> Tensor:
    """What CLS attends to, by head: (B, H, N)."""
    query, mask = _asking(call, _cls(cls))
    return _weights(query, call.key, call.scaling, mask)[:, :, 0]


def _cls_attention(call: Call, cls: int) -> Tensor:
    return _cls_row(call, cls).mean(dim=1)  # (B, N)


def _cls_values(call: Call, cls: int) -> Tensor:
    row, length = _cls_row(call, cls), call.value.float().norm(dim=-1)
    length = length.repeat_interleave(row.shape[1] // length.shape[1], dim=1)  # heads may share values
    return (row * length).sum(dim=1)  # (B, N)


def _cls_logits(call: Call, cls: int) -> Tensor:
    query, key = call.query[:, :, _cls(cls)].float(), call.key.float()
    heads = query.shape[1]
    query = query.unflatten(1, (key.shape[1], -1)).sum(dim=2)  # those that share a key
    return (query @ key.transpose(2, 3))[:, :, 0].sum(dim=1) * (call.scaling / heads)  # (B, N)


def _cls_one_head(call: Call, cls: int) -> Tensor:
    (query, mask), key = _asking(call, _cls(cls)), call.key
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # heads may share keys
    query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))  # (B, 1, rows, heads d)
    mask = mask if mask is None else mask[:, :1]
    return _weights(query, key, query.shape[-1] ** -0.5, mask)[:, 0, 0]  # (B, N)


def _mean_attention(call: Call, cls: int, first: int = 0, last: int = 0) -> Tensor:
    """The mean over the queries that may see a key: images in one row do not thin each other out. The first
    and the last queries may be left out."""
    key = call.key
    query, mask = _asking(call, slice(first, call.query.shape[2] - last))
    batch, heads, rows, _ = query.shape
    most, width = max(_ELEMENTS, 0 if query.is_cpu else query.numel()), heads * key.shape[2]
    few = max(1, most // (rows * width))  # pictures at a time
    step = max(1, most // (min(few, batch) * width))
    found = []
    for start in range(0, batch, few):
        part = slice(start, start + few)
        of_part = mask if mask is None or len(mask) == 1 else mask[part]
        found.append(_received(query[part], key[part], call.scaling, of_part, step, first))
    return torch.cat(found)


def _received(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, step: int, first: int
) -> Tensor:
    """Mean attention of a few pictures, `step` queries at a time: (B, N)."""
    batch, heads, rows, _ = query.shape
    total = query.new_zeros(batch, key.shape[2], dtype=torch.float32)
    if mask is None:
        for chunk in query.split(step, dim=2):
            total += _weights(chunk, key, scaling, None).sum(dim=(1, 2))  # (B, N)
        return total / (heads * rows)
    seen = total.clone()  # by how many queries
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    real = allowed[:, 0].any(dim=-2)  # (B, N) padding, which no query may see, asks nothing
    asks = real[:, first : first + rows]  # (B, rows)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        if mask.shape[-2] == 1:  # all queries see the same keys
            weights = _weights(query[:, :, chunk], key, scaling, mask)
            total += (asks[:, None, None, chunk].float() @ weights)[:, :, 0].sum(dim=1)
            seen += asks[:, chunk].sum(dim=1, keepdim=True) * real
            continue
        part = allowed[:, :1, chunk] & asks[:, None, chunk, None]  # (B, 1, Q, N)
        weights = _weights(query[:, :, chunk], key, scaling, mask[..., chunk, :])
        total += weights.masked_fill(~part, 0).sum(dim=(1, 2))
        seen += part.sum(dim=(1, 2))
    return total / (heads * seen.clamp_min(1))


def _keys(call: Call, cls: int) -> Tensor:
    return call.mean_key()  # (B, N, head_dim)


def _all_keys(call: Call, cls: int) -> Tensor:
    return call.key.transpose(1, 2).flatten(2)  # (B, N, heads head_dim)


_COMPUTE: dict[str, Callable[[Call, int], Tensor]] = {
    "cls_attention": _cls_attention,
    "cls_logits": _cls_logits,
    "cls_one_head": _cls_one_head,
    "cls_values": _cls_values,
    "mean_attention": _mean_attention,
    "keys": _keys,
    "all_keys": _all_keys,
}
OF_CLS = ("cls_attention", "cls_logits", "cls_one_head", "cls_values")
AROUND = ("vision", "text")  # what the features stage itself knows
INSIDE = ("attention", "shift")  # what exists in encoder blocks only
KINDS = (*_COMPUTE, "patch_attention", *INSIDE)
