"""The untrained pair: tokenizers, processors and models of tiny-llava and tiny-clip."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtc.evaluation.questions import KINDS, NUMBERS
from vtc.evaluation.scenes import COLOURS, DIGITS, PATCH, SHAPES, SIDE, SIZES

# </s> is not 2: CLIP takes that for a checkpoint of the old days and looks for the largest id instead
SPECIAL = ("<pad>", "<unk>", "<image>", "<s>", "</s>")
WIDTH, HEADS, PLACES = 128, 4, ("top", "bottom", "left", "right", "above", "below")
PHRASES = (
    "user : assistant ? , . ! what colour is the shape object how many objects are there a in which corner "
    "where relative to digit written describe this picture photo of an and nothing yes no large small scene "
    "with"
)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '</s>' if message['role'] == 'assistant' else '' }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> dict[str, int]:
    words = (*SPECIAL, *PHRASES.split(), *COLOURS, *SHAPES, *SIZES, *DIGITS, *NUMBERS, *PLACES, *KINDS)
    return {word: i for i, word in enumerate(dict.fromkeys(words))}


def tokenizer(end: bool = False) -> PreTrainedTokenizerFast:
    """Whole lower-case words and single punctuation marks after <s>, and before </s> if `end` is set."""
    vocab = vocabulary()
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A", special_tokens=[(t, vocab[t]) for t in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"], padding_side="right" if end else "left",
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
        model_max_length=40 if end else 1024,
    )  # fmt: skip


def processor_pair() -> tuple[LlavaProcessor, CLIPProcessor]:
    def images() -> CLIPImageProcessor:
        return CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True,
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        )  # fmt: skip

    llava = LlavaProcessor(
        images(), tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    return llava, CLIPProcessor(images(), tokenizer(end=True))


def model_pair(seed: int) -> tuple[LlavaForConditionalGeneration, CLIPModel]:
    """Both models with their vision towers being one and the same module."""
    vocab = vocabulary()
    ends = {"pad_token_id": vocab["<pad>"], "bos_token_id": vocab["<s>"], "eos_token_id": vocab["</s>"]}
    wide = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": HEADS}
    vision = {
        **wide, "model_type": "clip_vision_model", "num_hidden_layers": 6, "image_size": SIDE,
        "patch_size": PATCH, "hidden_act": "gelu", "projection_dim": WIDTH,
    }  # fmt: skip
    text = {
        **wide, "num_hidden_layers": 3, "vocab_size": len(vocab), "max_position_embeddings": 40,
        "hidden_act": "gelu", "projection_dim": WIDTH, **ends,
    }  # fmt: skip
    # the usual range of 0.02 is made for widths of thousands; at 128 it keeps the loss on a plateau
    decoder = {
        **wide, "model_type": "llama", "num_hidden_layers": 4, "vocab_size": len(vocab),
        "max_position_embeddings": 1024, "initializer_range": 0.09, "tie_word_embeddings": True, **ends,
    }  # fmt: skip
    torch.manual_seed(seed)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=decoder, image_token_index=vocab["<image>"],
            image_seq_length=144, vision_feature_layer=-2, vision_feature_select_strategy="default",
            tie_word_embeddings=True, **ends,
        )
    )  # fmt: skip
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=WIDTH))
    return llava, clip


def share(llava: LlavaForConditionalGeneration, clip: CLIPModel) -> None:
    """Puts clip's vision tower into llava."""
    tower = llava.model.vision_tower
    inner = tower if not hasattr(tower, "vision_model") else tower.vision_model
    if inner is tower:
        llava.model.vision_tower = clip.vision_model
    else:
        tower.vision_model = clip.vision_model


def save(
    llava: LlavaForConditionalGeneration, clip: CLIPModel, llava_folder: Path, clip_folder: Path
) -> None:
    """Weights, configs, tokenizers and processors of both."""
    for model, processor, folder in zip(
        (llava, clip), processor_pair(), (llava_folder, clip_folder), strict=True
    ):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
