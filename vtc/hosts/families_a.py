"""Families of LLaVA's build, and those that put squares of patches into one token."""

from __future__ import annotations

from .frames import frames_layout, frames_newline_layout, tiles_layout
from .host import Host
from .llava_next import llava_next_layout, llava_onevision_layout
from .packed import packed_layout
from .raster import map_layout, raster_layout

FAMILIES = (
    Host("vipllava", ("vipllava",), raster_layout, resizable=True),
    Host(
        "video_llava",
        ("video_llava",),
        raster_layout,
        frames_layout,
        tower="image_tower",
        video_tower="video_tower",
    ),
    Host("llava_next_video", ("llava_next_video",), llava_next_layout, frames_layout, tiled=True),
    Host("llava_onevision", ("llava_onevision",), llava_onevision_layout, frames_newline_layout, tiled=True),
    Host(
        "granite4_vision",
        ("granite4_vision",),
        llava_next_layout,
        projector="",
        features="deepstack_features",
        tiled=True,
    ),
    Host("internvl", ("internvl",), raster_layout),
    Host("qianfan_ocr", ("qianfan_ocr",), raster_layout),
    Host("aya_vision", ("aya_vision",), raster_layout),
    Host("cohere2_vision", ("cohere2_vision",), raster_layout),
    Host("got_ocr2", ("got_ocr2", "pp_chart2table"), raster_layout),
    Host("ovis2", ("ovis2",), raster_layout, projector=""),
    Host(
        "deepseek_vl",
        ("deepseek_vl",),
        raster_layout,
        tower="vision_model",
        projector="aligner",
        resizable=True,
    ),
    Host(
        "deepseek_vl_hybrid",
        ("deepseek_vl_hybrid",),
        raster_layout,
        tower="vision_model",
        projector="aligner",
    ),
    Host("janus", ("janus",), raster_layout, tower="vision_model", projector="aligner"),
    Host("perception_lm", ("perception_lm",), tiles_layout, tiled=True),
    Host("fast_vlm", ("fast_vlm",), map_layout),
    Host(
        "cohere_compass",
        ("cohere_compass",),
        packed_layout,
        packed_layout,
        tower="visual",
        projector="",
        deep="deepstack_features",
    ),
    Host("exaone4_5", ("exaone4_5",), packed_layout, packed_layout, tower="visual", projector=""),
)

REFUSED: dict[str, str] = {}
