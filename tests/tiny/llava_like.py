"""Families of LLaVA's build: a square tower, a small projector, one token for every patch.

LLaVA over Pixtral is here too: its pictures are of different sizes and its tower takes them as one row."""

from __future__ import annotations

import torch
from torch import nn

from . import host
from .parts import (
    CLIP,
    IMAGE,
    LLAMA,
    SIGLIP,
    VIDEO,
    Grouped,
    Inputs,
    MakeInputs,
    maker,
    noise,
    randomise,
    squares,
)

SIDE = 32
FRAMES = 2
CHUNKED = ("chunked",)  # generate() cannot cut what timm's towers return


def flat(numbers: Grouped) -> list[int]:
    return [i for row in numbers for i in row]


def films(shape, name: str = "pixel_values_videos", frames: int = FRAMES):
    """Films of one shape, stacked: (films, frames, *shape). Their numbers are not those of any picture."""

    def film(numbers: Grouped, seed: int) -> Inputs:
        return {name: torch.stack([noise((frames, *shape), seed, 500 + i) for i in flat(numbers)])}

    return film


@host("llava-pixtral", "llava")
def llava_pixtral():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tower = {**CLIP, "model_type": "pixtral", "image_size": 64, "head_dim": 8}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower,
            text_config={**LLAMA, "model_type": "mistral", "sliding_window": None, "head_dim": 8},
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )
    sizes = [(32, 32), (16, 40), (40, 24)]  # (height, width)

    def draw(numbers: Grouped, seed: int) -> Inputs:
        pictures = flat(numbers)
        pixels = torch.zeros(len(pictures), 3, 40, 40)  # the processor pads to the largest picture
        for row, i in enumerate(pictures):
            height, width = sizes[i % len(sizes)]
            pixels[row, :, :height, :width] = noise((3, height, width), seed, i)
        return {
            "pixel_values": pixels,
            "image_sizes": torch.tensor([sizes[i % len(sizes)] for i in pictures]),
        }

    def length(i: int) -> int:
        height, width = sizes[i % len(sizes)]
        return height // 8 * (width // 8)

    return randomise(model), maker(draw, length, after=(97,))


@host("vipllava")
def vipllava():
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    model = VipLlavaForConditionalGeneration(
        VipLlavaConfig(
            vision_config=dict(CLIP),
            text_config=dict(LLAMA),
            image_token_index=IMAGE,
            vision_feature_layer=[-1, -2, 1],
        )
    )
    return randomise(model), maker(squares((3, SIDE, SIDE)), lambda i: 16)


@host("video_llava", video=True)
def video_llava():
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    model = VideoLlavaForConditionalGeneration(
        VideoLlavaConfig(
            vision_config=dict(CLIP),
            text_config=dict(LLAMA),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
        )
    )
    return randomise(model), maker(
        squares((3, SIDE, SIDE)),
        lambda i: 16,
        film=films((3, SIDE, SIDE)),
        video_length=lambda i: FRAMES * 17,  # the CLS token of each frame is a token of the prompt
    )


@host("deepseek_vl")
def deepseek_vl():
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

    model = DeepseekVLForConditionalGeneration(
        DeepseekVLConfig(vision_config=dict(SIGLIP), text_config=dict(LLAMA), image_token_id=IMAGE)
    )
    return randomise(model), maker(squares((3, SIDE, SIDE)), lambda i: 16)


@host("deepseek_vl_hybrid")
def deepseek_vl_hybrid():
    from transformers import DeepseekVLHybridConfig, DeepseekVLHybridForConditionalGeneration

    sharp = {
        "hidden_size": 32,
        "output_channels": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1, 2],
        "mlp_dim": 48,
    }
    model = DeepseekVLHybridForConditionalGeneration(
        DeepseekVLHybridConfig(
            vision_config=dict(SIGLIP),
            high_res_vision_config=sharp,
            text_config=dict(LLAMA),
            image_token_id=IMAGE,
        )
    )
    nn.init.constant_(model.model.high_res_vision_alpha, 0.5)  # 0 would switch a branch off
    low, high = squares((3, SIDE, SIDE)), squares((3, 64, 64), "high_res_pixel_values")
    return randomise(model), maker(lambda *args: {**low(*args), **high(*args)}, lambda i: 16)


@host("janus")
def janus():
    from transformers import JanusConfig, JanusForConditionalGeneration

    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
        "projection_dim": 32,
        "num_image_tokens": 16,
        "mlp_ratio": 2.0,
    }
    painter = {  # makes pictures, which nobody asks for here
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
        "num_patches": 16,
    }
    model = JanusForConditionalGeneration(
        JanusConfig(vision_config=tower, text_config=dict(LLAMA), vq_config=painter, image_token_id=IMAGE)
    )
    return randomise(model), maker(squares((3, SIDE, SIDE)), lambda i: 16, before=(97,), after=(96,))


@host("perception_lm", video=True, lacks=CHUNKED)
def perception_lm():
    return perception(cls=True)


@host("perception_lm-nocls", "perception_lm", video=True, lacks=CHUNKED)
def perception_lm_nocls():
    return perception(cls=False)


def perception(cls: bool) -> tuple[nn.Module, MakeInputs]:
    """A picture is two tiles, a film two frames; four patches are averaged to one token."""
    from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration

    tower = {
        "architecture": "vit_pe_core_tiny_patch16_384",
        "model_args": {
            "embed_dim": 32,
            "img_size": (64, 64),
            "patch_size": (8, 8),
            "depth": 3,
            "num_heads": 4,
            "global_pool": "",
            "use_post_transformer_norm": False,
            "init_values": 0.1,
            "ref_feat_shape": (8, 8),
            "mlp_ratio": 2.0,
            "class_token": cls,
        },
    }
    model = PerceptionLMForConditionalGeneration(
        PerceptionLMConfig(
            vision_config=tower,
            text_config=dict(LLAMA),
            vision_use_cls_token=cls,
            projector_pooling_ratio=2,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
    )
    return randomise(model), maker(
        squares((2, 3, 64, 64)), lambda i: 32, film=films((3, 64, 64)), video_length=lambda i: FRAMES * 16
    )


@host("fast_vlm", lacks=CHUNKED)
def fast_vlm():
    """A convolutional tower: 4 x 4 tokens out of 256 x 256 pixels."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    tower = {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "do_pooling": True,
        "hidden_size": 64,  # of the last convolution, twice the last stage's
        "model_args": {
            "inference_mode": True,
            "layers": (1, 1, 1, 1, 1),
            "embed_dims": (8, 8, 16, 32, 32),
            "mlp_ratios": (2, 2, 2, 2, 2),
            "layer_scale_init_value": 0.5,
        },
    }
    model = FastVlmForConditionalGeneration(
        FastVlmConfig(
            vision_config=tower, text_config={**LLAMA, "model_type": "qwen2"}, image_token_index=IMAGE
        )
    )
    randomise(model)
    for parameter in model.model.vision_tower.parameters():
        if parameter.ndim == 4:  # few channels to each output: with the usual weights little comes through
            nn.init.kaiming_normal_(parameter)
    return model, maker(squares((3, 256, 256)), lambda i: 16)
