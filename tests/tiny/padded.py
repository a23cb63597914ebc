"""Families whose pictures are patches already: padded to the longest, packed, or tiles of one size."""

from __future__ import annotations

import torch
from torch import nn

from . import host
from .parts import IMAGE, LLAMA, VIDEO, Grouped, Inputs, MakeInputs, maker, noise, randomise, squares

PATCH = 8
GRIDS = [(8, 8), (4, 8), (6, 4)]  # patches of a picture, (rows, cols)
FRAMES, FRAME = 2, (4, 4)


def grid(number: int) -> tuple[int, int]:
    return GRIDS[number % len(GRIDS)]


def merged(number: int) -> int:
    """2 x 2 patches become a token."""
    return grid(number)[0] * grid(number)[1] // 4


def flat(numbers: Grouped) -> list[int]:
    return [number for row in numbers for number in row]


def padded(numbers: Grouped, seed: int) -> Inputs:
    """Patches of each picture in a row of their own, padded to 64, as Siglip 2 takes them."""
    pictures = flat(numbers)
    pixels = torch.zeros(len(pictures), 64, 3 * PATCH**2)
    mask = torch.zeros(len(pictures), 64, dtype=torch.long)
    for place, number in enumerate(pictures):
        count = grid(number)[0] * grid(number)[1]
        pixels[place, :count], mask[place, :count] = noise((count, 3 * PATCH**2), seed, number), 1
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([grid(number) for number in pictures]),
    }


def packed(numbers: Grouped, seed: int) -> Inputs:
    """All patches in one row, those of a 2 x 2 block behind each other."""
    pictures = flat(numbers)
    grids = [(1, *grid(number)) for number in pictures]
    drawn = [noise((t * h * w, 6 * PATCH**2), seed, i) for i, (t, h, w) in zip(pictures, grids)]
    return {"pixel_values": torch.cat(drawn), "image_grid_thw": torch.tensor(grids)}


def packed_film(numbers: Grouped, seed: int) -> Inputs:
    clips = flat(numbers)
    frames = [noise((FRAMES * FRAME[0] * FRAME[1], 6 * PATCH**2), seed, 100 + clip) for clip in clips]
    grids = torch.tensor([[FRAMES, *FRAME]] * len(clips))
    return {"pixel_values_videos": torch.cat(frames), "video_grid_thw": grids}


@host("lfm2_vl")
def lfm2_vl() -> tuple[nn.Module, MakeInputs]:
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    vision = {
        "model_type": "siglip2_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": PATCH,
        "num_patches": 64,
        "vision_use_head": False,
    }
    text = {
        **LLAMA,
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3,
        "block_multiple_of": 8,
    }
    config = Lfm2VlConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    return randomise(Lfm2VlForConditionalGeneration(config)), maker(padded, merged)


@host("lfm3_vl", video=True, blurred=True)
def lfm3_vl() -> tuple[nn.Module, MakeInputs]:
    from transformers import Lfm3VlConfig, Lfm3VlForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "patch_size": PATCH,
        "layer_types": ["conv", "full_attention", "full_attention", "conv"],
    }
    text = {
        **LLAMA,
        "model_type": "lfm3",
        "head_dim": 8,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "sliding_attention", "conv"],
        "sliding_window": 12,
        "conv_L_cache": 3,
    }
    config = Lfm3VlConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=97,
        vision_end_token_id=96,
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    make_inputs = maker(
        packed,
        merged,
        film=packed_film,
        video_length=lambda i: FRAMES * FRAME[0] * FRAME[1] // 4,
        before=[97],
        after=[96],
    )
    return randomise(Lfm3VlForConditionalGeneration(config)), make_inputs


@host("llama4", lacks=("beams", "chunked"))
def llama4() -> tuple[nn.Module, MakeInputs]:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vision_output_dim": 32,
        "image_size": 64,
        "patch_size": PATCH,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "pixel_shuffle_ratio": 0.5,
    }
    text = {
        **LLAMA,
        "model_type": "llama4_text",
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "num_hidden_layers": 4,
        "attention_chunk_size": 16,
    }
    config = Llama4Config(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=97,
        eoi_token_index=96,
    )
    make_inputs = maker(squares((3, 64, 64)), lambda i: 16, before=[97], after=[96])
    return randomise(Llama4ForConditionalGeneration(config)), make_inputs


@host("minimax_m3_vl", video=True)
def minimax_m3_vl(blocks: int = 64) -> tuple[nn.Module, MakeInputs]:
    """blocks: how many a query of a sparse layer may see. Padding shifts them, so that the bare model's rows
    depend on each other unless it is all of them."""
    from transformers import MiniMaxM3VLConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
        MiniMaxM3SparseForConditionalGeneration,
    )

    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": PATCH,
    }
    text = {
        **LLAMA,
        "model_type": "minimax_m3_vl_text",
        "head_dim": 8,
        "rotary_dim": 8,
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 16,
        "intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 8,
        "index_topk_blocks": blocks,
    }
    config = MiniMaxM3VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=32,
    )
    make_inputs = maker(
        packed, merged, film=packed_film, video_length=lambda i: FRAMES * FRAME[0] * FRAME[1] // 4
    )
    return randomise(MiniMaxM3SparseForConditionalGeneration(config)), make_inputs
