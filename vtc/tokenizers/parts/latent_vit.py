"""TiTok's transformers: patches and latent tokens go through them as one sequence (arXiv:2406.07550).

Names of parameters are those of the published weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...transformer import blocks, initialise, present, run

SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}

Size = str | tuple[int, int, int]  # a name, or width, depth and heads


def measures(size: Size) -> tuple[int, int, int]:
    """Width, depth and heads of a size. Raises ValueError for an unknown name, and heads that do not fit."""
    if isinstance(size, str) and size not in SIZES:
        raise ValueError(f"a transformer is {', '.join(SIZES)}, or (width, depth, heads), not {size!r}")
    width, depth, heads = SIZES[size] if isinstance(size, str) else size
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    return width, depth, heads


def legacy_layout(x: Tensor) -> Tensor:
    """Latents (B, K, width), moved to where TiTok's first checkpoints have them: (B, K, width).

    Their code reads the numbers as (B, width, K) without transposing them. Channel c of token k is then
    number c * K + k of the K * width: a token is a mixture of all latents, not one of them.
    """
    b, k, width = x.shape
    return x.reshape(b, width, k).transpose(1, 2)


class _LatentVit(nn.Module):
    def __init__(self, size: Size, patches: int, tokens: int) -> None:
        super().__init__()
        width, depth, heads = measures(size)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(1, width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(patches + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = blocks(width, depth, heads)
        self.ln_post = nn.LayerNorm(width)

    def attend(self, patches: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """patches (B, N, width) and tokens (B, T, width), a class token in front: (B, 1 + N + T, width)."""
        first = self.class_embedding.expand(len(patches), 1, -1)
        patches = torch.cat([first, patches], 1) + self.positional_embedding
        return run(self.transformer, self.ln_pre(torch.cat([patches, tokens], 1)), mask)


class LatentEncoder(_LatentVit):
    """Pictures (B, 3, H, W) and latent tokens (K, width) to latents (B, K, `channels`)."""

    def __init__(
        self, size: Size, side: int, patch: int, tokens: int, channels: int, legacy: bool = False
    ) -> None:
        super().__init__(size, (side // patch) ** 2, tokens)
        width = measures(size)[0]
        self.legacy = legacy
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.conv_out = nn.Conv2d(width, channels, 1)
        initialise(self)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, width)
        latents = (latent_tokens + self.latent_token_positional_embedding).expand(len(images), -1, -1)
        x = self.attend(patches, latents)
        x = self.ln_post(x[:, -latents.shape[1] :])  # (B, K, width)
        x = legacy_layout(x) if self.legacy else x
        return self.conv_out(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)  # (B, K, channels)


class LatentDecoder(_LatentVit):
    """Values (B, k, `dim`) of tokens to pixels (B, 3, H, W), or to logits (B, `codes`, H / patch, W / patch).

    codes: how many codes there are logits of; None: pixels.
    """

    def __init__(
        self, size: Size, side: int, patch: int, tokens: int, dim: int, codes: int | None = None
    ) -> None:
        super().__init__(size, (side // patch) ** 2, tokens)
        width = measures(size)[0]
        self.grid, self.patch, self.codes = side // patch, patch, codes
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(width**-0.5 * torch.randn(1, 1, width))
        if codes is None:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * patch**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        else:
            self.ffn = nn.Sequential(
                nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, codes, 1)
            )
        initialise(self)

    def forward(self, values: Tensor, valid: Tensor, index: Tensor, context: Tensor | None = None) -> Tensor:
        """valid and index (B, k); context (B, T, width): more tokens, behind those of the picture."""
        n = self.grid**2
        values = values.to(self.decoder_embed.weight.dtype)
        x = self.decoder_embed(values) + self.latent_token_positional_embedding[index.clamp(min=0)]
        if context is not None:
            x = torch.cat([x, context], 1)
            valid = torch.cat([valid, valid.new_ones(context.shape[:2])], 1)
        x = self.attend(self.mask_token.expand(len(x), n, -1), x, present(n + 1, valid))
        x = self.ln_post(x[:, 1 : n + 1]).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        x = self.ffn(x)
        return x if self.codes is not None else self.conv_out(self._pixels(x))

    def _pixels(self, x: Tensor) -> Tensor:
        """(B, patch * patch * 3, h, w) to (B, 3, h * patch, w * patch)."""
        x = x.unflatten(1, (self.patch, self.patch, 3))  # (B, row, column, channel, h, w)
        return x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
