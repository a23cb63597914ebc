"""Real processors of other families, made small, each with a tiny random model, saved as checkpoints are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small import REFERENCE
from tiny.gemma import GEMMA3
from tiny.packed import DECODER, DEEPSTACK, PAIRED, QWEN3_DECODER
from tiny.parts import LLAMA, SIGLIP, randomise

PATCH = 8
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] if part['type'] == 'image' %}IMAGE "
    "{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
SIDES = {"height": 64, "width": 64}
PLAIN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

# What tells an encoder where a patch is, and what brings other patches into it.
MIXING = ("position", "pos_embed", "out_proj", "o_proj", "attn.proj", "projection_layer")

Made = tuple[Any, Any]  # processor, config
FAMILIES: dict[str, Callable[[], Made]] = {}


def family(make: Callable[[], Made]) -> Callable[[], Made]:
    FAMILIES[make.__name__] = make
    return make


def save(name: str, folder: Path) -> Path:
    """A checkpoint of the family. Its encoder sees each patch alone: no positions, no attention."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    torch.manual_seed(0)
    processor, config = FAMILIES[name]()
    model = randomise(AutoModelForImageTextToText.from_config(config))
    for path, parameter in model.model.named_parameters():
        if path.startswith("vis") and any(part in path for part in MIXING):
            torch.nn.init.zeros_(parameter)
    words = len(AutoTokenizer.from_pretrained(REFERENCE))
    model.generation_config.suppress_tokens = [*range(5), *range(words, len(processor.tokenizer))]
    model.generation_config.eos_token_id = list(range(words))  # answers of one word
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tokenizer(image: str, **named: str):
    """The reference model's words and further special tokens, those with a name as attributes."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(REFERENCE, extra_special_tokens={"image_token": image, **named})


def chat(image: str) -> str:
    return CHAT.replace("IMAGE", image)


def text(words, model_type: str = "llama", **others) -> dict:
    own = {"model_type": model_type, "vocab_size": len(words), "bos_token_id": 3, "eos_token_id": 4}
    return {**LLAMA, **others, **own}


def qwen(processor: str, model_type: str, vision: dict, decoder: dict) -> Made:
    import transformers

    names = {"video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>"}
    names["vision_end_token"] = "<|vision_end|>"
    words = tokenizer("<|image_pad|>", **names)
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 48 * 48, "longest_edge": 128 * 128}
    films = "Qwen3VLVideoProcessor" if model_type == "qwen3_vl" else "Qwen2VLVideoProcessor"
    made = getattr(transformers, processor)(
        transformers.Qwen2VLImageProcessor(**patches, size=size, **PLAIN),
        words,
        getattr(transformers, films)(**patches, size=size),
        chat_template=chat("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    ids = {f"{name}_id": words.convert_tokens_to_ids(token) for name, token in names.items()}
    config = transformers.AutoConfig.for_model(
        model_type,
        vision_config={**vision, "patch_size": PATCH},
        text_config={**decoder, "vocab_size": len(words), "bos_token_id": 3, "eos_token_id": 4},
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        **ids,
    )
    return made, config


@family
def qwen2_5_vl() -> Made:
    tower = {**PAIRED, "window_size": 32, "fullatt_block_indexes": [2]}
    return qwen("Qwen2_5_VLProcessor", "qwen2_5_vl", tower, DECODER)


@family
def qwen3_vl() -> Made:
    return qwen("Qwen3VLProcessor", "qwen3_vl", DEEPSTACK, QWEN3_DECODER)


@family
def gemma3() -> Made:
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor

    words = tokenizer("<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    images = Gemma3ImageProcessor(size=SIDES, **PLAIN)
    made = Gemma3Processor(images, words, chat("<start_of_image>"), image_seq_length=16)
    decoder = text(words, **GEMMA3)
    config = Gemma3Config(
        vision_config={**SIGLIP, "image_size": 64},
        text_config=decoder,
        image_token_index=words.image_token_id,
        mm_tokens_per_image=16,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    return made, config


@family
def paligemma() -> Made:
    from transformers import PaliGemmaConfig, PaliGemmaProcessor, SiglipImageProcessor

    words = tokenizer("<image>")
    images = SiglipImageProcessor(size=SIDES, **PLAIN)
    images.image_seq_length = 64
    made = PaliGemmaProcessor(images, words, chat_template=chat("<image>"))
    config = PaliGemmaConfig(
        vision_config={**SIGLIP, "image_size": 64},
        text_config=text(words, "gemma", head_dim=8),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        vocab_size=len(words),
    )
    return made, config


@family
def internvl() -> Made:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    words = tokenizer(
        "<IMG_CONTEXT>",
        context_image_token="<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
    )
    images = GotOcr2ImageProcessor(size=SIDES, max_patches=6, **PLAIN)
    made = InternVLProcessor(images, words, InternVLVideoProcessor(size=SIDES), 16, chat("<IMG_CONTEXT>"))
    tower = {**SIGLIP, "model_type": "internvl_vision", "image_size": [64, 64], "patch_size": [8, 8]}
    config = InternVLConfig(
        vision_config=tower,
        text_config=text(words, "qwen2"),
        image_token_id=words.context_image_token_id,
        image_seq_length=16,
    )
    return made, config


@family
def idefics3() -> Made:
    from transformers import Idefics3Config, Idefics3ImageProcessor, Idefics3Processor

    places = {f"row_{i}_{j}": f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)}
    words = tokenizer("<image>", fake="<fake_token_around_image>", whole="<global-img>", **places)
    images = Idefics3ImageProcessor(size={"longest_edge": 192}, max_image_size={"longest_edge": 64}, **PLAIN)
    made = Idefics3Processor(images, words, image_seq_len=16, chat_template=chat("<image>"))
    config = Idefics3Config(
        vision_config={**SIGLIP, "model_type": "idefics3_vision", "image_size": 64},
        text_config=text(words),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return made, config


@family
def llava_next() -> Made:
    from transformers import LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor

    words = tokenizer("<image>")
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=PINPOINTS,
        **PLAIN,
    )
    made = LlavaNextProcessor(images, words, PATCH, "full", chat("<image>"))
    config = LlavaNextConfig(
        vision_config=dict(SIGLIP),
        text_config=text(words),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return made, config


PINPOINTS = [[32, 64], [64, 32], [64, 64]]


@family
def llava_onevision() -> Made:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    words = tokenizer("<image>", video_token="<video>")
    side = {"height": 32, "width": 32}
    images = LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=PINPOINTS, **PLAIN)
    films = LlavaOnevisionVideoProcessor(size=side)
    made = LlavaOnevisionProcessor(images, words, films, 16, "full", chat("<image>"))
    config = LlavaOnevisionConfig(
        vision_config=dict(SIGLIP),
        text_config=text(words, "qwen2"),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    return made, config


@family
def mistral3() -> Made:
    from tiny.pixtral import PIXTRAL
    from transformers import Mistral3Config, PixtralImageProcessor, PixtralProcessor

    words = tokenizer("[IMG]", row="[IMG_BREAK]", end="[IMG_END]")
    images = PixtralImageProcessor(
        patch_size={"height": PATCH, "width": PATCH}, size={"longest_edge": 96}, **PLAIN
    )
    made = PixtralProcessor(images, words, PATCH, 2, chat("[IMG]"))
    config = Mistral3Config(
        vision_config={**PIXTRAL, "image_size": 96},
        text_config=text(words, "mistral", head_dim=8),
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
    )
    return made, config
