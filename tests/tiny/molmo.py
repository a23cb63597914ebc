"""Molmo 2: a low-resolution view and overlapping crops, pooled by a table of patch numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import host
from .parts import IMAGE, LLAMA, VOCAB, Grouped, Inputs, MakeInputs, maker, noise, randomise

SIDE, PATCH = 32, 4  # 8 x 8 patches to a crop
CROPS = [2, 1, 2]  # of a picture, side by side, besides its low-resolution view


def pooling(rows: int, cols: int, numbers: Tensor) -> Tensor:
    """numbers (2 rows, 2 cols): patches. The four behind each token: (rows * cols, 4)."""
    return numbers.view(rows, 2, cols, 2).transpose(1, 2).reshape(rows * cols, 4)


def pools(number: int, first: int) -> tuple[Tensor, list[int]]:
    """The patches behind each token of a picture whose first patch is `first`, and its grids.

    Neighbouring crops overlap by two patches, and the last row of tokens has two patches only, as at an
    uneven edge."""
    patches = torch.arange(64).view(8, 8)
    low = pooling(4, 4, first + patches)
    crops = [first + 64 * (1 + crop) + patches for crop in range(CROPS[number % len(CROPS)])]
    wide = torch.cat([crops[0]] + [crop[:, 2:] for crop in crops[1:]], dim=1)[2:]
    high = pooling(3, wide.shape[1] // 2, wide)
    high[-(wide.shape[1] // 2) :, 2:] = -1
    return torch.cat([low, high]), [4, 4, 3, wide.shape[1] // 2]


def length(number: int) -> int:
    return len(pools(number, 0)[0])


def draw(numbers: Grouped, seed: int) -> Inputs:
    pixels, tables, grids, first = [], [], [], 0
    for number in [number for row in numbers for number in row]:
        table, grid = pools(number, first)
        views = 1 + CROPS[number % len(CROPS)]
        pixels.append(noise((views, 64, 3 * PATCH**2), seed, number))
        tables.append(table)
        grids.append(grid)
        first += 64 * views
    return {
        "pixel_values": torch.cat(pixels),
        "image_token_pooling": torch.cat(tables),
        "image_grids": torch.tensor(grids),
        "image_num_crops": torch.tensor([len(crops) for crops in pixels]),
    }


def types(ids: Tensor) -> Inputs:
    return {"mm_token_type_ids": (ids == IMAGE).long()}


def frames(number: int) -> int:
    return 2 + number % 2


def film(numbers: Grouped, seed: int) -> Inputs:
    """Videos of low-resolution frames, in the place of pictures."""
    clips = [number for row in numbers for number in row]
    pixels = [noise((frames(clip), 64, 3 * PATCH**2), seed, clip) for clip in clips]
    table = [pooling(4, 4, 64 * frame + torch.arange(64)) for frame in range(sum(map(len, pixels)))]
    return {
        "pixel_values_videos": torch.cat(pixels),
        "video_token_pooling": torch.cat(table),
        "video_grids": torch.tensor([[len(clip), 4, 4] for clip in pixels]),
    }


@host("molmo2", lacks=("chunked",))
def molmo2():
    return molmo(draw, length)


@host("molmo2-video", "molmo2", films=True, lacks=("chunked",))
def molmo2_video():
    """Videos take the token of pictures and cannot come in one call with them."""
    return molmo(film, lambda i: 16 * frames(i))


def molmo(pictures, tokens) -> tuple[nn.Module, MakeInputs]:
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    vision = {
        **heads,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "image_size": [SIDE, SIDE],
        "patch_size": PATCH,
    }
    adapter = {
        **heads,
        "hidden_size": 32,
        "intermediate_size": 48,
        "text_hidden_size": 32,
        "vision_feature_layer": [3, 1],
    }
    text = {**LLAMA, "head_dim": 8, "vocab_size": VOCAB, "additional_vocab_size": 8}
    del text["model_type"]
    config = Molmo2Config(
        vision_config=vision,
        adapter_config=adapter,
        text_config=text,
        image_patch_id=IMAGE,
        image_start_token_id=97,
        low_res_image_start_token_id=96,
        image_end_token_id=95,
        frame_start_token_id=94,
        frame_end_token_id=93,
    )
    make_inputs = maker(pictures, tokens, before=[96], after=[95], extra=types)
    return randomise(Molmo2ForConditionalGeneration(config)), make_inputs
