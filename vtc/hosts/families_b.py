"""Families whose towers see all patches of a call as one row."""

from __future__ import annotations

from .host import Host
from .packed import packed_layout, packed_newline_layout, packed_raster_layout


def _packed(name: str, *model_types: str, tower: str = "visual", projector: str = "", **facts: str) -> Host:
    """Images and videos alike; the tower itself makes tokens of patches where no projector is named."""
    types = model_types or (name,)
    return Host(name, types, packed_layout, packed_layout, tower=tower, projector=projector, **facts)


FAMILIES = (
    _packed("qwen2_vl"),
    _packed("qwen2_5_vl"),
    _packed("qwen2_5_omni", "qwen2_5_omni_thinker"),
    _packed("qwen3_vl", deep="deepstack_features"),
    _packed("qwen3_vl_moe", deep="deepstack_features"),
    _packed("qwen3_omni_moe", "qwen3_omni_moe_thinker", deep="deepstack_features"),
    _packed("qwen3_5"),
    _packed("qwen3_5_moe"),
    _packed("qwen4_exp"),
    _packed("cosmos3_omni", deep="deepstack_features"),
    _packed("cosmos3_edge", projector="projector"),
    _packed("glm4v"),
    _packed("glm4v_moe"),
    _packed("glm46v", "glm46v", "glmga"),
    _packed("glm_ocr"),
    _packed("glm5_next"),
    _packed("ernie4_5_vl_moe", tower="vision_tower", projector="resampler_model"),
    _packed("video_llama_3", tower="vision_model", projector="projector"),
    Host("paddleocr_vl", ("paddleocr_vl",), packed_raster_layout, tower="visual", projector="projector"),
    Host("kimi_k25", ("kimi_k25",), packed_raster_layout, packed_raster_layout, projector="mm_projector"),
    Host("hunyuan_vl", ("hunyuan_vl",), packed_newline_layout, projector=""),
)

_TALKER = (
    "its talker reads the thinker's states of every token of the prompt; call compress(model.thinker, ...) "
    "and generate(return_audio=False)"
)
REFUSED = {"qwen2_5_omni": _TALKER, "qwen3_omni_moe": _TALKER}
