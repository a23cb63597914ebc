"""The frozen autoencoder between pixels and the latents that flow decoders make (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LatentVAE(nn.Module):
    """diffusers' `AutoencoderKL`, under the name `vae`: frozen, always in evaluation mode.

    channels: the width of each stage; every stage but the last halves the side. Latents are
    (mean - shift) * scale; with `sample` a draw from the posterior takes the place of its mean. Raises
    ImportError where diffusers is missing.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        channels: Sequence[int] = (128, 256, 512, 512),
        layers: int = 2,
        groups: int = 32,
        scale: float = 0.18215,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale, self.shift, self.factor = scale, shift, 2 ** (len(channels) - 1)
        self.vae = _diffusers()(
            down_block_types=["DownEncoderBlock2D"] * len(channels),
            up_block_types=["UpDecoderBlock2D"] * len(channels),
            block_out_channels=list(channels),
            latent_channels=latent_channels,
            layers_per_block=layers,
            norm_num_groups=groups,
        )
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LatentVAE:
        return super().train(False)

    def encode(
        self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to latents (B, C, H / factor, W / factor)."""
        if not len(images):  # diffusers' attention cannot be empty
            shape = (self.vae.config.latent_channels, *(side // self.factor for side in images.shape[2:]))
            return images.new_zeros(0, *shape)
        posterior = self.vae.encode(images * 2 - 1).latent_dist
        latents = posterior.sample(generator) if sample else posterior.mode()
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, h * factor, w * factor), about in [0, 1]."""
        if not len(latents):
            return latents.new_zeros(0, 3, *(side * self.factor for side in latents.shape[2:]))
        return self.vae.decode(latents / self.scale + self.shift).sample / 2 + 0.5


def published_vae(name: str) -> dict[str, Any]:
    """The configuration of the `AutoencoderKL` in a folder or on the Hub. Raises OSError for none."""
    return dict(_diffusers().load_config(name))


def _diffusers() -> type:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(
            "this tokenizer needs diffusers: pip install 'vision-token-compression[tokenizers]'"
        ) from error
    return AutoencoderKL
