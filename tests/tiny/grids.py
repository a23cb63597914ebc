"""EXAONE and Command: a tower that takes the patches of all pictures as one row, with their grids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import host
from .llava_like import flat
from .parts import IMAGE, LLAMA, VIDEO, Grouped, Inputs, MakeInputs, maker, noise, randomise

PATCH = 8
GRIDS = [(1, 8, 8), (1, 4, 12), (1, 12, 4)]
TOWER = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}


def grids(model: nn.Module, apart: int = 0, **inputs) -> tuple[nn.Module, MakeInputs]:
    """A film is two pairs of frames; `apart` is how many tokens of the prompt stand between them."""

    def patches(grids: list[tuple[int, int, int]], numbers: list[int], seed: int) -> Tensor:
        shapes = [(t * h * w, 3 * 2 * PATCH * PATCH) for t, h, w in grids]
        return torch.cat([noise(shape, seed, i) for shape, i in zip(shapes, numbers)])

    def grid(i: int) -> tuple[int, int, int]:
        return GRIDS[i % len(GRIDS)]

    def draw(numbers: Grouped, seed: int) -> Inputs:
        pictures = flat(numbers)
        sizes = [grid(i) for i in pictures]
        return {"pixel_values": patches(sizes, pictures, seed), "image_grid_thw": torch.tensor(sizes)}

    def film(numbers: Grouped, seed: int) -> Inputs:
        films = [500 + i for row in numbers for i in row]
        sizes = [(2, *grid(i)[1:]) for i in films]
        return {"pixel_values_videos": patches(sizes, films, seed), "video_grid_thw": torch.tensor(sizes)}

    def tokens(i: int) -> int:
        _, rows, cols = grid(i)
        return rows * cols // 4

    return randomise(model), maker(
        draw,
        tokens,
        film=film,
        video_length=lambda i: 2 * tokens(500 + i) + apart,
        before=(97,),
        after=(96,),
        **inputs,
    )


@host("exaone4_5", video=True)
def exaone4_5():
    """Windows of 2 x 2 tokens in all layers of the tower but one; positions of the prompt are plain ones."""
    from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration

    text = {
        **LLAMA,
        "model_type": "exaone4",
        "head_dim": 8,
        "num_hidden_layers": 4,
        "sliding_window": 12,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    config = Exaone4_5_Config(
        vision_config={**TOWER, "num_key_value_heads": 2, "window_size": 32, "fullatt_block_indexes": [3]},
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return grids(Exaone4_5_ForConditionalGeneration(config))


@host("cohere_compass", video=True)
def cohere_compass():
    """Text stands between the pairs of frames of a film; full attention comes without positions."""
    from transformers import CohereCompassConfig, CohereCompassForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = {
        **LLAMA,
        "model_type": "cohere_compass_text",
        "num_hidden_layers": 4,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": rope, "full_attention": None},
    }
    config = CohereCompassConfig(
        vision_config={**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=97,
        vision_end_token_id=96,
    )

    def kinds(ids: Tensor) -> Inputs:
        for row in ids:
            set_apart(row)
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}

    return grids(CohereCompassForConditionalGeneration(config), apart=3, extra=kinds)


def set_apart(ids: Tensor) -> None:
    """Puts the end of a picture, a time and the start of a picture into the middle of each film."""
    video = (ids == VIDEO).int()
    ends = video.diff(prepend=video.new_zeros(1), append=video.new_zeros(1))
    for start, end in zip(*((ends == sign).nonzero()[:, 0].tolist() for sign in (1, -1))):
        middle = (start + end - 3) // 2
        ids[middle : middle + 3] = torch.tensor([96, 50, 97])
