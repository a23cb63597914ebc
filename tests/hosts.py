"""Tiny random hosts built from configs: `build(name) -> (model, make_inputs)`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

IMAGE, PAD, VOCAB = 99, 0, 120
TEXT = range(3, 90)
SUPPRESS = list(range(90, 100))  # random weights would otherwise generate image tokens

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}

Inputs = dict[str, torch.Tensor]
MakeInputs = Callable[..., Inputs]


def llava(tower: dict, **config) -> tuple[nn.Module, MakeInputs]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=dict(tower), text_config=dict(LLAMA), image_token_index=IMAGE, **config)
    )
    tokens = (tower["image_size"] // tower["patch_size"]) ** 2 + (
        config.get("vision_feature_select_strategy") == "full" and tower is CLIP
    )

    def make_inputs(images=(1, 1), seed=0, pads=0, side="left") -> Inputs:
        """images: how many each prompt holds; pads: columns of padding for the longest prompt."""
        generator = torch.Generator().manual_seed(seed)
        inputs = _prompts([[tokens] * count for count in images], generator, pads, side)
        if sum(images):
            shape = (sum(images), 3, tower["image_size"], tower["image_size"])
            inputs["pixel_values"] = torch.randn(shape, generator=generator)
        return inputs

    return _randomise(model), make_inputs


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
    shapes = [(60, 64), (32, 60), (62, 30), (40, 64)]  # (height, width): different tilings and un-padding

    def make_inputs(images=(1, 1), seed=0, pads=0, side="left") -> Inputs:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        generator = torch.Generator().manual_seed(seed)
        sizes = [shapes[i % len(shapes)] for i in range(sum(images))]
        tiles = [image_size_to_num_patches(size, pinpoints, tower["image_size"]) for size in sizes]
        pixels = torch.zeros(len(sizes), max(tiles, default=1), 3, tower["image_size"], tower["image_size"])
        for image, count in enumerate(tiles):
            pixels[image, :count] = torch.randn(pixels[image, :count].shape, generator=generator)
        lengths = iter([])
        if sizes:
            with torch.no_grad():
                bare = type(model.model).get_image_features(
                    model.model, pixels, torch.tensor(sizes), return_dict=True
                )
            lengths = iter([len(feature) for feature in bare.pooler_output])
        inputs = _prompts([[next(lengths) for _ in range(count)] for count in images], generator, pads, side)
        if sizes:
            inputs.update(pixel_values=pixels, image_sizes=torch.tensor(sizes))
        return inputs

    return _randomise(model), make_inputs


HOSTS = {
    "llava-clip": lambda: llava(CLIP),
    "llava-clip-full": lambda: llava(CLIP, vision_feature_select_strategy="full"),  # CLS is a token, too
    "llava-siglip": lambda: llava(SIGLIP, vision_feature_layer=-1, vision_feature_select_strategy="full"),
    "llava_next-clip": lambda: llava_next(CLIP),
    "llava_next-siglip": lambda: llava_next(
        SIGLIP, vision_feature_layer=-1, vision_feature_select_strategy="full"
    ),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, MakeInputs]:
    torch.manual_seed(seed)
    return HOSTS[name]()


def _randomise(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim >= 2:  # the usual 0.02 makes all tokens of a tiny model look alike
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def _prompts(images: list[list[int]], generator: torch.Generator, pads: int, side: str) -> Inputs:
    """images: for each prompt the token counts of its images."""

    def words(count):
        return torch.randint(TEXT.start, TEXT.stop, (count,), generator=generator).tolist()

    prompts = []
    for counts in images:
        prompt = [1]
        for n in counts:
            prompt += words(2) + [IMAGE] * n
        prompts.append(prompt + words(4))
    length = max(map(len, prompts)) + pads
    ids = torch.full((len(prompts), length), PAD)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}
