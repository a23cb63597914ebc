"""Gemmas with tests of their own, since the contract of prompts and answers does not fit: T5Gemma 2 and
DiffusionGemma read the prompt in an encoder, ShieldGemma 2 says yes or no. They are not in HOSTS."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .gemma import GEMMA3, MIXED, PATCH, gemma3_config, mm_types, patches, pooled, pooled_length, types
from .parts import IMAGE, LLAMA, SIGLIP, Inputs, MakeInputs, maker, randomise, squares

CANVAS = 8  # tokens that DiffusionGemma writes at once


def answer(ids: Tensor) -> Inputs:
    """What a decoder of its own has written so far."""
    return {"decoder_input_ids": torch.tensor([[1, 5, 7]]).repeat(len(ids), 1)}


def t5gemma2() -> tuple[nn.Module, MakeInputs]:
    from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

    encoder = {
        "text_config": {**GEMMA3, "model_type": "t5gemma2_text"},
        "vision_config": {**SIGLIP, "image_size": 64},
        "mm_tokens_per_image": 16,
        "boi_token_index": 97,
        "eoi_token_index": 96,
        "image_token_index": IMAGE,
    }
    decoder = {**GEMMA3, "model_type": "t5gemma2_decoder"}
    config = T5Gemma2Config(
        encoder=encoder, decoder=decoder, image_token_index=IMAGE, tie_word_embeddings=False
    )
    make_inputs = maker(squares((3, 64, 64)), lambda i: 16, before=[97], after=[96], extra=answer)
    return randomise(T5Gemma2ForConditionalGeneration(config)), make_inputs


def canvas(ids: Tensor) -> Inputs:
    """The first canvas is random where it is not given."""
    return {**mm_types(ids), "decoder_input_ids": torch.arange(3, 3 + CANVAS).repeat(len(ids), 1)}


def diffusion_gemma() -> tuple[nn.Module, MakeInputs]:
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    text = {
        **LLAMA,
        **MIXED,
        "model_type": "diffusion_gemma_text",
        "head_dim": 8,
        "global_head_dim": 8,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 16,
        "use_bidirectional_attention": "vision",
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "pooling_kernel_size": 2,
        "patch_size": PATCH,
        "position_embedding_size": 16,
    }
    config = DiffusionGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        boi_token_id=96,
        eoi_token_id=95,
        canvas_length=CANVAS,
    )
    make_inputs = maker(patches, pooled_length, before=[96], after=[95], extra=canvas)
    return randomise(DiffusionGemmaForBlockDiffusion(config)), make_inputs


def shieldgemma2() -> tuple[nn.Module, MakeInputs]:
    from transformers import ShieldGemma2Config, ShieldGemma2ForImageClassification

    config = gemma3_config(ShieldGemma2Config, yes_token_index=5, no_token_index=6)
    return randomise(ShieldGemma2ForImageClassification(config)), pooled(types)
