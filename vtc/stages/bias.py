"""The decoder attends to a merged token as to its members: biases by size and distance on its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Vision
from ..restoring import Nearest
from ..threads import ByThread
from .groups import Groups

_ADDS = ("molmo2",)  # add features to the embeddings of their placeholders


class GroupBias:
    """Puts the biases of a merge rule onto the masks of the decoder."""

    def __init__(self, vision: Vision, rule: Nearest):
        if reason := _refusal(vision, rule):
            raise ValueError(
                f"merge='{rule.name}' biases the attention of the decoder, but {vision.host.name} {reason}"
            )
        self.rule, self.decoder = rule, vision.decoder
        config = vision.base.config
        names = ("image_token_id", "video_token_id")
        self._ids = [value for name in names if (value := getattr(config, name, None)) is not None]
        self._first: ByThread[tuple[Tensor, Tensor]] = ByThread()  # masks of this forward, and of layer 0

    def install(self) -> Any:
        """A handle that takes it off again."""
        return self.decoder.layers[0].register_forward_pre_hook(self._enter_first, with_kwargs=True)

    def images(self, ids: Tensor | None) -> Tensor | None:
        """Which of the ids (B, L) stand for image tokens."""
        return None if ids is None else torch.isin(ids, torch.tensor(self._ids, device=ids.device))

    def begin(self) -> None:
        """A forward of the decoder begins, perhaps without a bias."""
        self._first.pop()

    def apply(self, kwargs: dict, groups: Groups, positions: Tensor, reads: bool) -> dict:
        """Arguments of the decoder, with biases in a mask of four dimensions.

        groups     of the keys, (B, past + q)
        positions  of the queries
        reads      whether this forward reads the prompt with the pictures
        """
        from transformers.masking_utils import create_causal_mask

        if reason := _unbiased(self.decoder):
            raise RuntimeError(f"merge='{self.rule.name}' biases attention, but this decoder {reason}")
        x, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if mask is None or mask.dim() == 2:
            cache = kwargs.get("past_key_values")
            mask = create_causal_mask(self.decoder.config, x, mask, cache, allow_is_causal_skip=False)
        groups = groups.padded(mask.shape[-1])  # (B, kv)
        same = reads or self.rule.tokens == "all"
        bias = torch.zeros_like(mask[:, :1], dtype=torch.float32)  # (B, 1, q, kv)
        if same and self.rule.distance:
            lost = (groups.size > 1).any(dim=1)  # (B,) others are as they were
            bias = bias + (self._far(positions, groups.position) * lost[:, None, None])[:, None]
        size, even = (
            part.float().log()[:, None, None] * self.rule.sizes for part in (groups.size, groups.even)
        )
        given = _biased(mask, bias + size, x.dtype)
        self._first.set((given, _biased(mask, bias + even, x.dtype) if same else given))
        return {**kwargs, "attention_mask": given}

    def _far(self, query: Tensor, key: Tensor) -> Tensor:
        """log(2 - g) for queries at positions (B, q) and keys at (B, kv): (B, q, kv)."""
        frequencies = self.decoder.rotary_emb.inv_freq.float()  # (F,)
        apart = (query.to(key.device)[:, :, None] - key[:, None]).abs()
        steps = torch.arange(int(apart.max()) + 1, device=frequencies.device)[:, None]  # (all distances, 1)
        return (2 - (steps * frequencies).cos().mean(dim=1)).log().to(key.device)[apart]

    def _enter_first(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        masks, mask = self._first.pop(), kwargs.get("attention_mask")
        if masks is None:
            return None
        given, first = masks
        if mask is None or mask.shape != given.shape:
            raise RuntimeError(
                f"{type(self.decoder).__name__} does not hand its mask on to its layers, so that sizes of "
                "merged tokens get lost: compress with merge='nearest'"
            )
        return args, {**kwargs, "attention_mask": first.to(mask.device)}


def _biased(mask: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask + bias.to(mask.dtype)
    return torch.where(mask, bias.to(dtype), torch.finfo(dtype).min)  # padding sees something, so no NaN


def _unbiased(decoder: nn.Module) -> str | None:
    name = decoder.config._attn_implementation
    if name in ("sdpa", "eager"):
        return None
    return f"runs {name}, which takes no bias: load it with attn_implementation='sdpa'"


def _refusal(vision: Vision, rule: Nearest) -> str | None:
    """Why the decoder of a host cannot be biased."""
    host, config = vision.host, vision.decoder.config
    nearest = "use merge='nearest'"
    if host.memory or host.reader:
        return f"looks at its pictures through cross-attention: {nearest}"
    if host.late or host.features == "deepstack_features" or host.name in _ADDS:
        return f"changes features after they were marked: {nearest}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None):
        kinds = {"sliding_attention"}
    if host.slots or kinds:
        return f"has layers of {', '.join(sorted(kinds)) or 'sparse attention'}: {nearest}"
    if rule.distance and (vision.mrope or not hasattr(vision.decoder.rotary_emb, "inv_freq")):
        return "has positions of several components: use merge={'name': 'restore', 'distance': False}"
    return _unbiased(vision.decoder)
