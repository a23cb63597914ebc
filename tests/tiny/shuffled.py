"""Families whose projector or tower puts a square of patches into one token."""

from __future__ import annotations

from torch import nn

from . import host
from .parts import IMAGE, LLAMA, SIGLIP, VOCAB, MakeInputs, maker, randomise, squares

SIDE = 64  # 8 x 8 patches, 4 x 4 tokens
QWEN2 = {**LLAMA, "model_type": "qwen2"}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 8}
COHERE2 = {  # one layer in two sees the last 12 tokens only
    **LLAMA,
    "model_type": "cohere2",
    "num_hidden_layers": 4,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
INTERN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": [SIDE, SIDE],
    "patch_size": [8, 8],
}
SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 256,
    "patch_size": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
}


def shuffled(model: nn.Module, side: int = SIDE, **inputs) -> tuple[nn.Module, MakeInputs]:
    return randomise(model), maker(squares((3, side, side)), lambda i: 16, **inputs)


@host("internvl")
def internvl():
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        vision_config={**INTERN, "model_type": "internvl_vision"},
        text_config=dict(QWEN2),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    return shuffled(InternVLForConditionalGeneration(config), before=(97,), after=(96,))


@host("qianfan_ocr")
def qianfan_ocr():
    from transformers import QianfanOCRConfig, QianfanOCRForConditionalGeneration

    config = QianfanOCRConfig(vision_config=dict(INTERN), text_config=dict(QWEN3), image_token_id=IMAGE)
    return shuffled(QianfanOCRForConditionalGeneration(config), before=(97,), after=(96,))


@host("aya_vision")
def aya_vision():
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    config = AyaVisionConfig(
        vision_config={**SIGLIP, "image_size": SIDE}, text_config=dict(COHERE2), image_token_index=IMAGE
    )
    return shuffled(AyaVisionForConditionalGeneration(config), before=(97,), after=(96,))


@host("cohere2_vision")
def cohere2_vision():
    from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

    config = Cohere2VisionConfig(
        vision_config={**SIGLIP, "image_size": SIDE},
        text_config=dict(COHERE2),
        image_token_id=IMAGE,
        alignment_intermediate_size=32,
    )
    return shuffled(Cohere2VisionForConditionalGeneration(config), before=(97,), after=(96,))


@host("got_ocr2", blurred=True)
def got_ocr2():
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration

    config = GotOcr2Config(vision_config=dict(SAM), text_config=dict(QWEN2), image_token_index=IMAGE)
    return shuffled(GotOcr2ForConditionalGeneration(config), side=256, before=(97,), after=(96,))


@host("pp_chart2table", "got_ocr2", blurred=True)
def pp_chart2table():
    from transformers import GotOcr2ForConditionalGeneration, PPChart2TableConfig

    config = PPChart2TableConfig(vision_config=dict(SAM), text_config=dict(QWEN2), image_token_index=IMAGE)
    return shuffled(GotOcr2ForConditionalGeneration(config), side=256, before=(97,), after=(96,))


@host("ovis2", lacks=("chunked",))  # its indicators get lost in cut features
def ovis2():
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
        "vocab_size": 40,
        "hidden_stride": 2,
        "num_visual_indicator_tokens": 5,
    }
    config = Ovis2Config(
        vision_config=tower,
        text_config=dict(QWEN2),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[91, 92, 93, 94, 95],
        vocab_size=VOCAB,
        hidden_size=32,
    )
    return shuffled(Ovis2ForConditionalGeneration(config), before=(91,), after=(92,))
