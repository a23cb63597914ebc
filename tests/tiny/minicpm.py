"""MiniCPM-V and MiniCPM-OCR: patches of all pictures in one row, merged twice; M-RoPE on a canvas in 4.7."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import host
from .parts import IMAGE, LLAMA, VIDEO, Grouped, Inputs, MakeInputs, maker, noise, randomise

PATCH = 4
FRAMES, FRAME_TOKENS = 2, 4
OPEN, CLOSE, OPEN_SLICE, CLOSE_SLICE, NEWLINE = 97, 96, 95, 94, 93
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": PATCH,
}
TEXT = {
    **LLAMA,
    "model_type": "qwen3_5_text",
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [1, 1, 2],
        "rope_theta": 10000.0,
        "mrope_interleaved": True,
        "partial_rotary_factor": 1.0,
    },
}


def frames_apart(ids: Tensor) -> Inputs:
    """Markers between the frames of a video: to these models a run of its tokens is one frame."""
    ids = ids.clone()
    video = ids == VIDEO
    starts = video & ~video.roll(1, dims=1)
    for row, start in starts.nonzero().tolist():
        ids[row, start + FRAME_TOKENS], ids[row, start + FRAME_TOKENS + 1] = CLOSE, OPEN
    return {"input_ids": ids}


def with_types(ids: Tensor) -> Inputs:
    inputs = frames_apart(ids)
    ids = inputs["input_ids"]
    return {**inputs, "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO)}


def minicpm(
    config: type, model: type, merge: int, extra=frames_apart, **others
) -> tuple[nn.Module, MakeInputs]:
    """merge: how many patches of a row become one token."""
    grids = [(4 * merge, 4 * merge), (2 * merge, 4 * merge), (3 * merge, 2 * merge)]
    frame = (2 * merge, 2 * merge)

    def grid(number: int) -> tuple[int, int]:
        return grids[number % len(grids)]

    def row(size: tuple[int, int], seed: int, number: int) -> Tensor:
        return noise((1, 3, PATCH, size[0] * size[1] * PATCH), seed, number)

    def draw(numbers: Grouped, seed: int) -> Inputs:
        pictures = [number for prompt in numbers for number in prompt]
        pixels = torch.cat([row(grid(number), seed, number) for number in pictures], dim=-1)
        return {"pixel_values": pixels, "target_sizes": torch.tensor([grid(number) for number in pictures])}

    def film(numbers: Grouped, seed: int) -> Inputs:
        clips = [number for prompt in numbers for number in prompt]
        frames = [row(frame, seed, 100 * clip + i) for clip in clips for i in range(FRAMES)]
        return {
            "pixel_values_videos": torch.cat(frames, dim=-1),
            "target_sizes_videos": torch.tensor([frame] * len(frames)),
        }

    built = model(
        config(
            vision_config=dict(VISION),
            text_config=dict(TEXT),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            insert_layer_id=1,
            tie_word_embeddings=False,
            **others,
        )
    )
    make_inputs = maker(
        draw,
        lambda i: grid(i)[0] * grid(i)[1] // merge**2,
        film=film,
        video_length=lambda i: FRAMES * FRAME_TOKENS + 2,
        before=[OPEN],
        after=[CLOSE],
        extra=extra,
    )
    return randomise(built), make_inputs


@host("minicpmv4_6", video=True)
def minicpmv4_6():
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    return minicpm(MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, merge=4)


@host("minicpmv4_7", video=True)
def minicpmv4_7():
    from transformers import MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration

    markers = {
        "image_start_id": OPEN,
        "image_end_id": CLOSE,
        "slice_start_id": OPEN_SLICE,
        "slice_end_id": CLOSE_SLICE,
        "newline_id": NEWLINE,
    }
    return minicpm(
        MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration, merge=4, extra=with_types, **markers
    )


@host("minicpm_ocr", video=True)
def minicpm_ocr():
    """Without the merger between the layers, as its checkpoint is."""
    from transformers import MiniCPMOcrConfig, MiniCPMOcrForConditionalGeneration

    return minicpm(MiniCPMOcrConfig, MiniCPMOcrForConditionalGeneration, merge=2, downsample_mode="4x")
