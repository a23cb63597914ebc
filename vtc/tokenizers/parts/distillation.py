"""Latent distillation: a picture's frozen grid of tokens becomes a few 1D tokens, and the grid again.

KARL (arXiv:2507.07995) and ALIT (arXiv:2411.02393) share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...transformer import blocks, initialise, run
from ..base import Tokenizer
from ..bottlenecks import VQ, Code, Continuous
from .grid_coders import KLVAE, VQGAN, GridCoder


@dataclass(frozen=True)
class DistillationConfig:
    """base        the frozen coder, "vqgan" or "vae"; the sizes published are those of the base_ options
    quantized   whether tokens are quantised, to one of `codes` (VQ, compared at length 1), or continuous
    dim         numbers of a token
    """

    image_size: int = 256
    base: str = "vqgan"
    encoder_width: int = 1024
    encoder_depth: int = 8
    encoder_heads: int = 8
    decoder_width: int = 1024
    decoder_depth: int = 8
    decoder_heads: int = 8
    quantized: bool = True
    codes: int = 4096
    dim: int = 12
    base_hidden: int = 128
    base_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    base_dim: int | None = None  # 256 of the VQGAN, 16 of the VAE
    base_codes: int = 1024

    def __post_init__(self) -> None:
        dims = {"vqgan": 256, "vae": 16}
        if self.base not in dims:
            raise ValueError(f"base is 'vqgan' or 'vae', not {self.base!r}")
        if self.base_dim is None:
            object.__setattr__(self, "base_dim", dims[self.base])
        if self.image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of {self.patch}, not {self.image_size}")
        if self.encoder_width <= self.base_dim:
            raise ValueError("encoder_width must be more than base_dim: the base's latent is a part of it")
        if self.encoder_width % self.encoder_heads or self.decoder_width % self.decoder_heads:
            raise ValueError("heads must divide the width of encoder and decoder")

    @property
    def patch(self) -> int:
        """Pixels on the side of one place of the grid."""
        return 2 ** (len(self.base_multipliers) - 1)

    @property
    def places(self) -> int:
        return (self.image_size // self.patch) ** 2


class LatentDistillation(Tokenizer):
    """The parts that both systems have under the same names.

    The base coder is frozen (`requires_grad` is off); the second stage of the papers' trainings turns it on.
    """

    Config: ClassVar[type] = DistillationConfig
    weights = "no licence stated"
    prefix_stable = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        c = config
        sizes = (c.base_hidden, c.base_multipliers, c.base_dim)
        coder = VQGAN(*sizes, c.base_codes) if c.base == "vqgan" else KLVAE(*sizes)
        self.base_tokenizer = nn.ModuleDict({c.base: coder.requires_grad_(False)})
        self.patch_embed = nn.Conv2d(3, c.encoder_width - c.base_dim, c.patch, c.patch)
        self.encoder_ln_pre = nn.LayerNorm(c.encoder_width)
        self.encoder = Encoder(c.encoder_width, c.encoder_depth, c.encoder_heads)
        self.encoder_ln_post = nn.LayerNorm(c.encoder_width)
        self.pre_quantizer_mlp = nn.Linear(c.encoder_width, c.dim)
        self.quantize = VQ(c.codes, c.dim, l2=True) if c.quantized else Continuous(c.dim)
        self.decoder = Decoder(c.decoder_width, c.decoder_depth, c.decoder_heads, coder.outputs)
        self.decoder_mask_token = table(c.decoder_width, 1, 1, c.decoder_width)

    @property
    def coder(self) -> GridCoder:
        return self.base_tokenizer[self.config.base]

    def patches(self, images: Tensor) -> Tensor:
        """What the patches look like beside what the base coder tells of them: (B, N, width - base_dim)."""
        return self.patch_embed(images).flatten(2).transpose(1, 2)

    def code(self, hidden: Tensor) -> Code:
        """The tokens of what latents have become in the encoder, (B, k, width)."""
        return self.quantize(self.pre_quantizer_mlp(self.encoder_ln_post(hidden)))

    def picture(self, told: Tensor) -> Tensor:
        """The picture (B, 3, H, W) of what the decoder tells of each place, (B, N, outputs)."""
        return self.coder.decode(self.coder.code(told))

    def initialise(self) -> None:
        """Random weights for all parts but the quantiser and the base coder, which have their own."""
        for name, part in self.named_children():
            if name not in ("quantize", "base_tokenizer"):
                initialise(part)

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out `gan_losses.*`: discriminators and the LPIPS network of the second training stage."""
        coders = {"base_tokenizer.vqgan.": VQGAN, "base_tokenizer.vae.": KLVAE}
        renamed = {}
        for name, value in state.items():
            if name.startswith("gan_losses."):
                continue
            coder = next((found for prefix, found in coders.items() if name.startswith(prefix)), None)
            renamed[coder.rename(name) if coder else name] = value
        return renamed


class Encoder(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.transformer = blocks(width, depth, heads)

    def forward(self, x: Tensor) -> Tensor:
        return run(self.transformer, x)


class Decoder(nn.Module):
    """Places (B, N, width) and 1D tokens (B, k, width) to what is told of each place, (B, N, outputs)."""

    def __init__(self, width: int, depth: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = blocks(width, depth, heads)
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, outputs))

    def forward(self, grid: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.ln_pre(torch.cat([grid, tokens], 1))
        x = run(self.transformer, x, mask)
        return self.ffn(self.ln_post(x[:, : grid.shape[1]]))


def table(width: int, *shape: int) -> nn.Parameter:
    """Learnt vectors as both systems start them: normal, of about length 1 in `width` numbers."""
    return nn.Parameter(torch.randn(shape) * width**-0.5)
