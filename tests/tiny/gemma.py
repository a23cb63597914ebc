"""PaliGemma and the Gemma line: pictures whose tokens attend to each other in both directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import host
from .parts import (
    IMAGE,
    LLAMA,
    SIGLIP,
    VIDEO,
    VOCAB,
    Grouped,
    Inputs,
    MakeInputs,
    maker,
    noise,
    randomise,
    squares,
)

WINDOW = 12  # of the sliding layers: shorter than any prompt with a picture
MIXED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
GEMMA3 = {**LLAMA, **MIXED, "model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8}


def prefix(ids: Tensor) -> Inputs:
    """All of a prompt is prefix, as PaliGemma's processor says it without a suffix to train on."""
    return {"token_type_ids": torch.zeros_like(ids)}


def types(ids: Tensor) -> Inputs:
    return {"token_type_ids": (ids == IMAGE).long()}


def paligemma(text: dict) -> tuple[nn.Module, MakeInputs]:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config=dict(SIGLIP),
        text_config={**LLAMA, **text, "head_dim": 8},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCAB,
        tie_word_embeddings=False,  # else every answer of so small a model is its last word again
    )
    model = PaliGemmaForConditionalGeneration(config)
    return randomise(model), maker(squares((3, 32, 32)), lambda i: 16, extra=prefix)


@host("paligemma-gemma", "paligemma", lacks=("chunked", "chats"))
def paligemma_gemma():
    return paligemma({"model_type": "gemma", "num_hidden_layers": 4})


@host("paligemma-gemma2", "paligemma", lacks=("static", "chunked", "chats"))
def paligemma_gemma2():
    return paligemma({**MIXED, "model_type": "gemma2", "query_pre_attn_scalar": 8})


@host("gemma3")
def gemma3() -> tuple[nn.Module, MakeInputs]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration(gemma3_config(Gemma3Config))
    return randomise(model), pooled(types)


def gemma3_config(cls: type, **others):
    return cls(
        vision_config={**SIGLIP, "image_size": 64},
        text_config=dict(GEMMA3),
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=97,
        eoi_token_index=96,
        **others,
    )


def pooled(extra) -> MakeInputs:
    """8 x 8 patches, averaged to 4 x 4 tokens."""
    return maker(squares((3, 64, 64)), lambda i: 16, before=[97], after=[96], extra=extra)


# Layers with a cache of their own and layers that read another one's, and a residual stream per layer.
GEMMA4 = {
    **LLAMA,
    **MIXED,
    "model_type": "gemma4_text",
    "head_dim": 8,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 2,
    "use_bidirectional_attention": "vision",
}
PATCH = 4
GRIDS = [(8, 8), (4, 8), (6, 4)]  # patches of a picture, (rows, cols)
FRAMES, FRAME = 3, (4, 4)


def grid(number: int) -> tuple[int, int]:
    return GRIDS[number % len(GRIDS)]


def patched(grids: list[tuple[int, int]], pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Patches (pictures, 64, 48) in raster order, padded, and the column and row of each, -1 for padding."""
    pixels, places = torch.zeros(len(grids), 64, 3 * PATCH**2), torch.full((len(grids), 64, 2), -1)
    for i, ((height, width), picture) in enumerate(zip(grids, pictures, strict=True)):
        pixels[i, : height * width] = picture
        row, col = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places[i, : height * width] = torch.stack([col, row], dim=-1).flatten(0, 1)
    return pixels, places


def patches(numbers: Grouped, seed: int) -> Inputs:
    pictures = [number for row in numbers for number in row]
    drawn = [noise((height * width, 3 * PATCH**2), seed, i) for i in pictures for height, width in [grid(i)]]
    pixels, places = patched([grid(i) for i in pictures], drawn)
    return {"pixel_values": pixels, "image_position_ids": places}


def clips(numbers: Grouped, seed: int) -> Inputs:
    """Videos of three frames; all frames lie behind each other."""
    count = sum(map(len, numbers))
    frames = [
        noise((FRAME[0] * FRAME[1], 3 * PATCH**2), seed, 100 * number + frame)
        for row in numbers
        for number in row
        for frame in range(FRAMES)
    ]
    pixels, places = patched([FRAME] * count * FRAMES, frames)
    return {
        "pixel_values_videos": pixels,
        "video_position_ids": places,
        "num_frames_per_video": torch.full((count,), FRAMES),
    }


def pooled_length(number: int) -> int:
    return grid(number)[0] * grid(number)[1] // 4


def mm_types(ids: Tensor) -> Inputs:
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO)}


@host("gemma4", video=True)
def gemma4() -> tuple[nn.Module, MakeInputs]:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    vision = {
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
    config = Gemma4Config(
        vision_config=vision,
        text_config=dict(GEMMA4),
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=97,
        boi_token_id=96,
        eoi_token_id=95,
    )
    make_inputs = maker(
        patches,
        pooled_length,
        film=clips,
        video_length=lambda i: FRAMES * FRAME[0] * FRAME[1] // 4,
        before=[96],
        after=[95],
        extra=mm_types,
    )
    return randomise(Gemma4ForConditionalGeneration(config)), make_inputs


@host("gemma3n", lacks=("chunked",))
def gemma3n() -> tuple[nn.Module, MakeInputs]:
    """Over timm's smallest ConvNeXt: MobileNet-V5, the tower of the checkpoints, cannot be made small."""
    from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration

    text = {
        **LLAMA,
        **MIXED,
        "model_type": "gemma3n_text",
        "head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    vision = {
        "architecture": "test_convnext",
        "model_args": {"dims": [8, 8, 16, 32]},
        "hidden_size": 32,
        "vocab_size": 2,
        "vocab_offset": VOCAB - 2,
    }
    audio = {
        "hidden_size": 32,
        "vocab_size": 2,
        "vocab_offset": VOCAB,
        "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 4,
        "sscp_conv_channel_size": [4, 4],
    }
    config = Gemma3nConfig(
        vision_config=vision,
        text_config=text,
        audio_config=audio,
        vision_soft_tokens_per_image=16,
        image_token_id=IMAGE,
        audio_token_id=97,
        boi_token_id=96,
        eoi_token_id=95,
    )
    model = Gemma3nForConditionalGeneration(config)
    return randomise(model), maker(squares((3, 128, 128)), lambda i: 16, before=[96], after=[95], extra=types)


@host("gemma4_unified", video=True, lacks=("static", "chunked"))
def gemma4_unified() -> tuple[nn.Module, MakeInputs]:
    """No tower: a patch is a token. Its 16 x 16 pixels are one model patch of 4 x 4 with pooling by 1."""
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    text = {
        **LLAMA,
        **MIXED,
        "model_type": "gemma4_unified_text",
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 2,
    }
    vision = {
        "patch_size": PATCH,
        "pooling_kernel_size": 1,
        "mm_embed_dim": 32,
        "mm_posemb_size": 16,
        "output_proj_dims": 32,
    }
    config = Gemma4UnifiedConfig(
        vision_config=vision,
        text_config=text,
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=97,
        boi_token_id=96,
        eoi_token_id=95,
    )
    make_inputs = maker(
        patches,
        lambda i: grid(i)[0] * grid(i)[1],
        film=clips,
        video_length=lambda i: FRAMES * FRAME[0] * FRAME[1],
        before=[96],
        after=[95],
        extra=mm_types,
    )
    return randomise(Gemma4UnifiedForConditionalGeneration(config)), make_inputs
