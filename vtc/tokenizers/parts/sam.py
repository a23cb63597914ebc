"""Embeddings of pictures by SAM's vision encoder (arXiv:2304.02643), for tokenizers that decode masks of
them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .imagenet import Normalise


def embedding(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """What a transformers `SamVisionModel` says of pixels (B, 3, side, side) in [0, 1]: (B, C, side / 16,
    side / 16).

    side is the encoder's, 1024 for the published ones. Raises ValueError for another one. Without gradients.
    """
    side = encoder.config.image_size
    if pixels.dim() != 4 or pixels.shape[1:] != (3, side, side):
        raise ValueError(f"SAM takes pixels (B, 3, {side}, {side}), not {tuple(pixels.shape)}")
    with torch.no_grad():
        return encoder(Normalise().to(pixels)(pixels)).last_hidden_state
