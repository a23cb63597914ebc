"""Entries for the Idefics, Gemma, Mistral, LFM, MiniCPM and Molmo lines."""

from __future__ import annotations

from .host import Host
from .minicpm import minicpm_layout, minicpm_video_layout
from .packed import packed_layout
from .padded import padded_layout
from .placed import placed_layout, placed_video_layout
from .pooled import pooled_layout, pooled_video_layout
from .prompts import prompts_layout
from .raster import map_layout, raster_layout

FAMILIES = (
    Host(
        "idefics2",
        ("idefics2",),
        prompts_layout,
        tower="vision_model",
        projector="connector",
        latent=True,
    ),
    Host("idefics3", ("idefics3",), prompts_layout, tower="vision_model", projector="connector"),
    Host("smolvlm", ("smolvlm",), prompts_layout, tower="vision_model", projector="connector"),
    Host(
        "granite_docling",
        ("granite_docling",),
        prompts_layout,
        tower="vision_model",
        projector="vision_model.connector",
        deep="deepstack_features",
    ),
    Host("paligemma", ("paligemma",), raster_layout, resizable=True),
    Host("gemma3", ("gemma3",), raster_layout),
    Host("shieldgemma2", ("shieldgemma2",), raster_layout, base="model"),
    Host("t5gemma2", ("t5gemma2",), raster_layout, base="encoder", reader="decoder"),
    Host(
        "diffusion_gemma",
        ("diffusion_gemma",),
        placed_layout,
        projector="embed_vision",
        base="encoder",
        reader="decoder",
    ),
    Host("gemma3n", ("gemma3n",), map_layout, projector="embed_vision"),
    Host("mistral3", ("mistral3",), raster_layout),
    Host(
        "lighton_ocr",
        ("lighton_ocr",),
        raster_layout,
        tower="vision_encoder",
        projector="vision_projection",
    ),
    Host("mistral_large4", ("mistral_large4",), raster_layout),
    Host("gemma4", ("gemma4",), placed_layout, placed_video_layout, projector="embed_vision"),
    Host(
        "gemma4_unified",
        ("gemma4_unified",),
        placed_layout,
        placed_video_layout,
        tower="embed_vision",
        projector="embed_vision.multimodal_embedder",
        blocks_everywhere=True,
    ),
    Host("lfm2_vl", ("lfm2_vl",), padded_layout),
    Host("lfm3_vl", ("lfm3_vl",), packed_layout, packed_layout),
    Host("minimax_m3_vl", ("minimax_m3_vl",), packed_layout, packed_layout, slots=True),
    Host(
        "llama4",
        ("llama4",),
        raster_layout,
        tower="vision_model",
        features="last_hidden_state",
        cls_last=True,
        late=True,
    ),
    Host("molmo2", ("molmo2",), pooled_layout, pooled_video_layout),
    Host("minicpmv4_6", ("minicpmv4_6",), minicpm_layout, minicpm_video_layout, projector="merger"),
    Host("minicpmv4_7", ("minicpmv4_7",), minicpm_layout, minicpm_video_layout, projector="merger"),
    Host("minicpm_ocr", ("minicpm_ocr",), minicpm_layout, minicpm_video_layout, projector="merger"),
)

REFUSED: dict[str, str] = {}
