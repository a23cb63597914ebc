"""Calls of a compressed model that would go wrong without a word, and raise instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .plan import PER_TOKEN, VISUAL

_HANDLED = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
_UNUSED = {"labels", "shift_labels"}  # some families hand them on to a decoder that makes no loss


def refuse_export() -> None:
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise RuntimeError(
            "a compressed model cannot be exported or traced, because its data decide how many tokens "
            "each prompt keeps: remove() the compression before, or use torch.compile"
        )


def refuse_replica(module: nn.Module) -> None:
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "torch.nn.DataParallel runs copies whose image features the first of them would make: train "
            "with DistributedDataParallel (torchrun or accelerate launch), or show one GPU only"
        )


def refuse_foreign_mask(foreign: bool, cache: Any) -> None:
    """transformers builds masks of four dimensions for caches it compiles; others are a caller's own."""
    if foreign and not getattr(cache, "is_compileable", False):
        raise ValueError(
            "an attention mask of more than two dimensions cannot be shortened: give one of two "
            "dimensions, 1 for tokens and 0 for padding, or remove() the compression"
        )


def refuse_unknown_padding(past: int, known: bool) -> None:
    if past and not known:
        raise ValueError(
            "which tokens of this static cache are padding is not known, because generate() of a wrapper "
            "was called: use the model's own, or a dynamic cache"
        )


def refuse_packed(positions: Tensor) -> None:
    if positions.dim() == 2 and bool((positions.diff() < 0).any()):
        raise ValueError(
            "several prompts packed into one row cannot be compressed: give each its own row, padded"
        )


def refuse_gaps_in_positions(config: Any) -> None:
    """Behind a cache; `config` is the decoder's."""
    if "flash" in (config._attn_implementation or ""):
        raise ValueError(
            "flash attention takes positions with gaps behind a cache for several packed prompts: to add "
            "an image to a chat, compress with positions='repack' or load with attn_implementation='sdpa'"
        )


def refuse_gaps_in_the_cache(config: Any, name: str, total: int) -> None:
    """Rows that keep different numbers of tokens are padded again, here behind tokens of the past: a
    sliding window would count that padding, a recurrent state run through it."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if window is not None and kinds <= {"sliding_attention"}:
        kinds = {"sliding_attention"} if window < total else set()
    if kinds:
        raise ValueError(
            f"prompts that keep different numbers of tokens cannot share a batch here: {name} "
            f"has layers of {', '.join(sorted(kinds))}, which would count the padding between them; run "
            "the prompt in one piece instead of chunks, or one prompt at a time"
        )


def refuse_unknown_inputs(kwargs: dict, length: int, name: str) -> None:
    """What a decoder is given, of which nothing is known that has one entry for each of `length` tokens."""
    known = _HANDLED | _UNUSED | PER_TOKEN | VISUAL.keys()
    for key, value in kwargs.items():
        if key not in known and isinstance(value, Tensor) and length in value.shape:
            raise ValueError(
                f"the decoder of {name} was given '{key}' of shape {tuple(value.shape)}, one "
                "entry per token, which vtc cannot shorten: leave it out or remove() the compression"
            )
