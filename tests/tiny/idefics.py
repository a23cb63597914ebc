"""The Idefics line: pictures of a prompt lie in one row of pixel_values, padded by pictures of zeros."""

from __future__ import annotations

import torch
from torch import nn

from . import host
from .parts import IMAGE, LLAMA, PAD, Grouped, Inputs, MakeInputs, maker, noise, randomise

SIDE = 64
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}
SHUFFLED = (SIDE // 8 // 2) ** 2  # tokens of a picture after pixel shuffle by 2
LATENTS = 8
PLAIN = {  # Granite's factors would drown the pictures of so small a model
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 0.35,
}


def rows(numbers: Grouped, seed: int) -> Inputs:
    """One row of pictures for each prompt: (prompts, most pictures of a prompt, 3, SIDE, SIDE)."""
    pixels = torch.zeros(len(numbers), max(map(len, numbers)), 3, SIDE, SIDE)
    for row, pictures in enumerate(numbers):
        for place, number in enumerate(pictures):
            pixels[row, place] = noise((3, SIDE, SIDE), seed, number)
    return {"pixel_values": pixels}


def rows_of_sizes(numbers: Grouped, seed: int) -> Inputs:
    """Pictures of three sizes in the corner of their square, and a mask of their pixels."""
    sizes = [(SIDE, SIDE), (SIDE // 2, SIDE), (SIDE, SIDE - 16)]
    inputs = rows(numbers, seed)
    mask = torch.zeros_like(inputs["pixel_values"][:, :, 0], dtype=torch.bool)
    for row, pictures in enumerate(numbers):
        for place, number in enumerate(pictures):
            height, width = sizes[number % len(sizes)]
            mask[row, place, :height, :width] = True
    return {"pixel_values": inputs["pixel_values"] * mask[:, :, None], "pixel_attention_mask": mask}


def rows_of_real(numbers: Grouped, seed: int) -> Inputs:
    """As Granite Docling's processor says it: a mask of the real pictures."""
    inputs = rows(numbers, seed)
    mask = torch.zeros(inputs["pixel_values"].shape[:2], dtype=torch.bool)
    for row, pictures in enumerate(numbers):
        mask[row, : len(pictures)] = True
    return {**inputs, "pixel_attention_mask": mask}


@host("idefics2")
def idefics2() -> tuple[nn.Module, MakeInputs]:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": LATENTS,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    config = Idefics2Config(
        vision_config=dict(TOWER),
        perceiver_config=perceiver,
        text_config={**LLAMA, "model_type": "mistral"},
        image_token_id=IMAGE,
    )
    model = Idefics2ForConditionalGeneration(config)
    return randomise(model), maker(rows_of_sizes, lambda i: LATENTS, before=[97], after=[97])


def shuffled(config: type, model: type) -> tuple[nn.Module, MakeInputs]:
    made = model(
        config(
            vision_config=dict(TOWER),
            text_config=dict(LLAMA),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        )
    )
    return randomise(made), maker(rows, lambda i: SHUFFLED, before=[97], after=[97])


@host("idefics3")
def idefics3():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return shuffled(Idefics3Config, Idefics3ForConditionalGeneration)


@host("smolvlm")
def smolvlm():
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return shuffled(SmolVLMConfig, SmolVLMForConditionalGeneration)


@host("granite_docling")
def granite_docling() -> tuple[nn.Module, MakeInputs]:
    from transformers import GraniteDoclingConfig, GraniteDoclingForConditionalGeneration

    vision = {
        **TOWER,
        "out_hidden_size": 32,
        "scale_factor": 2,
        "deepstack_visual_indexes": [0, 2],
        "use_fine_route": False,
    }
    text = {**LLAMA, "model_type": "granite_docling_text", **PLAIN}
    model = GraniteDoclingForConditionalGeneration(
        GraniteDoclingConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, pad_token_id=PAD)
    )
    return randomise(model), maker(rows_of_real, lambda i: SHUFFLED, before=[97], after=[97])
