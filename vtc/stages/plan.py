"""Which tokens of a prompt go on, and everything that has an entry for each token cut down to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tokens import gather

# What some families give their decoder besides, one entry for each token of the prompt: (B, L, ...).
PER_TOKEN = {"per_layer_inputs", "ple_input_ids", "moe_mm_token_type_ids", "mm_token_type_ids"}
GATHERED = {"position_ids", "position_embeddings"} | PER_TOKEN  # what each of their layers is given so
VISUAL = {"visual_pos_masks": "deepstack_visual_embeds", "vision_mask": "deepstack_features"}


@dataclass
class Plan:
    """Which of L positions go on, for each of B rows of different lengths.

    index   (B, K) position that each of the K remaining places takes
    real    (B, K) False where a place is padding
    source  (B, L) place whose output each position reads: its own, or the last one before it
    headless (B, L) True where there is none before it, so that what came before these tokens is to be read
    """

    index: Tensor
    real: Tensor
    source: Tensor
    headless: Tensor

    @classmethod
    def of(cls, keep: Tensor, pad_left: bool) -> Plan:
        """keep (B, L): the tokens that stay. Rows are padded again to the longest, on the side they were."""
        counts = keep.sum(dim=1)  # (B,)
        k = max(int(counts.max()), 1)  # a chunk of dropped tokens only goes on as one place of padding
        order = (~keep).long().argsort(dim=1, stable=True)  # (B, L) kept ones first, in order
        place = torch.arange(k, device=keep.device).expand(len(keep), k)  # (B, K)
        shift = (k - counts)[:, None] if pad_left else torch.zeros_like(counts)[:, None]  # (B, 1)
        real = place >= shift if pad_left else place < counts[:, None]
        index = order.gather(1, (place - shift).clamp_min(0))
        before = keep.long().cumsum(dim=1)  # (B, L) how many stay up to each position
        source = ((before - 1).clamp_min(0) + shift).clamp_max(k - 1)
        return cls(index, real, source, before == 0)

    @property
    def k(self) -> int:
        return self.index.shape[1]


def marked_tokens(x: Tensor, kwargs: dict) -> Tensor:
    """Which tokens of x (B, L, D) are dropped ones. Some families put their features not into the prompt but
    into early layers only: (B, L)."""
    marked = x[..., 0].isnan()
    for _, _, image, layers in _visual(kwargs):
        nan = layers[0][:, 0].isnan().to(image.device)  # (tokens of all images,)
        marked = marked | image.masked_scatter(image, nan).to(x.device)
    return marked


def _visual(kwargs: dict) -> Iterator[tuple[str, str, Tensor, list[Tensor]]]:
    """Features for early layers, where there are any: the names of the mask and of the features, which
    tokens are an image's (B, L), and for each layer (tokens of all images, D)."""
    for mask_name, name in VISUAL.items():
        mask, features = kwargs.get(mask_name), kwargs.get(name)
        if mask is not None and features is not None:
            layers = features.values() if isinstance(features, dict) else features
            yield mask_name, name, mask if mask.dim() == 2 else mask[..., 0], list(layers)


def routed(logits: Tensor, source: Tensor) -> Tensor:
    """What a router of experts made of the shortened rows, one behind the other: (B * K, E) to (B * L, E)."""
    return gather(logits.unflatten(0, (len(source), -1)), source.to(logits.device)).flatten(0, 1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Columns of position ids (..., B or 1, L) at index (B, K): (..., B, K)."""
    x = x.expand(*x.shape[:-2], len(index), x.shape[-1])
    return x.gather(-1, index.expand(*x.shape[:-2], *index.shape))


def text_row(positions: Tensor) -> Tensor:
    """Of positions of several components (3 or 4, B, L) the first: (B, L)."""
    return positions if positions.dim() == 2 else positions[0]


def count_back(last: Tensor, real: Tensor) -> Tensor:
    """Positions of keys that are counted one by one, padding left out, up to `last` (B,); which keys are no
    padding is `real` (B, n): (B, n)."""
    count = real.long().cumsum(dim=1)
    return last.to(real.device)[:, None] - count[:, -1:] + count


def shorten_others(kwargs: dict, plan: Plan, keep: Tensor) -> dict:
    """What else the decoder is given for each token, or for each token of an image."""
    short = {}
    for name in PER_TOKEN & kwargs.keys():
        if kwargs[name] is not None:  # (B, L, ...)
            value = kwargs[name].expand(len(keep), *kwargs[name].shape[1:])
            rows = torch.arange(len(keep), device=value.device)[:, None]
            short[name] = value[rows, plan.index.to(value.device)]
    for mask_name, name, image, layers in _visual(kwargs):
        mask, features = kwargs[mask_name], kwargs[name]
        stay = keep.to(image.device)[image]  # (tokens of all images,)
        chosen = take(image, plan.index.to(image.device)) & plan.real.to(image.device)  # (B, K)
        short[mask_name] = (
            chosen if mask.dim() == 2 else chosen[..., None].expand(*chosen.shape, mask.shape[-1])
        )
        layers = [layer[stay.to(layer.device)] for layer in layers]
        short[name] = dict(zip(features, layers)) if isinstance(features, dict) else layers
    return short


def gathered(value: Any, index: Tensor, name: str) -> Any:
    """What there is one of for each token of the prompt, for those at index (B, K)."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return type(value)(gathered(part, index, name) for part in value)
    index = index.to(value.device)
    if name == "position_ids":
        return take(value, index)  # (..., B or 1, L)
    if name == "position_embeddings":  # (..., B or 1, L, d)
        value = value.expand(*value.shape[:-3], len(index), *value.shape[-2:])
        wide = index[..., None].expand(*value.shape[:-3], *index.shape, value.shape[-1])
        return value.gather(-2, wide)
    rows = torch.arange(len(index), device=index.device)[:, None]
    return value.expand(len(index), *value.shape[1:])[rows, index]


def mask2d(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def joined(old: Tensor | None, real: Tensor, past: int) -> Tensor | None:
    """The mask over the past (B, past) and the shortened tokens (B, K), None where nothing is padding."""
    if old is None and bool(real.all()):
        return None
    return torch.cat([real.new_ones(len(real), past) if old is None else old, real], dim=1)


def valid_tokens(mask: Any, flat: Tensor | None, past: int, x: Tensor) -> Tensor:
    """Which of the tokens x (B, L, D) are not padding, from a mask of any form: (B, L)."""
    batch, length, _ = x.shape
    if flat is not None:
        return flat[:, -length:].bool()
    if isinstance(mask, dict):  # those of recurrent layers are two-dimensional
        mask = min((m for m in mask.values() if m is not None), key=Tensor.dim, default=None)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=x.device)
    if mask.dim() == 2:
        return mask[:, -length:].bool().expand(batch, length)
    # (B, 1, L, kv): a padding token does not attend to itself
    own = mask[:, 0].diagonal(offset=past, dim1=1, dim2=2)[:, :length]
    return (own if own.dtype == torch.bool else own >= 0).expand(batch, length)
