"""Families whose pictures become codes of a vocabulary, embedded like words."""

from __future__ import annotations

import torch
from torch import nn

from . import host
from .parts import IMAGE, LLAMA, PAD, Grouped, Inputs, maker, noise, randomise, squares

CODES = 32
VOCABULARY = 160  # the codes are words, too
SIDES = [(16, 24), (24, 16), (16, 16)]  # (height, width) of the pictures; 4 pixels are one code


@host("emu3", lacks=("gradients",))  # codes are looked up, not computed
def emu3():
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    vq = {
        "codebook_size": CODES,
        "embed_dim": 4,
        "latent_channels": 4,
        "temporal_downsample_factor": 2,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
    }
    words = {f"<|visual token {code:06d}|>": 120 + code for code in range(CODES)}
    text = {k: v for k, v in LLAMA.items() if k != "model_type"}
    config = Emu3Config(
        vq_config=vq,
        text_config={**text, "vocab_size": VOCABULARY, "attention_dropout": 0.0},
        vocabulary_map={**words, "<|extra_200|>": 96, "<image>": IMAGE},
    )
    return _spread(Emu3ForConditionalGeneration(config)), maker(draw, length)


def length(i: int) -> int:
    height, width = SIDES[i % len(SIDES)]
    return height // 4 * (width // 4 + 1)  # a token behind each row


def draw(numbers: Grouped, seed: int) -> Inputs:
    pictures = [i for row in numbers for i in row]
    pixels = torch.zeros(len(pictures), 3, 24, 24)
    sizes = [SIDES[i % len(SIDES)] for i in pictures]
    for row, (i, (height, width)) in enumerate(zip(pictures, sizes)):
        pixels[row, :, :height, :width] = noise((3, height, width), seed, i)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


@host("chameleon", works=False)  # codes are looked up
def chameleon():
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    vq = {
        "embed_dim": 8,
        "num_embeddings": CODES,
        "latent_channels": 8,
        "resolution": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_type": "none",
    }
    letters = {str(digit): letter for digit, letter in enumerate("ABCDEFGHIJ")}
    words = {"IMGIMG" + "".join(letters[d] for d in str(code)) + "Z": 120 + code for code in range(CODES)}
    text = {k: v for k, v in LLAMA.items() if k not in ("model_type", "num_key_value_heads")}
    config = ChameleonConfig(
        **{**text, "vocab_size": VOCABULARY, "pad_token_id": PAD, "num_key_value_heads": 4},
        vq_config=vq,
        vocabulary_map={**words, "<image>": IMAGE},
    )
    model = _spread(ChameleonForConditionalGeneration(config))
    return model, maker(squares((3, 16, 16)), lambda i: 16)


def _spread(model: nn.Module) -> nn.Module:
    """A code book as wide as what is looked up in it: pictures would be one code all over."""
    randomise(model)
    nn.init.normal_(model.model.vqmodel.quantize.embedding.weight)
    return model
