"""Phi-4-multimodal: embeds its pictures itself, in front of its first layer; a row of tiles for each."""

from __future__ import annotations

import torch

from . import host
from .parts import IMAGE, LLAMA, Grouped, Inputs, maker, noise, randomise

TILES = [(2, 1), (1, 2), (1, 1)]  # (rows, columns) of tiles of 32 pixels
SIDE, PATCHES, TOKENS = 32, 8, 4  # of a tile: pixels, patches and tokens along one side


@host("phi4_multimodal", works=False)
def phi4_multimodal():
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": SIDE // PATCHES,
        "crop_size": SIDE,
        "image_token_id": IMAGE,
    }
    audio = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_blocks": 2,
        "num_attention_heads": 4,
        "input_size": 16,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 32,
        "audio_token_id": 97,
    }
    text = {k: v for k, v in LLAMA.items() if k not in ("model_type", "eos_token_id")}
    model = Phi4MultimodalForCausalLM(
        Phi4MultimodalConfig(**text, eos_token_id=95, vision_config=vision, audio_config=audio)
    )
    return randomise(model), maker(draw, length)


def length(i: int) -> int:
    """The tiles' tokens and those of the whole picture, a token behind each row, one in between."""
    rows, columns = TILES[i % len(TILES)]
    return rows * TOKENS * (columns * TOKENS + 1) + 1 + TOKENS * (TOKENS + 1)


def draw(numbers: Grouped, seed: int) -> Inputs:
    pictures = [i for row in numbers for i in row]
    shapes = [TILES[i % len(TILES)] for i in pictures]
    most = max(rows * columns for rows, columns in shapes) + 1
    pixels = torch.zeros(len(pictures), most, 3, SIDE, SIDE)
    mask = torch.zeros(len(pictures), most, PATCHES, PATCHES)
    for row, (i, (rows, columns)) in enumerate(zip(pictures, shapes)):
        used = rows * columns + 1
        pixels[row, :used] = noise((used, 3, SIDE, SIDE), seed, i)
        mask[row, :used] = 1
    sizes = [[rows * SIDE, columns * SIDE] for rows, columns in shapes]
    return {
        "image_pixel_values": pixels,
        "image_sizes": torch.tensor(sizes),
        "image_attention_mask": mask,
    }
