"""Families whose base model embeds its pictures and runs its layers in one forward, so that nothing can be
taken out in between, or whose features do not say where a picture ends: what such a model does in front of
its layers, as a step of its own that knows the prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..record import Tile
from .host import Layout
from .raster import squares

if TYPE_CHECKING:
    from . import Vision

ENCODE = "vtc_image_features"  # generate() must not take it for a get_image_features of the family's


@dataclass(frozen=True)
class Joined:
    """embed   (base, inputs of its forward) -> the inputs with embeddings instead of ids and pictures
    encode  (base, inputs) -> the features of all pictures, where the base has no get_image_features
    """

    embed: Callable[[nn.Module, dict[str, Any]], dict[str, Any]]
    encode: Callable[..., Any] | None = None


def embed_codes(base: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Chameleon: words, some of them codes of pictures."""
    ids, ready = inputs["input_ids"], (inputs.get("mm_encoder_outputs") or {}).get("image")
    x = base.get_input_embeddings()(ids)
    if ready is None and inputs.get("pixel_values") is not None:
        ready = base.get_image_features(inputs["pixel_values"], return_dict=True)
    if ready is not None:
        features = ready.pooler_output
        x = x.masked_scatter(
            base.get_placeholder_mask(ids, inputs_embeds=x, image_features=features), features
        )
    done = {"input_ids": None, "pixel_values": None, "mm_encoder_outputs": None}
    return {**inputs, **done, "inputs_embeds": x}


def embed_rows(base: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Fuyu, Inkling: patches, those of all pictures in one matrix."""
    ids, ready = inputs["input_ids"], (inputs.get("mm_encoder_outputs") or {}).get("image")
    x = base.get_input_embeddings()(ids)
    if ready is None and inputs.get("pixel_values") is not None:
        ready = base.get_image_features(inputs["pixel_values"], return_dict=True)
    if ready is not None:
        features = ready.last_hidden_state if ready.pooler_output is None else ready.pooler_output
        place = ids == base.config.image_token_id
        if int(place.sum()) != features.shape[:-1].numel():
            raise ValueError(f"{int(place.sum())} image tokens for {features.shape[:-1].numel()} features")
        marked = getattr(base, ENCODE)(input_ids=ids, features=features).pooler_output
        x = x.masked_scatter(place[..., None], marked.to(x.device, x.dtype))
    done = {"input_ids": None, "pixel_values": None, "mm_encoder_outputs": None}
    return {**inputs, **done, "inputs_embeds": x}


def encode_rows(base: nn.Module, input_ids: Tensor, features: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=features.flatten(0, -2))


def rows_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """Pictures as the prompt has them: rows of image tokens, one other token behind each row."""
    (item,), token = items, vision.base.config.image_token_id
    layouts, first = [], 0
    for ids in arguments["input_ids"].tolist():
        for rows, cols in _grids(ids, token):
            n = rows * cols
            tile = Tile(torch.arange(n, device=item.device), (rows, cols))
            layouts.append(Layout([tile], None, item[first : first + n]))
            first += n
    return layouts


def runs_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """Pictures as the prompt has them: image tokens without a gap, in how many rows is not told.

    Raises ValueError where the prompt comes in chunks, which end anywhere in a picture.
    """
    (item,), token = items, vision.base.config.image_token_id
    layouts, first = [], 0
    for ids in arguments["input_ids"].tolist():
        if token in (ids[0], ids[-1]):
            raise ValueError(
                f"where a picture of {vision.host.name} ends is known from the whole prompt only: generate "
                "without prefill_chunk_size, or remove() the compression"
            )
        for is_image, run in itertools.groupby(number == token for number in ids):
            if is_image:
                own = torch.arange(len(list(run)), device=item.device)
                layouts.append(Layout([Tile(own, (1, len(own)))], None, item[first : first + len(own)]))
                first += len(own)
    return layouts


def _grids(ids: list[int], token: int) -> list[tuple[int, int]]:
    """Rows and columns of each picture of a prompt. Rows of one length with one token in between are one
    picture's."""
    runs = [(key, len(list(run))) for key, run in itertools.groupby(number == token for number in ids)]
    grids, last = [], None
    for gap, (is_image, cols) in zip([0, *(length for _, length in runs)], runs):
        if not is_image:
            continue
        if grids and gap == 1 and last == cols:
            grids[-1] = (grids[-1][0] + 1, cols)
        else:
            grids.append((1, cols))
        last = cols
    return grids


_PHI4 = ("image_pixel_values", "image_sizes", "image_attention_mask")
_PHI4_AUDIO = ("audio_input_features", "audio_embed_sizes", "audio_attention_mask")


def embed_phi4(base: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Phi-4-multimodal: words, then pictures and sounds in their places."""
    ids = inputs["input_ids"]
    given = {name: inputs.get(name) for name in (*_PHI4, *_PHI4_AUDIO)}
    pictures = ids == base.config.vision_config.image_token_id
    if given["image_pixel_values"] is not None and bool(pictures.any()):
        output = getattr(base, ENCODE)(input_ids=ids, **given)
        x = output.last_hidden_state.masked_scatter(pictures[..., None], output.pooler_output)
    else:
        x = base.embed_tokens_extend(ids, base.embed_tokens(ids), **given)
    return {**inputs, **dict.fromkeys(given), "input_ids": None, "inputs_embeds": x}


def encode_phi4(base: nn.Module, input_ids: Tensor, **kwargs: Any) -> Any:
    """The embedded prompts, and the rows among them that are pictures: (tokens of all pictures, D)."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    x = base.embed_tokens_extend(input_ids, base.embed_tokens(input_ids), **kwargs)
    pictures = input_ids == base.config.vision_config.image_token_id
    return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x[pictures])


def phi4_layout(vision: Vision, arguments: dict[str, Any], items: list[Tensor]) -> list[Layout]:
    """The tiles of a picture as one map, cut to its shape; one token; the whole view. A newline token behind
    each row of both, 2 x 2 patches behind every other token. The encoder sees the whole view first."""
    config, (item,) = vision.encoder.tower.config, items
    side = config.image_size // config.patch_size  # patches on a tile's side
    area, device, behind = side * side, item.device, squares((side, side), 2, item.device)
    side = side // 2  # tokens
    pictures, layouts = arguments["image_pixel_values"], []
    for number, (pixels, size) in enumerate(zip(pictures, arguments["image_sizes"].view(-1, 2))):
        rows, cols = (int(pixel) // config.crop_size for pixel in size)
        seen = arguments["image_attention_mask"][number, 1 : rows * cols + 1, ::2, ::2]
        seen = seen.reshape(rows, cols, side, side).transpose(1, 2).reshape(rows * side, cols * side)
        height, width = int(seen[:, 0].sum()), int(seen[0].sum())
        first = number * pictures.shape[1] * area
        tiles, patches = [], []
        for tile in range(rows * cols):
            top, left = tile // cols * side, tile % cols * side
            h, w = min(side, height - top), min(side, width - left)
            if h > 0 and w > 0:
                box = (left / width, top / height, (left + w) / width, (top + h) / height)
                tiles.append(Tile(_place(top, left, (h, w), width + 1, device), (h, w), box))
                own = behind.view(side, side, -1)[:h, :w].flatten(0, 1)
                patches.append(own + first + (tile + 1) * area)
        start = height * (width + 1) + 1
        whole = Tile(start + _place(0, 0, (side, side), side + 1, device), (side, side), thumbnail=True)
        length = start + side * (side + 1)
        layouts.append(Layout([*tiles, whole], [*patches, behind + first], pixels, length))
    return layouts


def _place(top: int, left: int, grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """The places of a rectangle in raster order, in a map with rows of `width` tokens."""
    rows = (top + torch.arange(grid[0], device=device))[:, None] * width
    return (rows + left + torch.arange(grid[1], device=device)).flatten()
