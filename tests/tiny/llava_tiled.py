"""Families that pack the tiles of a picture as LLaVA-NeXT does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import host
from .llava_like import FRAMES, films, flat
from .parts import CLIP, IMAGE, LLAMA, SIGLIP, VIDEO, Grouped, Inputs, MakeInputs, maker, noise, randomise

SIDE = 32


def pinpoints(side: int) -> list[list[int]]:
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]


def packed(
    model: nn.Module, side: int, found: Callable[[Any], Tensor] = lambda out: out.pooler_output[0], **films
) -> MakeInputs:
    """Pictures of four shapes: different tilings and un-padding. Lengths are what the bare model packs:
    `found` takes the tokens of one picture out of its output."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    shapes = [(60, 64), (32, 60), (62, 30), (40, 64)]  # (height, width) in 1/64 of two tiles

    def size(i: int) -> tuple[int, int]:
        return tuple(pixels * side // 32 for pixels in shapes[i % len(shapes)])

    def draw(numbers: Grouped, seed: int) -> Inputs:
        pictures = flat(numbers)
        tiles = [image_size_to_num_patches(size(i), pinpoints(side), side) for i in pictures]
        pixels = torch.zeros(len(pictures), max(tiles), 3, side, side)
        for row, (i, count) in enumerate(zip(pictures, tiles)):
            pixels[row, :count] = noise((count, 3, side, side), seed, i)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([size(i) for i in pictures])}

    @torch.no_grad()
    def length(i: int) -> int:
        bare = type(model.model).get_image_features(model.model, **draw([[i]], 0), return_dict=True)
        return len(found(bare))

    lengths = [length(i) for i in range(len(shapes))]
    return maker(draw, lambda i: lengths[i % len(shapes)], **films)


@host("llava_next_video", video=True)
def llava_next_video():
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    model = randomise(
        LlavaNextVideoForConditionalGeneration(
            LlavaNextVideoConfig(
                vision_config=dict(CLIP),
                text_config=dict(LLAMA),
                image_token_index=IMAGE,
                video_token_index=VIDEO,
                image_grid_pinpoints=pinpoints(SIDE),
            )
        )
    )
    return model, packed(model, SIDE, film=films((3, SIDE, SIDE)), video_length=lambda i: FRAMES * 4)


@host("llava_onevision", video=True)
def llava_onevision():
    """More than two tiles are made smaller again by interpolation, and so are frames: 3 x 3 to 2 x 2."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    side = 24
    model = randomise(
        LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(
                vision_config={**SIGLIP, "image_size": side},
                text_config={**LLAMA, "model_type": "qwen2"},
                image_token_index=IMAGE,
                video_token_index=VIDEO,
                image_grid_pinpoints=pinpoints(side),
                vision_aspect_ratio="anyres_max_2",
            )
        )
    )
    film = films((3, side, side))  # a newline token ends it
    return model, packed(model, side, film=film, video_length=lambda i: FRAMES * 4 + 1)


@host("granite4_vision", blurred=True, lacks=("chunked", "beams", "cache"))  # beams mix up a prompt's images
def granite4_vision():
    """2 x 2 tokens for each window of 4 x 4 patches, other ones for each of four layers of the decoder."""
    from transformers import Granite4VisionConfig, Granite4VisionForConditionalGeneration

    text = {**LLAMA, "model_type": "granite4_vision_text", "num_hidden_layers": 4}
    model = randomise(
        Granite4VisionForConditionalGeneration(
            Granite4VisionConfig(
                vision_config={**SIGLIP, "hidden_size": 64, "image_size": 64},
                text_config={**text, "attention_multiplier": 8**-0.5},
                image_token_index=IMAGE,
                image_grid_pinpoints=pinpoints(64),
                vision_feature_select_strategy="full",
                downsample_rate="2/4",
                deepstack_layer_map=[[1, 0], [2, 1]],
                spatial_target_layers=[2, 3],
                qformer_config={"model_type": "blip_2_qformer", "vocab_size": 32, "intermediate_size": 64},
            )
        )
    )
    return model, packed(model, 64, lambda out: out.deepstack_features[0][1][0])
