"""In which models tokens can be cut inside of the decoder: told by how it is built."""

from __future__ import annotations

import inspect
import sys

from torch import nn

from ..hosts import Vision
from .blocks import BlockMasks


def unsupported(vision: Vision, layer: int) -> str | None:
    """Why tokens cannot be cut in front of that decoder layer of a model, or None where they can."""
    host, decoder, config = vision.host, vision.decoder, vision.decoder.config
    if host.memory or host.reader:
        return "its decoder has no images in its prompt"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None):
        kinds = {"sliding_attention"}
    if kinds:
        return f"its decoder has layers of {', '.join(sorted(kinds))}, and not of full attention alone"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers of its decoder share keys, which must then be of the same tokens"
    if BlockMasks.of(vision).build is not None:
        return "tokens of an image see each other in its decoder"
    if not _is_built_alike(decoder):
        return f"{type(decoder).__name__} is not built as vtc knows it"
    if reason := unknown_attention(config._attn_implementation or "eager"):
        return reason
    deep = _deep_layers(vision)
    if deep is None:
        return "its early decoder layers are given features of images"
    if layer < deep:
        return (
            f"its first {deep} decoder layers are given features of images: decoder_layer={deep} is the first"
        )
    return None


def unknown_attention(implementation: str) -> str | None:
    """Other kernels read borders of prompts off positions with gaps, or take masks of their own."""
    if implementation.removeprefix("vtc|") in ("sdpa", "eager"):
        return None
    return (
        f"stage 'decoder' does not work with {implementation}: load the model with attn_implementation='sdpa'"
    )


def _is_built_alike(decoder: nn.Module) -> bool:
    from transformers import masking_utils

    family = sys.modules[type(decoder).__module__]
    layers, needed = getattr(decoder, "layers", None), {"attention_mask", "past_key_values"}
    return (
        getattr(family, "create_causal_mask", None) is masking_utils.create_causal_mask
        and isinstance(layers, nn.ModuleList)
        and all(needed <= inspect.signature(type(layer).forward).parameters.keys() for layer in layers)
        and all(isinstance(getattr(layer, "self_attn", None), nn.Module) for layer in layers)
        and isinstance(getattr(decoder, "norm", None), nn.Module)
    )


def _deep_layers(vision: Vision) -> int | None:
    """How many of the first layers are given features of images beside the prompt; None: nobody says."""
    if vision.host.features == "deepstack_features":
        return None
    if vision.host.deep is None:
        return 0
    configs = (vision.encoder.tower.config, getattr(vision.base.config, "vision_config", None))
    indices = (getattr(config, "deepstack_visual_indexes", None) for config in configs)
    return next((len(own) for own in indices if own is not None), None)
