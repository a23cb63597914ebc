"""Families whose towers see the patches of all pictures as one row: Qwen-VL, GLM-V, Ernie, OCR models."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from . import host
from .parts import IMAGE, LLAMA, VIDEO, Grouped, Inputs, MakeInputs, maker, noise, randomise

GRIDS = [(6, 8), (8, 10), (4, 8)]  # (rows, cols) of patches of picture i % 3
FRAME = (4, 6)
START, END, STAMP, FILM_START, FILM_END = 97, 96, 95, 94, 93

TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
}
PAIRED = {**TOWER, "temporal_patch_size": 2, "out_hidden_size": 32}  # two frames, or a picture twice, are one
SIGLIP2 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 4,
}
QWEN3 = {**PAIRED, "num_position_embeddings": 64}
DEEPSTACK = {**QWEN3, "deepstack_visual_indexes": [0, 1]}
AUDIO = {  # the towers of the omni models' ears: built, never used
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "downsample_hidden_size": 8,
}

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
INTERLEAVED = {**MROPE, "mrope_interleaved": True}
WHOLE_HEAD = {**MROPE, "partial_rotary_factor": 1.0}
DECODER = {name: value for name, value in LLAMA.items() if name != "model_type"} | {"rope_parameters": MROPE}
QWEN3_DECODER = {**DECODER, "head_dim": 8, "rope_parameters": INTERLEAVED}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 16}
GLM_DECODER = {**DECODER, "rope_parameters": WHOLE_HEAD}
GLM_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
HYBRID = {
    **DECODER,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "rope_parameters": {**INTERLEAVED, "partial_rotary_factor": 1.0},
}
# The n-gram embeddings mark padding with the end token, so there must be one: an id that is never generated.
NGRAMS = {"ple_layer_ids": [1], "ple_embed_dim": 32, "heads_per_ngram": 2, "ngram_vocab_size_base": 200}
NGRAMS |= {"split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8, "eos_token_id": 90}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
LATENT = {  # compressed keys and values, as of DeepSeek
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
GLM5_DECODER = {
    **DECODER,
    **LATENT,
    "rope_parameters": None,
    "num_hidden_layers": 4,
    "qk_rope_head_dim": 0,
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention", "indexed_attention"],
    "indexer_types": ["shared", "full", "shared", "full"],
    "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
    "index_topk": 16,
    "index_kpool": 4,
    "index_head_dim": 8,
    "index_n_heads": 8,  # scores are cut at 0: few heads give many ties, and then padding decides
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 2,
    "hc_mult": 2,
}

CONFIGS = {  # model_type -> (vision_config, text_config, what else)
    "qwen2_vl": ({**PAIRED, "embed_dim": 32, "mlp_ratio": 2}, DECODER, {}),
    "qwen2_5_vl": ({**PAIRED, "window_size": 16, "fullatt_block_indexes": [2]}, DECODER, {}),
    "qwen3_vl": (DEEPSTACK, QWEN3_DECODER, {}),
    "qwen3_vl_moe": (DEEPSTACK, {**QWEN3_DECODER, **EXPERTS}, {}),
    "qwen3_5": (QWEN3, HYBRID, {}),
    "qwen3_5_moe": (QWEN3, {**HYBRID, **SHARED_EXPERT}, {}),
    "qwen4_exp": (
        QWEN3,
        {**HYBRID, **SHARED_EXPERT, **NGRAMS, **INDEXER, "hc_count": 2, "hc_lowrank": 8},
        {},
    ),
    "qwen2_5_omni_thinker": (
        {**PAIRED, "window_size": 16, "fullatt_block_indexes": [2]},
        DECODER,
        {"audio_config": AUDIO, "seconds_per_chunk": 2},
    ),
    "qwen3_omni_moe_thinker": (
        DEEPSTACK,
        {**QWEN3_DECODER, **EXPERTS},
        {"audio_config": AUDIO},
    ),
    "glm4v": ({**PAIRED, "image_size": 32}, GLM_DECODER, {}),
    "glm4v_moe": ({**PAIRED, "image_size": 32}, {**GLM_DECODER, **GLM_EXPERTS}, {}),
    "glm46v": ({**PAIRED, "image_size": 32}, GLM_DECODER, {}),
    "glmga": ({**PAIRED, "image_size": 32}, GLM_DECODER, {}),
    "glm_ocr": (PAIRED, GLM_DECODER, {}),
    "glm5_next": ({**PAIRED, "projection_intermediate_size": 48}, GLM5_DECODER, {}),
    "ernie4_5_vl_moe": (
        TOWER,
        {**DECODER, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16]},
        {},
    ),
    "paddleocr_vl": ({**SIGLIP2, "image_size": 32}, {**DECODER, "head_dim": 8}, {}),
    "hunyuan_vl": (
        {**SIGLIP2, "max_image_size": 32, "out_hidden_size": 32},
        {**DECODER, "head_dim": 8},
        {},
    ),
    "video_llama_3": (SIGLIP2, {**DECODER, "model_type": "qwen2", "rope_parameters": None}, {}),
    "cosmos3_edge": (
        {**SIGLIP2, "num_patches": 64},
        {**DECODER, "head_dim": 8},
        {"projector_hidden_size": 48},
    ),
    "cosmos3_omni": (DEEPSTACK, QWEN3_DECODER, {}),
    "kimi_k25": (
        {**SIGLIP2, "pos_emb_height": 8, "pos_emb_width": 8},
        {
            **DECODER,
            **LATENT,
            "model_type": "deepseek_v3",
            "qk_rope_head_dim": 8,
            "rope_parameters": None,
            "first_k_dense_replace": 1,
        },
        {"projection_hidden_size": 32},
    ),
}
PATCH = {  # the shape of one patch, where it is not two times 3 x 4 x 4 in one row
    "ernie4_5_vl_moe": (48,),
    "hunyuan_vl": (48,),
    "video_llama_3": (48,),
    "cosmos3_edge": (48,),
    "paddleocr_vl": (3, 4, 4),
    "kimi_k25": (3, 4, 4),
}
GLM = {"glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"}
STAMPED = {"qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "cosmos3_omni", "cosmos3_edge"}
STAMPED |= GLM | {"glm5_next"}
STILLS = {"paddleocr_vl", "hunyuan_vl"}
OMNI = {"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"}
UNTYPED = OMNI | {"kimi_k25", "video_llama_3"}
# GLM-4V counts every placeholder as a picture's and as a film's, so that a call holds pictures or films; for
# beams it repeats the pictures of a prompt one by one, as if there were one only.
LACKS = dict.fromkeys(GLM, ("mixed", "beams")) | {
    "glm5_next": ("beams",),
    "ernie4_5_vl_moe": ("uncached",),  # the types of tokens do not grow with the prompt
    "hunyuan_vl": ("rows",),  # a position counts the pictures of the rows before
}


def build(model_type: str) -> tuple[nn.Module, MakeInputs]:
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision, text, others = CONFIGS[model_type]
    config = AutoConfig.for_model(
        model_type, vision_config=dict(vision), text_config=dict(text), **special_ids(model_type), **others
    )
    model = AutoModelForImageTextToText.from_config(config)
    films = {"film": film(model_type), "video_length": film_length(model_type)}
    return randomise(model), maker(
        draw(model_type),
        picture_length(model_type),
        **({} if model_type in STILLS else films),
        before=[START],
        after=[END],
        extra=lambda ids: spell(ids, model_type),
    )


def special_ids(model_type: str) -> dict[str, int]:
    suffix = "token_index" if model_type == "qwen2_5_omni_thinker" else "token_id"
    places = {"image": IMAGE, "video": VIDEO, "audio": 92}
    names = {"vision_start": START, "vision_end": END, "image_start": START, "image_end": END}
    names |= {"video_start": FILM_START, "video_end": FILM_END, "audio_start": 91}
    return {f"{name}_{suffix}": i for name, i in places.items()} | {
        f"{name}_token_id": i for name, i in names.items()
    }


def patches(model_type: str, grids: list[tuple[int, int, int]], numbers: list[int], seed: int) -> Tensor:
    shape = PATCH.get(model_type, (96,))
    return torch.cat(
        [noise((t * rows * cols, *shape), seed, i) for (t, rows, cols), i in zip(grids, numbers)]
    )


def draw(model_type: str):
    def pictures(numbers: Grouped, seed: int) -> Inputs:
        flat = [i for row in numbers for i in row]
        grids = [(1, *GRIDS[i % 3]) for i in flat]
        inputs = {
            "pixel_values": patches(model_type, grids, flat, seed),
            "image_grid_thw": torch.tensor(grids),
        }
        if model_type == "video_llama_3":
            inputs["image_merge_sizes"] = torch.tensor([side(i, model_type) for i in flat])
        return inputs

    return pictures


def side(i: int, model_type: str) -> int:
    """How many patches are on a token's side. VideoLLaMA 3 is told so for each picture."""
    return 1 if model_type == "video_llama_3" and i % 3 == 2 else 2


def picture_length(model_type: str):
    def length(i: int) -> int:
        rows, cols = (patches // side(i, model_type) for patches in GRIDS[i % 3])
        return rows * (cols + 1) + 2 if model_type == "hunyuan_vl" else rows * cols  # newlines, begin, end

    return length


def frames(i: int, model_type: str) -> int:
    """The frames of clip i, after two were made one where a family does so."""
    if model_type == "kimi_k25":  # it splits the features of a longer clip wrongly
        return 1
    return 2 + 2 * (i % 2)


def film(model_type: str):
    def clips(numbers: Grouped, seed: int) -> Inputs:
        flat = [i for row in numbers for i in row]
        grids = [(frames(i, model_type), *FRAME) for i in flat]
        pixels = patches(model_type, grids, flat, seed)
        inputs = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grids)}
        if model_type == "video_llama_3":
            inputs["video_merge_sizes"] = torch.full((len(flat),), 2)
        if model_type in OMNI:
            inputs["video_second_per_grid"] = torch.ones(len(flat))
        return inputs

    return clips


def film_length(model_type: str):
    """How many ids a clip takes; where its frames are stamped, a stamp between two frames is one of them."""

    def length(i: int) -> int:
        count, area = frames(i, model_type), FRAME[0] * FRAME[1] // 4
        if model_type == "ernie4_5_vl_moe":
            return area * count // 2  # two frames are one token's
        return area * count + (count - 1) * (model_type in STAMPED)

    return length


def spell(ids: Tensor, model_type: str) -> Inputs:
    """The prompt as the family's processor writes it, with the types of its tokens."""
    if model_type in STAMPED:
        ids = stamped(ids)
    kind = (ids == IMAGE).long() + 2 * (ids == VIDEO)
    inputs = {} if model_type in UNTYPED else {"mm_token_type_ids": kind}
    if model_type == "ernie4_5_vl_moe":  # what stands around a picture goes to the experts of vision, too
        inputs["moe_mm_token_type_ids"] = kind.maximum(kind.roll(1, 1)).maximum(kind.roll(-1, 1))
    if model_type in GLM or model_type == "glm5_next":
        ids = ids.masked_fill((ids == START) & (kind.roll(-1, 1) == 2), FILM_START)
        ids = ids.masked_fill((ids == END) & (kind.roll(1, 1) == 2), FILM_END)
        ids = ids.masked_fill(kind == 2, IMAGE)
    return {"input_ids": ids, **inputs}


def stamped(ids: Tensor) -> Tensor:
    """Every token between two frames of a clip becomes a time stamp."""
    film = ids == VIDEO
    place = torch.arange(ids.shape[1]).expand_as(ids)
    last_other = torch.where(film, -1, place).cummax(1).values
    area = FRAME[0] * FRAME[1] // 4
    return ids.masked_fill(film & ((place - last_other) % (area + 1) == 0), STAMP)


FAMILIES = {  # model types that an entry of another name serves
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
    "glmga": "glm46v",
}
for name in CONFIGS:
    facts = {"video": name not in STILLS, "lacks": LACKS.get(name, ())}
    host(name, FAMILIES.get(name), **facts)(functools.partial(build, name))


@host("qwen2_5_omni-whole", "qwen2_5_omni", works=False)
def qwen2_5_omni_whole():
    return with_voice("qwen2_5_omni")


@host("qwen3_omni_moe-whole", "qwen3_omni_moe", works=False)
def qwen3_omni_moe_whole():
    return with_voice("qwen3_omni_moe")


def with_voice(model_type: str) -> tuple[nn.Module, MakeInputs]:
    """The model around a thinker. Its voice is left out: it is large, and refused either way."""
    from transformers import AutoConfig, AutoModelForTextToWaveform

    thinker, make_inputs = build(f"{model_type}_thinker")
    config = AutoConfig.for_model(
        model_type, thinker_config=thinker.config.to_dict(), enable_audio_output=False
    )
    return AutoModelForTextToWaveform.from_config(config).eval(), make_inputs
