"""Families with views of parts, latents, codes or towers of their own."""

from __future__ import annotations

from .codes import codes_layout
from .host import Host
from .joined import (
    Joined,
    embed_codes,
    embed_phi4,
    embed_rows,
    encode_phi4,
    encode_rows,
    phi4_layout,
    rows_layout,
    runs_layout,
)
from .latents import latents_layout
from .memory import memory_layout
from .packed import packed_layout, packed_raster_layout, packed_tokens_layout
from .raster import map_layout
from .views import views_layout, views_map_layout, views_queries_layout

_MUSE = {"projector": "perception_emb_norm"}

FAMILIES = (
    Host(
        "hyperclovax_vision_v2",
        ("hyperclovax_vision_v2",),
        packed_layout,
        packed_layout,
        tower="vision_model",
        projector="projector",
    ),
    Host("dots3_note", ("dots3_note",), packed_layout, packed_layout, projector="vision_tower.merger"),
    Host("muse_glimmer", ("muse_glimmer",), packed_raster_layout, packed_raster_layout, **_MUSE),
    Host("muse_spark", ("muse_spark",), packed_raster_layout, packed_raster_layout, **_MUSE),
    Host("inkling2", ("inkling2",), packed_tokens_layout, projector="vision_tower.merger"),
    Host(
        "nemotron_h_omni",
        ("nemotron_h_omni",),
        packed_raster_layout,
        tower="vision_model",
    ),
    Host("step3p7", ("step3p7",), views_layout, tower="vision_model", tiled=True),
    Host(
        "unlimited_ocr",
        ("unlimited_ocr",),
        views_map_layout,
        tower="vision_tower.vision_encoder",
        tiled=True,
    ),
    Host(
        "deepseek_ocr2",
        ("deepseek_ocr2",),
        views_queries_layout,
        tower="vision_tower.vision_encoder",
        tiled=True,
        latent=True,
    ),
    Host("aria", ("aria",), latents_layout, latent=True),
    Host("mllama", ("mllama",), memory_layout, tower="vision_model", tiled=True, memory=True),
    Host(
        "phi4_multimodal",
        ("phi4_multimodal",),
        phi4_layout,
        tower="embed_tokens_extend.image_embed.img_processor",
        projector="embed_tokens_extend.image_embed.img_projection_down",
        tiled=True,
        joined=Joined(embed_phi4, encode_phi4),
    ),
    Host(
        "chameleon",
        ("chameleon",),
        map_layout,
        tower="vqmodel",
        projector="",
        joined=Joined(embed_codes),
    ),
    Host(
        "fuyu",
        ("fuyu",),
        rows_layout,
        tower="vision_embed_tokens",
        projector="",
        joined=Joined(embed_rows, encode_rows),
    ),
    Host(
        "inkling",
        ("inkling_mm_model",),
        runs_layout,
        projector="",
        joined=Joined(embed_rows, encode_rows),
    ),
    Host("emu3", ("emu3",), codes_layout, tower="vqmodel", projector=""),
)

_OWN_GENERATE = (
    "its generate() puts the picture's few latents into the prompt itself, behind which no hook of the model "
    "runs; use a model whose tokens are patches"
)
_NO_PROMPT = (
    "its pictures are not in the prompt: its decoder looks at them through cross-attention; use a model "
    "whose image tokens are"
)
_NO_PLACES = (
    "its image tokens have no places in the prompt, and its masks count on a fixed number of them; use a "
    "model whose prompt holds its image tokens"
)
_MASKED_PLACES = (
    "its decoder itself writes a picture's latents to places given by a mask; use a model whose tokens are "
    "patches"
)

REFUSED = {
    "blip": _NO_PROMPT,
    "blip-2": _OWN_GENERATE,
    "evolla": "it looks at proteins, not at pictures; leave it as it is",
    "florence2": _NO_PROMPT,
    "git": _NO_PLACES,
    "idefics": _NO_PROMPT,
    "instructblip": _OWN_GENERATE,
    "instructblipvideo": _OWN_GENERATE,
    "kosmos-2": _MASKED_PLACES,
    "kosmos-2.5": _MASKED_PLACES,
    "mistral4": "it is a language model alone, without an encoder of pictures; leave it as it is",
    "pi0": "it is a robot's policy that writes no text; leave it as it is",
    "pix2struct": _NO_PROMPT,
    "pp_formulanet": _NO_PROMPT,
    "udop": _NO_PROMPT,
    "vision-encoder-decoder": _NO_PROMPT,
}
