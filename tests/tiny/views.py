"""Families with a whole view of each picture and, behind or in front of it, views of its parts."""

from __future__ import annotations

import torch
from torch import nn

from . import host
from .parts import IMAGE, LLAMA, Grouped, Inputs, maker, noise, randomise

PARTS = [(2, 1), (1, 2), (0, 0), (2, 2)]  # (columns, rows) of the views of parts of each picture


def views(whole: int, part: int, grid: bool):
    """whole, part: side of the two kinds of views in pixels; grid: the model is told columns and rows."""

    def draw(numbers: Grouped, seed: int) -> Inputs:
        pictures = [i for row in numbers for i in row]
        grids = [PARTS[i % len(PARTS)] for i in pictures]
        counts = [columns * rows for columns, rows in grids]
        parts = [noise((n, 3, part, part), 500 + seed, i) for i, n in zip(pictures, counts) if n]
        inputs = {
            "pixel_values": torch.stack([noise((3, whole, whole), seed, i) for i in pictures]),
            "num_local_patches": counts,
        }
        if parts:
            inputs["pixel_values_local"] = torch.cat(parts)
        if grid:
            inputs["patches_grid"] = [list(shape) for shape in grids]
        return inputs

    return draw


def parts_of(i: int) -> tuple[int, int]:
    return PARTS[i % len(PARTS)]


@host("step3p7", blurred=True)
def step3p7():
    from transformers import Step3p7Config, Step3p7ForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "mlp_ratio": 1.5,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 4,
    }
    text = {
        **{k: v for k, v in LLAMA.items() if k != "model_type"},
        "num_hidden_layers": 4,
        "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 8,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "share_expert_dim": 16,
    }
    config = Step3p7Config(vision_config=vision, text_config=text, image_token_id=IMAGE)

    def length(i: int) -> int:
        columns, rows = parts_of(i)
        return 9 * columns * rows + 16

    return randomise(Step3p7ForConditionalGeneration(config)), maker(views(64, 48, grid=False), length)


SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 8,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "downsample_channels": [16, 32],
}
EXPERTS = {
    **{k: v for k, v in LLAMA.items() if k != "model_type"},
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}


@host("deepseek_ocr2")
def deepseek_ocr2():
    from transformers import DeepseekOcr2Config, DeepseekOcr2ForConditionalGeneration

    encoder = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = DeepseekOcr2ForConditionalGeneration(
        DeepseekOcr2Config(
            vision_config={"sam_config": SAM, "encoder_config": encoder},
            text_config=EXPERTS,
            image_token_id=IMAGE,
        )
    )
    model.model.vision_tower.query_768_resolution = nn.Embedding(16, 32)  # 144 are built in

    def length(i: int) -> int:
        columns, rows = parts_of(i)
        return 16 * columns * rows + 16 + 1

    return randomise(model), maker(views(64, 64, grid=False), length)


@host("unlimited_ocr", lacks=("chats",))  # a second turn lets go of the first answer
def unlimited_ocr():
    from transformers import UnlimitedOcrConfig, UnlimitedOcrForConditionalGeneration

    encoder = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    config = UnlimitedOcrConfig(
        vision_config={"sam_config": SAM, "encoder_config": encoder},
        text_config={**EXPERTS, "sliding_window": 8},
        image_token_id=IMAGE,
    )

    def length(i: int) -> int:
        columns, rows = parts_of(i)
        return 3 * rows * (3 * columns + 1) + 4 * (4 + 1) + 1

    return randomise(UnlimitedOcrForConditionalGeneration(config)), maker(views(64, 48, grid=True), length)
