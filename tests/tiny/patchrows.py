"""Families whose pictures of any size come as rows of patches, packed one behind the other."""

from __future__ import annotations

from math import prod

import torch

from . import host
from .parts import IMAGE, LLAMA, VIDEO, VOCAB, Grouped, Inputs, MakeInputs, maker, noise, randomise

GRIDS = [(1, 8, 12), (1, 12, 8), (1, 8, 8), (1, 4, 12)]  # (frames, rows, columns) of patches of the pictures
FILMS = [(2, 4, 4), (3, 4, 8)]


def packed(width: int, merge: int = 2) -> MakeInputs:
    """Patches of `width` numbers each; merge x merge of them become one token."""

    def rows(numbers: Grouped, seed: int, grids: list, pixels: str, grid: str) -> Inputs:
        chosen = [(i, grids[i % len(grids)]) for row in numbers for i in row]
        patches = [noise((prod(shape), width), seed, i) for i, shape in chosen]
        return {pixels: torch.cat(patches), grid: torch.tensor([shape for _, shape in chosen])}

    def film(numbers: Grouped, seed: int) -> Inputs:
        return rows(numbers, 500 + seed, FILMS, "pixel_values_videos", "video_grid_thw")

    def tokens(grids: list, i: int) -> int:
        return prod(grids[i % len(grids)]) // merge**2

    return maker(
        lambda numbers, seed: rows(numbers, seed, GRIDS, "pixel_values", "image_grid_thw"),
        lambda i: tokens(GRIDS, i),
        film=film,
        video_length=lambda i: tokens(FILMS, i),
    )


MUSE_VISION = {
    "patch_size": 8,
    "pos_emb_height": 4,  # and the side of an attention window, in patches
    "pos_emb_width": 4,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_types": ["window_attention", "full_attention", "full_attention"],
    "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
}
MUSE_TEXT = {
    **{k: v for k, v in LLAMA.items() if k != "model_type"},
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
MUSE = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "out_hidden_size": 128,
    "projector_hidden_size": 32,
    "vision_config": MUSE_VISION,
}


@host("muse_glimmer", video=True)
def muse_glimmer():
    from transformers import MuseGlimmerConfig, MuseGlimmerForConditionalGeneration

    config = MuseGlimmerConfig(text_config=dict(MUSE_TEXT), **MUSE)
    return randomise(MuseGlimmerForConditionalGeneration(config)), packed(2 * 3 * 8 * 8)


@host("muse_spark", video=True)
def muse_spark():
    from transformers import MuseSparkConfig, MuseSparkForConditionalGeneration

    text = {
        **MUSE_TEXT,
        "moe_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_hidden_size": 16,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
    }
    audio = {
        "patch_sizes": [4, 4],
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "out_hidden_size": 32,
    }
    config = MuseSparkConfig(text_config=text, audio_config=audio, audio_token_id=97, **MUSE)
    return randomise(MuseSparkForConditionalGeneration(config)), packed(2 * 3 * 8 * 8)


@host("dots3_note", video=True)
def dots3_note():
    from transformers import Dots3NoteConfig, Dots3NoteForConditionalGeneration

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 8,
        "moe_intermediate_size": 16,
        "mlp_layer_types": ["dense", "dense", "sparse"],
        "per_layer_config": {2: experts},
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
    }
    latent = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "head_dim": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    text = {
        **{k: v for k, v in LLAMA.items() if k != "model_type"},
        **latent,
        **{f"swa_{name}": value for name, value in latent.items()},
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "shared_experts_intermediate_size": 16,
        "index_topk": 1024,  # more than there are: a text token sees all the others, as without an index
        "index_head_dim": 16,
        "index_n_heads": 2,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "sliding_window": 8,
    }
    audio = {
        "whisper_config": {
            "d_model": 32,
            "encoder_attention_heads": 4,
            "encoder_layers": 1,
            "encoder_ffn_dim": 48,
            "num_mel_bins": 16,
            "max_source_positions": 64,
        },
        "downsample_hidden_size": 8,
        "adapter_input_size": 32,
        "adapter_out_dim": 32,
    }
    config = Dots3NoteConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=97,
    )
    return randomise(Dots3NoteForConditionalGeneration(config)), packed(3 * 8 * 8)


@host("hyperclovax_vision_v2", video=True)
def hyperclovax_vision_v2():
    from transformers import HyperCLOVAXVisionV2Config, HyperCLOVAXVisionV2ForConditionalGeneration

    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 8,
        "window_size": 32,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [2],
    }
    config = HyperCLOVAXVisionV2Config(
        vision_config=vision,
        text_config={**LLAMA, "model_type": "hyperclovax"},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return randomise(HyperCLOVAXVisionV2ForConditionalGeneration(config)), packed(2 * 3 * 8 * 8)


@host("nemotron_h_omni", lacks=("half",))  # it casts pixels to what its config says
def nemotron_h_omni():  # its videos fail: forward() expects a list where get_video_features gives a tensor
    from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

    vision = {
        "model_type": "radio",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 1.5,
        "patch_size": 8,
        "image_size": 64,
        "max_img_size": 64,
        "video_temporal_patch_size": 2,
        "dtype": "float32",
    }
    text = {
        **LLAMA,
        "model_type": "nemotron_h",
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    }
    config = NemotronH_Omni_Reasoning_V3_Config(
        vision_config=vision,
        text_config=text,
        vision_hidden_size=32,
        projector_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=97,
    )
    return randomise(NemotronH_Omni_Reasoning_V3(config)), omni_inputs()


def omni_inputs() -> MakeInputs:
    """Pictures have rows and columns here, no frames."""

    def draw(numbers: Grouped, seed: int) -> Inputs:
        chosen = [(i, GRIDS[i % len(GRIDS)][1:]) for row in numbers for i in row]
        patches = [noise((prod(shape), 3 * 8 * 8), seed, i) for i, shape in chosen]
        return {"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor([g for _, g in chosen])}

    return maker(draw, lambda i: prod(GRIDS[i % len(GRIDS)]) // 4)


HYBRID = {  # of both Inkling generations
    **{k: v for k, v in LLAMA.items() if k != "model_type"},
    "num_hidden_layers": 4,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "unpadded_vocab_size": VOCAB,
}


def squares_of_tokens(pixels: int, grid: bool, channels: int = 3, frames: int = 0) -> MakeInputs:
    """A picture is its tokens' squares of pixels, in raster order: (tokens, [frames,] pixels, pixels, 3)."""
    grids = [(1, rows // 2, cols // 2) for _, rows, cols in GRIDS]

    def draw(numbers: Grouped, seed: int) -> Inputs:
        chosen = [(i, grids[i % len(grids)]) for row in numbers for i in row]
        side = (frames, pixels, pixels, channels) if frames else (pixels, pixels, channels)
        inputs = {"pixel_values": torch.cat([noise((prod(g), *side), seed, i) for i, g in chosen])}
        if grid:
            inputs["image_grid_thw"] = torch.tensor([g for _, g in chosen])
        return inputs

    return maker(draw, lambda i: prod(grids[i % len(grids)]))


@host("inkling", works=False)
def inkling():
    from transformers import InklingConfig, InklingForConditionalGeneration

    config = InklingConfig(
        text_config={**HYBRID, "mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
        vision_config={"patch_size": 8, "temporal_patch_size": 2, "num_hidden_layers": 5, "hidden_size": 32},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        image_token_id=IMAGE,
        audio_token_id=97,
        image_bos_token_id=96,
        audio_bos_token_id=95,
    )
    return randomise(InklingForConditionalGeneration(config)), squares_of_tokens(8, grid=False, frames=2)


@host("inkling2", lacks=("static", "half"))  # its router is kept in float32
def inkling2():
    from transformers import Inkling2Config, Inkling2ForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 4,
        "posemb_grid_size": 8,
        "projection_hidden_dim": 32,
        "text_hidden_size": 32,
    }
    text = {**{k: v for k, v in HYBRID.items() if k != "intermediate_size"}, "n_layers_per_attn_res_block": 2}
    config = Inkling2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return randomise(Inkling2ForConditionalGeneration(config)), squares_of_tokens(8, grid=True)
