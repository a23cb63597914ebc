"""The families. A new one is an entry here and, where its geometry is new, a layout function."""

from __future__ import annotations

from .codes import codes_layout
from .frames import frames_layout, frames_newline_layout, tiles_layout
from .host import Host
from .latents import latents_layout
from .llava_next import llava_next_layout, llava_onevision_layout
from .memory import memory_layout
from .minicpm import minicpm_layout, minicpm_video_layout
from .packed import packed_layout, packed_newline_layout, packed_raster_layout, packed_tokens_layout
from .padded import padded_layout
from .placed import placed_layout, placed_video_layout
from .pooled import pooled_layout, pooled_video_layout
from .prompts import prompts_layout
from .raster import map_layout, raster_layout
from .views import views_layout, views_map_layout, views_queries_layout

# Where a family does not say otherwise its tower is `vision_tower`, its projector `multi_modal_projector`.
_ALIGNED = {"tower": "vision_model", "projector": "aligner"}
_CONNECTED = {"tower": "vision_model", "projector": "connector"}
_QWEN = {"tower": "visual", "projector": ""}  # the tower itself makes tokens of patches
_DEEP = {"deep": "deepstack_features"}
_MUSE = {"projector": "perception_emb_norm"}

HOSTS = (
    # One rectangle of tokens per image, a token for one patch or for a square of them
    Host("llava", raster_layout, resizable=True),
    Host("vipllava", raster_layout, resizable=True),
    Host("video_llava", raster_layout, frames_layout, tower="image_tower", video_tower="video_tower"),
    Host("internvl", raster_layout),
    Host("qianfan_ocr", raster_layout),
    Host("aya_vision", raster_layout),
    Host("cohere2_vision", raster_layout),
    Host("got_ocr2", raster_layout, model_types=("got_ocr2", "pp_chart2table")),
    Host("ovis2", raster_layout, projector=""),
    Host("deepseek_vl", raster_layout, **_ALIGNED, resizable=True),
    Host("deepseek_vl_hybrid", raster_layout, **_ALIGNED),
    Host("janus", raster_layout, **_ALIGNED),
    Host("paligemma", raster_layout, resizable=True),
    Host("gemma3", raster_layout),
    Host("shieldgemma2", raster_layout, base="model"),
    Host("t5gemma2", raster_layout, base="encoder", reader="decoder"),
    Host("mistral3", raster_layout),
    Host("mistral_large4", raster_layout),
    Host("lighton_ocr", raster_layout, tower="vision_encoder", projector="vision_projection"),
    Host(
        "llama4",
        raster_layout,
        tower="vision_model",
        features="last_hidden_state",
        cls_last=True,
        late=True,
    ),
    Host("fast_vlm", map_layout),
    Host("gemma3n", map_layout, projector="embed_vision"),
    Host("emu3", codes_layout, tower="vqmodel", projector=""),
    Host("aria", latents_layout, latent=True),
    # Several tiles or views per image
    Host("llava_next", llava_next_layout, tiled=True, resizable=True),
    Host("llava_next_video", llava_next_layout, frames_layout, tiled=True),
    Host("llava_onevision", llava_onevision_layout, frames_newline_layout, tiled=True),
    Host(
        "granite4_vision",
        llava_next_layout,
        projector="layerwise_projectors",
        features="deepstack_features",
        tiled=True,
    ),
    Host("perception_lm", tiles_layout, tiled=True),
    Host("step3p7", views_layout, tower="vision_model", tiled=True),
    Host("unlimited_ocr", views_map_layout, tower="vision_tower.vision_encoder", tiled=True),
    Host(
        "deepseek_ocr2",
        views_queries_layout,
        tower="vision_tower.vision_encoder",
        tiled=True,
        latent=True,
    ),
    Host("mllama", memory_layout, tower="vision_model", tiled=True, memory=True),
    # All patches of a call in one row, as many per image as it is large
    Host("qwen2_vl", packed_layout, packed_layout, **_QWEN),
    Host("qwen2_5_vl", packed_layout, packed_layout, **_QWEN),
    Host("qwen2_5_omni", packed_layout, packed_layout, ("qwen2_5_omni_thinker",), **_QWEN),
    Host("qwen3_vl", packed_layout, packed_layout, **_QWEN, **_DEEP),
    Host("qwen3_vl_moe", packed_layout, packed_layout, **_QWEN, **_DEEP),
    Host("qwen3_omni_moe", packed_layout, packed_layout, ("qwen3_omni_moe_thinker",), **_QWEN, **_DEEP),
    Host("qwen3_5", packed_layout, packed_layout, **_QWEN),
    Host("qwen3_5_moe", packed_layout, packed_layout, **_QWEN),
    Host("qwen4_exp", packed_layout, packed_layout, **_QWEN),
    Host("cosmos3_omni", packed_layout, packed_layout, **_QWEN, **_DEEP),
    Host("cosmos3_edge", packed_layout, packed_layout, tower="visual", projector="projector"),
    Host("cohere_compass", packed_layout, packed_layout, **_QWEN, **_DEEP),
    Host("exaone4_5", packed_layout, packed_layout, **_QWEN),
    Host("glm4v", packed_layout, packed_layout, **_QWEN),
    Host("glm4v_moe", packed_layout, packed_layout, **_QWEN),
    Host("glm46v", packed_layout, packed_layout, ("glm46v", "glmga"), **_QWEN),
    Host("glm_ocr", packed_layout, packed_layout, **_QWEN),
    Host("glm5_next", packed_layout, packed_layout, **_QWEN),
    Host("ernie4_5_vl_moe", packed_layout, packed_layout, projector="resampler_model"),
    Host("video_llama_3", packed_layout, packed_layout, tower="vision_model", projector="projector"),
    Host("hyperclovax_vision_v2", packed_layout, packed_layout, tower="vision_model", projector="projector"),
    Host("dots3_note", packed_layout, packed_layout, projector="vision_tower.merger"),
    Host("lfm3_vl", packed_layout, packed_layout),
    Host("minimax_m3_vl", packed_layout, packed_layout, slots=True),
    Host("paddleocr_vl", packed_raster_layout, tower="visual", projector="projector"),
    Host("kimi_k25", packed_raster_layout, packed_raster_layout, projector="mm_projector"),
    Host("muse_glimmer", packed_raster_layout, packed_raster_layout, **_MUSE),
    Host("muse_spark", packed_raster_layout, packed_raster_layout, **_MUSE),
    Host("nemotron_h_omni", packed_raster_layout, tower="vision_model"),
    Host("inkling2", packed_tokens_layout, projector="vision_tower.merger"),
    Host("hunyuan_vl", packed_newline_layout, tower="vision_tower", projector=""),
    # A padded row of patches per image
    Host("lfm2_vl", padded_layout),
    Host("gemma4", placed_layout, placed_video_layout, projector="embed_vision"),
    Host(
        "gemma4_unified",
        placed_layout,
        placed_video_layout,
        tower="embed_vision",
        projector="embed_vision.multimodal_embedder",
        blocks_everywhere=True,
    ),
    Host("diffusion_gemma", placed_layout, projector="embed_vision", base="encoder", reader="decoder"),
    Host("molmo2", pooled_layout, pooled_video_layout),
    Host("minicpmv4_6", minicpm_layout, minicpm_video_layout, projector="merger"),
    Host("minicpmv4_7", minicpm_layout, minicpm_video_layout, projector="merger"),
    Host("minicpm_ocr", minicpm_layout, minicpm_video_layout, projector="merger"),
    # The images of a prompt in one row of pixels
    Host("idefics2", prompts_layout, **_CONNECTED, latent=True),
    Host("idefics3", prompts_layout, **_CONNECTED),
    Host("smolvlm", prompts_layout, **_CONNECTED),
    Host(
        "granite_docling", prompts_layout, tower="vision_model", projector="vision_model.connector", **_DEEP
    ),
)
