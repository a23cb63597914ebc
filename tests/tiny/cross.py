"""Mllama: its pictures are not in the prompt, layers of cross-attention look at them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import host
from .parts import IMAGE, LLAMA, Inputs, MakeInputs, maker, noise, randomise

RATIOS = [(1, 2), (1, 1), (2, 1)]  # (columns, rows) of tiles of the pictures
SUPPORTED = [[1, 1], [1, 2], [2, 1]]
TILES = 2


@host("mllama", memory=True)
def mllama():
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_size": 48,
        "vision_output_dim": 64,
        "image_size": 32,
        "patch_size": 8,
        "max_num_tiles": TILES,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": SUPPORTED,
    }
    text = {
        **{k: v for k, v in LLAMA.items() if k != "model_type"},
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.ndim <= 1:
            nn.init.constant_(parameter, 0.7)  # shut in a fresh model: pictures would change nothing
    return randomise(model), crossed()


def crossed() -> MakeInputs:
    """One token of the prompt stands for a picture; the mask says which tokens see which tiles."""
    prompts = maker(lambda numbers, seed: {}, lambda i: 1)

    def make_inputs(images=(1, 1), videos=(), seed=0, pads=0, side="left", first=0) -> Inputs:
        inputs = prompts(images, (), seed, pads, side, first)
        if not any(images):
            return inputs
        batch, most = len(images), max(images)
        pixels = torch.zeros(batch, most, TILES, 3, 32, 32)
        ids = torch.zeros(batch, most, dtype=torch.long)  # 0: no picture
        tiles = torch.zeros(batch, most, TILES, dtype=torch.long)
        number = first
        for row, count in enumerate(images):
            for place in range(count):
                ratio = RATIOS[number % len(RATIOS)]
                used = ratio[0] * ratio[1]
                pixels[row, place, :used] = noise((used, 3, 32, 32), seed, number)
                ids[row, place] = SUPPORTED.index(list(ratio)) + 1
                tiles[row, place, :used] = 1
                number += 1
        seen = _seen(inputs["input_ids"], most)  # (B, L, pictures)
        return {
            **inputs,
            "pixel_values": pixels,
            "aspect_ratio_ids": ids,
            "aspect_ratio_mask": tiles,
            "cross_attention_mask": seen[..., None] * tiles[:, None],
        }

    return make_inputs


def _seen(ids: Tensor, most: int) -> Tensor:
    """A token sees the pictures that stand in front of it: (B, L, most)."""
    return ((ids == IMAGE).cumsum(dim=1)[..., None] > torch.arange(most)).long()
