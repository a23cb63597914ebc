"""LLaVA and LLaVA-NeXT over CLIP and SigLIP."""

from __future__ import annotations

import torch
from torch import nn

from . import host
from .parts import CLIP, IMAGE, LLAMA, SIGLIP, Grouped, Inputs, MakeInputs, maker, noise, randomise, squares

WHOLE = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}  # the hosts that tests of single features run on
LLAVA = ("llava-clip", "llava-clip-full", "llava-siglip", "llava_next-clip", "llava_next-siglip")

# what a tower without CLS needs


def llava(tower: dict, **config) -> tuple[nn.Module, MakeInputs]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=dict(tower), text_config=dict(LLAMA), image_token_index=IMAGE, **config)
    )
    side = tower["image_size"]
    tokens = (side // tower["patch_size"]) ** 2
    tokens += tower is CLIP and config.get("vision_feature_select_strategy") == "full"  # CLS
    return randomise(model), maker(squares((3, side, side)), lambda i: tokens)


@host("llava-clip", "llava")
def llava_clip():
    return llava(CLIP)


@host("llava-clip-full", "llava")
def llava_clip_full():  # CLS is a token, too
    return llava(CLIP, vision_feature_select_strategy="full")


@host("llava-siglip", "llava")
def llava_siglip():
    return llava(SIGLIP, **WHOLE)


def tiled(model: nn.Module, pinpoints: list[list[int]], side: int) -> MakeInputs:
    """Pictures of four shapes: different tilings and un-padding. Lengths are what the bare model packs."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    shapes = [(60, 64), (32, 60), (62, 30), (40, 64)]  # (height, width)

    def size(i: int) -> tuple[int, int]:
        return shapes[i % len(shapes)]

    def draw(numbers: Grouped, seed: int) -> Inputs:
        pictures = [i for row in numbers for i in row]
        tiles = [image_size_to_num_patches(size(i), pinpoints, side) for i in pictures]
        pixels = torch.zeros(len(pictures), max(tiles), 3, side, side)
        for row, (i, count) in enumerate(zip(pictures, tiles)):
            pixels[row, :count] = noise((count, 3, side, side), seed, i)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([size(i) for i in pictures])}

    @torch.no_grad()
    def length(i: int) -> int:
        bare = type(model.model).get_image_features(model.model, **draw([[i]], 0), return_dict=True)
        return len(bare.pooler_output[0])

    lengths = {i: length(i) for i in range(len(shapes))}
    return maker(draw, lambda i: lengths[i % len(shapes)])


def llava_next(tower: dict, **config) -> tuple[nn.Module, MakeInputs]:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    side = tower["image_size"]
    pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=dict(tower),
            text_config=dict(LLAMA),
            image_token_index=IMAGE,
            image_grid_pinpoints=pinpoints,
            **config,
        )
    )
    return randomise(model), tiled(model, pinpoints, side)


@host("llava_next-clip", "llava_next")
def llava_next_clip():
    return llava_next(CLIP)


@host("llava_next-siglip", "llava_next")
def llava_next_siglip():
    return llava_next(SIGLIP, **WHOLE)
