"""Floating-point operations of a prefill, by formula from the numbers in a model's config.

Matrix products only, 2 m n k each, which is the convention of torch's FlopCounterMode. Attention counts every
pair of query and key, masked or not, as the math kernel computes them. What the compressor itself computes is
not in the formulas: `profile` reports it in seconds. `counted` asks torch's counter, for all other models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .hosts import Vision
from .hosts.trunk import REPLACED


@dataclass
class Lengths:
    """What goes through each part of a model in one prefill.

    encoder    (rows, tokens) for each block; a row is an image, tile or frame, and CLS is a token
    projected  features through the projector, over all images
    decoder    (rows, queries, keys) for each layer
    logits     positions the language head computes, over all rows
    """

    encoder: list[tuple[int, int]] = field(default_factory=list)
    projected: int = 0
    decoder: list[tuple[int, int, int]] = field(default_factory=list)
    logits: int = 0


def flops(model: nn.Module, vision: Vision, lengths: Lengths) -> dict[str, int]:
    """Operations by part: {"encoder", "projector", "decoder", "head"}.

    Knows CLIP-like and SigLIP-like towers, projectors of two layers and decoders like Llama's (grouped
    queries, gated MLP). Raises ValueError where the config does not account for every matrix of a part.
    """
    _check_parts(vision)
    text = model.config.get_text_config()
    return {
        "encoder": _encoder(vision, lengths.encoder),
        "projector": _projector(model, vision, text, lengths.projected),
        "decoder": _decoder(vision.decoder, text, lengths.decoder),
        "head": _head(model, text, lengths.logits),
    }


def counted(model: nn.Module, vision: Vision, call: Callable[[], Any]) -> dict[str, int]:
    """Operations by part as torch's counter sees them in one call, under the math kernel. What the compressor
    multiplies between encoder and decoder is in "projector", with all else that stands there."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter, spans, starts = FlopCounterMode(display=False), {"encoder": 0, "decoder": 0}, {}

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: starts.__setitem__(name, counter.get_total_flops())

    def leave(name: str) -> Callable[..., None]:
        return lambda *_: spans.__setitem__(name, spans[name] + counter.get_total_flops() - starts[name])

    towers = {vision.encoder.tower, vision.video_encoder.tower}
    hooks = []
    for name, module in [*(("encoder", tower) for tower in towers), ("decoder", vision.decoder)]:
        hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
    head, before = model.get_output_embeddings(), {}
    hooks.append(
        vision.decoder.register_forward_hook(lambda *_: before.update(head=counter.get_total_flops()))
    )
    try:
        # the counter asks for the graph of module inputs that are parameters
        with sdpa_kernel(SDPBackend.MATH), counter, torch.enable_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    total = counter.get_total_flops()
    after = 0 if head is None else total - before["head"]
    return {
        "encoder": spans["encoder"],
        "projector": total - after - spans["encoder"] - spans["decoder"],
        "decoder": spans["decoder"],
        "head": after,
    }


def kv_bytes(model: nn.Module, rows: int, length: int, bytes_per_number: int) -> int:
    """Size of the keys and values that all decoder layers hold for `length` positions."""
    text = model.config.get_text_config()
    numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * _head_dim(text)
    return numbers * rows * length * bytes_per_number


def _encoder(vision: Vision, blocks: list[tuple[int, int]]) -> int:
    tower = vision.encoder.tower
    width, inner, patch, channels = _numbers(tower, "hidden_size intermediate_size patch_size num_channels")
    embedding = channels * patch * patch * width
    block = 4 * width * width + 2 * width * inner
    pooling = block if getattr(tower.config, "vision_use_head", False) else 0
    _check("vision encoder", tower, embedding + len(blocks) * block + pooling)
    rows, tokens = blocks[0]
    total = 2 * rows * (tokens - vision.encoder.prefix) * embedding
    total += sum(n * (2 * t * block + 4 * t * t * width) for n, t in blocks)
    if pooling:  # one query per image attends to all tokens
        rows, tokens = blocks[-1]
        total += rows * (2 * (block + (2 * tokens - 2) * width * width) + 4 * tokens * width)
    return total


def _projector(model: nn.Module, vision: Vision, text: Any, projected: int) -> int:
    layers = getattr(model.config, "vision_feature_layer", -1)
    layers = 1 if isinstance(layers, int) else len(layers)
    weights = (vision.encoder.tower.config.hidden_size * layers + text.hidden_size) * text.hidden_size
    _check("projector", vision.projector, weights)
    return 2 * projected * weights


def _decoder(decoder: nn.Module, text: Any, layers: list[tuple[int, int, int]]) -> int:
    width, inner, heads, shared = _numbers(
        decoder, "hidden_size intermediate_size num_attention_heads num_key_value_heads"
    )
    attention = heads * _head_dim(text)
    weights = 2 * width * attention + 2 * width * shared * _head_dim(text) + 3 * width * inner
    _check("decoder", decoder, len(layers) * weights)
    return sum(rows * (2 * q * weights + 4 * q * keys * attention) for rows, q, keys in layers)


def _head(model: nn.Module, text: Any, logits: int) -> int:
    weights = text.hidden_size * text.vocab_size
    _check("language head", model.get_output_embeddings(), weights)
    return 2 * logits * weights


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _check_parts(vision: Vision) -> None:
    """All that multiplies by matrices must be in one of the parts that are counted."""
    encoders = (vision.encoder, vision.video_encoder)
    if any(REPLACED in vars(module) for encoder in encoders for module in encoder.tower.modules()):
        raise ValueError("the formulas know no replacements of attention")
    parts = [encoder.tower for encoder in encoders] + [vision.projector, vision.decoder]
    counted = {module for part in parts if part for module in part.modules()}
    rest = any(module not in counted and _weights(module) for module in vision.base.modules())
    if rest or not vision.encoder.blocks or not vision.projector:
        raise ValueError(
            f"cannot count the FLOPs of {type(vision.base).__name__}: it is more, or less, than an encoder "
            "of attention blocks, a projector and a decoder"
        )


def _numbers(part: nn.Module, names: str) -> list[int]:
    values = [getattr(part.config, name, None) for name in names.split()]
    if not all(isinstance(value, int) for value in values):
        raise ValueError(
            f"cannot count the FLOPs of {type(part).__name__}: its config does not give {names} as numbers"
        )
    return values


def _check(name: str, part: nn.Module, expected: int) -> None:
    """A config is understood when the matrices it predicts are the matrices that there are."""
    found = sum(map(_weights, part.modules()))
    if found != expected:
        raise ValueError(
            f"cannot count the FLOPs of this {name}: the config of {type(part).__name__} accounts for "
            f"{expected:,} matrix weights and there are {found:,}; vtc counts CLIP- and SigLIP-like towers, "
            "projectors of two layers and Llama-like decoders, adapters merged"
        )


def _weights(module: nn.Module) -> int:
    """Matrix weights of this module itself."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, nn.Conv2d):
        return module.weight.numel()
    if isinstance(module, nn.MultiheadAttention):  # its output projection is a Linear
        return module.in_proj_weight.numel()
    return 0
