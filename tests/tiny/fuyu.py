"""Fuyu: patches of pixels go into the language model through one linear layer, without an encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from . import host
from .parts import IMAGE, LLAMA, Grouped, Inputs, maker, noise, randomise

NEWLINE = 96  # a word of the prompt, behind each row of patches
GRIDS = [(2, 6), (4, 4), (3, 4)]  # (rows, columns) of patches of the pictures


@host("fuyu", works=False)
def fuyu():
    from transformers import FuyuConfig, FuyuForCausalLM

    text = {**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "model_type": "persimmon"}
    model = FuyuForCausalLM(FuyuConfig(text_config=text, patch_size=4, image_token_id=IMAGE))
    return randomise(model), maker(draw, length, extra=break_rows)


def length(i: int) -> int:
    rows, columns = GRIDS[i % len(GRIDS)]
    return rows * (columns + 1)


def draw(numbers: Grouped, seed: int) -> Inputs:
    chosen = [(i, GRIDS[i % len(GRIDS)]) for row in numbers for i in row]
    return {
        "pixel_values": torch.cat([noise((rows * cols, 4 * 4 * 3), seed, i) for i, (rows, cols) in chosen])
    }


def break_rows(ids: Tensor) -> Inputs:
    """The last of each row's tokens becomes a newline. Pictures are told apart by their length."""
    columns = {rows * (cols + 1): cols for rows, cols in GRIDS}
    ids = ids.clone()
    for row in ids:
        runs, sizes = (row == IMAGE).unique_consecutive(return_counts=True)
        ends = sizes.cumsum(0)
        for end, size in zip(ends[runs].tolist(), sizes[runs].tolist()):
            row[end - size : end][columns[size] :: columns[size] + 1] = NEWLINE
    return {"input_ids": ids}
