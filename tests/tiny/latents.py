"""Families that show the language model a fixed number of latents instead of patches."""

from __future__ import annotations

import torch

from . import host
from .parts import IMAGE, LLAMA, PAD, VOCAB, Grouped, Inputs, maker, randomise, squares


@host("aria")
def aria():
    from transformers import AriaConfig, AriaForConditionalGeneration

    vision = {
        "model_type": "idefics3_vision",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
    }
    text = {
        **LLAMA,
        "model_type": "aria_text",
        "moe_num_experts": 4,
        "moe_topk": 2,
        "moe_num_shared_experts": 1,
    }
    config = AriaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projector_patch_to_query_dict={64: 16},
    )
    return randomise(AriaForConditionalGeneration(config)), maker(squares((3, 32, 32)), lambda i: 16)


QFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_hidden_size": 32,
}
BLIP_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
OPT = {
    "model_type": "opt",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@host("blip-2", works=False)
def blip_2():
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    config = Blip2Config(
        vision_config=BLIP_VISION,
        qformer_config=QFORMER,
        text_config=OPT,
        num_query_tokens=16,
        image_token_index=IMAGE,
    )
    return randomise(Blip2ForConditionalGeneration(config)), maker(squares((3, 32, 32)), lambda i: 16)


@host("instructblip", works=False)
def instructblip():
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

    config = InstructBlipConfig(
        vision_config=BLIP_VISION,
        qformer_config=QFORMER,
        text_config=OPT,
        num_query_tokens=16,
        image_token_index=IMAGE,
    )
    pictures = squares((3, 32, 32))

    def draw(numbers: Grouped, seed: int) -> Inputs:
        questions = [[3 + i, 5 + i, 7 + i] for row in numbers for i in row]  # one for each picture
        return {**pictures(numbers, seed), "qformer_input_ids": torch.tensor(questions)}

    return randomise(InstructBlipForConditionalGeneration(config)), maker(draw, lambda i: 16)
