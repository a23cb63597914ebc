"""Mistral's line over the Pixtral tower: pictures of different sizes, packed, 2 x 2 patches to a token."""

from __future__ import annotations

import torch
from torch import nn

from . import host
from .parts import IMAGE, LLAMA, VOCAB, Grouped, Inputs, MakeInputs, maker, noise, randomise

SIDE, PATCH = 64, 8
SIZES = [(64, 64), (32, 64), (48, 32)]  # (height, width)
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 8,
    "image_size": SIDE,
    "patch_size": PATCH,
}
# Layers with and without rotary positions, dense and expert ones, an indexer that picks 12 tokens, one that
# takes the choice of the layer before, and one that reads another one's cache.
LARGE = {
    **LLAMA,
    "model_type": "mistral_large4_text",
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 12,
    "index_head_dim": 16,
    "index_n_heads": 16,  # scores are sums over heads of what is positive: with few, many tie at 0
    "no_rope_layers": [1, 1, 0, 1],
    "kv_source_layers": [0, 1, 2, 1],
    "indexer_types": ["full", "full", "shared", "full"],
}


def size(number: int) -> tuple[int, int]:
    return SIZES[number % len(SIZES)]


def sized(numbers: Grouped, seed: int) -> Inputs:
    """Each picture in the corner of a square, and its size."""
    pictures = [number for row in numbers for number in row]
    pixels = torch.zeros(len(pictures), 3, SIDE, SIDE)
    for place, number in enumerate(pictures):
        height, width = size(number)
        pixels[place, :, :height, :width] = noise((3, height, width), seed, number)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size(number) for number in pictures])}


def tokens(number: int) -> int:
    height, width = size(number)
    return (height // PATCH // 2) * (width // PATCH // 2)


@host("mistral3")
def mistral3() -> tuple[nn.Module, MakeInputs]:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    model = Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config=dict(PIXTRAL),
            text_config={**LLAMA, "model_type": "mistral", "head_dim": 8, "sliding_window": 12},
            image_token_index=IMAGE,
            tie_word_embeddings=False,
        )
    )
    return randomise(model), maker(sized, tokens)


@host("lighton_ocr")
def lighton_ocr() -> tuple[nn.Module, MakeInputs]:
    from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration

    model = LightOnOcrForConditionalGeneration(
        LightOnOcrConfig(
            vision_config=dict(PIXTRAL),
            text_config={**LLAMA, "model_type": "qwen3", "head_dim": 8},
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )
    )
    return randomise(model), maker(sized, tokens)


@host("mistral_large4")
def mistral_large4() -> tuple[nn.Module, MakeInputs]:
    from transformers import MistralLarge4Config, MistralLarge4ForConditionalGeneration

    config = MistralLarge4Config(
        vision_config=dict(PIXTRAL), text_config={**LARGE, "vocab_size": VOCAB}, image_token_index=IMAGE
    )
    return randomise(MistralLarge4ForConditionalGeneration(config)), maker(sized, tokens)
