"""The transformers of ALTo (arXiv:2505.16495): TiTok's, with a head that says how many tokens a mask takes
and a decoder that sees the picture to which the mask belongs.

Names of parameters are those of the published weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import causal_last, initialise, present
from ..bottlenecks import VQ
from .latent_vit import LatentDecoder, LatentEncoder, Size, legacy_layout, measures

MODES = ("zero", "pad", "truncate")


class LengthHead(nn.Module):
    """How probable each latent is to be the last that is kept.

    plain: scores are divided by the root of the width, as in attention. The published weights were trained
    with scores multiplied by it, surely by mistake, and take the very peaked distributions that it makes.
    """

    def __init__(self, width: int, plain: bool = False) -> None:
        super().__init__()
        self.scale = width ** (-0.5 if plain else 0.5)
        self.fc1, self.fc2, self.fc3 = (nn.Linear(width, width) for _ in range(3))
        initialise(self)

    def forward(self, latents: Tensor, picture: Tensor) -> Tensor:
        """Latents (B, K, width) and what the class token says (B, 1, width) to probabilities (B, K)."""
        keys = self.fc1(latents) * self.fc2(latents).sigmoid()
        return ((self.fc3(picture) * keys).sum(-1) * self.scale).softmax(-1)


def expected_place(chances: Tensor) -> Tensor:
    """The expected place of the last token kept, as a share of all: (B, K) to (B,), 0 to 1 - 1 / K."""
    k = chances.shape[1]
    return (torch.arange(k, device=chances.device) / k * chances).sum(1)


def predicted_lengths(chances: Tensor) -> Tensor:
    """How many tokens are kept, the expected place rounded up: (B, K) to (B,) int64, 1 to K."""
    k = chances.shape[1]
    return (expected_place(chances) * k).clamp(0, k - 1).ceil().long() + 1


def prefix_mask(last: Tensor) -> Tensor:
    """1 up to the last that is kept, 0 behind it: (B, K), of which each row is 1 there and 0 elsewhere."""
    return 1 - F.pad(last[:, :-1].cumsum(1), (1, 0))


def adaptive_mask(chances: Tensor) -> Tensor:
    """`prefix_mask` of the predicted lengths, with the gradients of that of the probabilities, (B, K)."""
    last = F.one_hot(predicted_lengths(chances) - 1, chances.shape[1]).to(chances.dtype)
    return prefix_mask(last + (chances - chances.detach()))


class ProjectedVQ(VQ):
    """A codebook that is a linear map of what was learnt."""

    def __init__(self, size: int, dim: int, beta: float) -> None:
        super().__init__(size, dim, l2=True, beta=beta)
        self.embedding_proj = nn.Linear(dim, dim, bias=False)

    def codebook(self) -> Tensor:
        return self.embedding_proj(self.embedding.weight)


class MaskEncoder(LatentEncoder):
    """Masks (B, 3, H, W) to latents, of which each attends to the picture and to those in front of it."""

    attn_mask: Tensor  # True where attention is forbidden; in the published weights

    def __init__(
        self, size: Size, side: int, patch: int, tokens: int, channels: int, legacy: bool, plain: bool
    ) -> None:
        super().__init__(size, side, patch, tokens, channels, legacy)
        self.length_encoder = LengthHead(measures(size)[0], plain)
        self.register_buffer("attn_mask", ~causal_last(1 + (side // patch) ** 2, tokens))

    def forward(self, images: Tensor, latent_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, K, channels), and how probable each is to be the last (B, K)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, width)
        latents = (latent_tokens + self.latent_token_positional_embedding).expand(len(images), -1, -1)
        x = self.ln_post(self.attend(patches, latents, ~self.attn_mask))  # (B, 1 + N + K, width)
        latents = x[:, -latents.shape[1] :]
        chances = self.length_encoder(latents, x[:, :1])
        latents = legacy_layout(latents) if self.legacy else latents
        return self.conv_out(latents.transpose(1, 2)[..., None])[..., 0].transpose(1, 2), chances


class MaskDecoder(LatentDecoder):
    """Values (B, K, `dim`) of tokens, and the picture to which the mask belongs, to what the pixel decoder
    takes: (B, `codes`, H / patch, W / patch).

    source: channels of the picture's embedding, which has 4 x 4 places for each patch
    """

    def __init__(
        self, size: Size, side: int, patch: int, tokens: int, dim: int, codes: int, source: int
    ) -> None:
        super().__init__(size, side, patch, tokens, dim, codes)
        self.spatial_mapper = nn.Conv2d(source, source, 4, 4)
        self.vae_project = nn.Sequential(nn.Linear(source, measures(size)[0]))
        initialise(self)

    def forward(self, values: Tensor, kept: Tensor, source: Tensor | None, mode: str) -> Tensor:
        """kept (B, K), True for the tokens that are there, the others being zeros; source (B, C, 4 h, 4 w) or
        None, for mask tokens without it; mode: see `ALTo.Config`."""
        x = self.decoder_embed(values.to(self.decoder_embed.weight.dtype))
        if mode == "pad":
            x = x * kept[..., None]
        x = x + self.latent_token_positional_embedding
        n = self.grid**2
        patches = self.mask_token.expand(len(x), n, -1)
        if source is not None:
            patches = patches + self.vae_project(self.spatial_mapper(source).flatten(2).transpose(1, 2))
        x = self.attend(patches, x, present(n + 1, kept) if mode == "truncate" else None)
        return self.ffn(self.ln_post(x[:, 1 : n + 1]).transpose(1, 2).unflatten(2, (self.grid, self.grid)))
