"""The encoder and the decoder of ResTok (arXiv:2601.03955), between a map of features and latent tokens.

Names of parameters are those of ResTok's checkpoints. Both hold the latents as levels of 1, 1, 2, 4, ...
tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .hierarchical import Block, grid_places, level_mask, line_places, residual_pool, rotations
from .places import at_places

FEATURES = 256  # channels of the convolutional coder's map


def level_sizes(tokens: int) -> list[int]:
    """1, 1, 2, 4, ... that add up to a number of tokens. Raises ValueError where it is no power of two."""
    if tokens < 2 or tokens & (tokens - 1):
        raise ValueError(f"levels of 1, 1, 2, 4, ... tokens add up to a power of two, not to {tokens}")
    return [1, *(2**i for i in range(tokens.bit_length() - 1))]


class Encoder(nn.Module):
    """A map (B, 256, grid, grid) to latents (B, tokens, dim).

    Image tokens start as one level; in some blocks the coarsest is halved, and its residual stays. Latents
    start as pooled residuals of the map. A level sees itself and those before it: image levels coarse to
    fine, then latent levels.
    """

    def __init__(
        self, size: tuple[int, int, int], grid: int, tokens: int, dim: int, stages: int, legacy: bool
    ) -> None:
        super().__init__()
        width, depth, heads = size
        if depth < stages or grid % 2 ** (stages - 1):
            raise ValueError(f"{stages} stages take {stages} or more blocks and a grid that is halved "
                             f"{stages - 1} times, not {depth} and {grid}")  # fmt: skip
        self.grid, self.head_dim, self.legacy = grid, width // heads, legacy
        self.sizes = level_sizes(tokens)
        self.merges = [int(i / stages * depth) - 1 for i in range(1, stages)]
        self.patch_embed = nn.Conv2d(FEATURES, width, 1)
        self.level_embedding = _embeddings(stages, width)
        self.latent_token_level_embedding = _embeddings(len(self.sizes), width)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.ModuleList(nn.Conv2d(width, dim, 1) for _ in self.sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents before they are quantised, and the coarsest image tokens (B, n, width)."""
        x, image = self.read(x)
        x = self.ln_post(x)
        b, k, width = x.shape
        x = x.reshape(b, width, k) if self.legacy else x.transpose(1, 2)
        parts = zip(self.conv_out, x[..., None].split(self.sizes, 2))
        return torch.cat([conv(part) for conv, part in parts], 2)[..., 0].transpose(1, 2), image

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latent tokens (B, tokens, width) before their last norm, and the coarsest image tokens."""
        x = self.patch_embed(x)
        latents = residual_pool(x, [_grid(n) for n in self.sizes])
        latents = latents + _of_tokens(self.latent_token_level_embedding, self.sizes)
        image = x.flatten(2).transpose(1, 2) + self.level_embedding[0]
        x = self.ln_pre(torch.cat([image, latents], 1))
        columns = [self.grid]  # of each image level, coarsest first
        mask, rotation = self.around(columns, x.device)
        for i, block in enumerate(self.blocks):
            coarsest = self.grid * columns[0]
            x = block(x, rotation, mask, coarsest if i in self.merges else 0)
            if i in self.merges:
                told = x[:, : coarsest // 2] + self.level_embedding[len(columns)]
                x = torch.cat([told, x[:, coarsest // 2 :]], 1)
                columns.insert(0, columns[0] // 2)
                mask, rotation = self.around(columns, x.device)
        return x[:, -sum(self.sizes) :], x[:, : self.grid * columns[0]]

    def around(self, columns: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Which token sees which (T, T), and rotations (2, T, head_dim / 2), with these image levels."""
        places, counts, start = [], [self.grid * w for w in columns], 0
        for w, n in zip(columns, counts):
            places.append(grid_places(self.grid, w) + start)
            start += n
        places = torch.cat([*places, line_places(sum(self.sizes)) + start])
        return level_mask([*counts, *self.sizes], device), rotations(places, self.head_dim).to(device)


class Decoder(nn.Module):
    """Latents (B, tokens, dim) to a map (B, 256, grid, grid). All tokens see each other.

    With `features`, copies of a second mask token can take the place of the first, to be compared with
    features of a frozen network.
    """

    def __init__(self, size: tuple[int, int, int], grid: int, tokens: int, dim: int, features: bool) -> None:
        super().__init__()
        width, depth, heads = size
        self.grid, self.head_dim, self.sizes = grid, width // heads, level_sizes(tokens)
        self.latent_mask_token = nn.Parameter(torch.randn(1, 1, dim) * width**-0.5)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        if features:
            self.feat_mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.decoder_embed = nn.ModuleList(nn.Linear(dim, width) for _ in self.sizes)
        self.latent_token_level_embedding = _embeddings(len(self.sizes), width)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Conv2d(width, FEATURES, 1)

    def fill(self, values: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        """Values (B, k, dim) where `index` says, mask tokens elsewhere: (B, tokens, dim)."""
        return at_places(values, valid, index, self.latent_mask_token, sum(self.sizes))

    def forward(self, z: Tensor) -> Tensor:
        return self.ffn(
            self.ln_post(self.read(z, self.mask_token)).transpose(1, 2).unflatten(2, (self.grid, -1))
        )

    def read(self, z: Tensor, mask_token: Tensor) -> Tensor:
        """What becomes of the mask tokens (B, grid * grid, width), before the last norm."""
        x = torch.cat([embed(part) for embed, part in zip(self.decoder_embed, z.split(self.sizes, 1))], 1)
        x = x + _of_tokens(self.latent_token_level_embedding, self.sizes)
        x = self.ln_pre(torch.cat([x, mask_token.expand(len(x), self.grid**2, -1)], 1))
        k = sum(self.sizes)
        places = torch.cat([line_places(k), grid_places(self.grid, self.grid) + k])
        rotation = rotations(places, self.head_dim).to(x.device)
        for block in self.blocks:
            x = block(x, rotation)
        return x[:, k:]


def _embeddings(n: int, width: int) -> nn.ParameterList:
    return nn.ParameterList(torch.randn(1, width) * width**-0.5 for _ in range(n))


def _of_tokens(embeddings: nn.ParameterList, sizes: list[int]) -> Tensor:
    """The embedding of each token's level: (tokens, width)."""
    return torch.cat([embedding.expand(n, -1) for embedding, n in zip(embeddings, sizes)])


def _grid(n: int) -> tuple[int, int]:
    """The grid of 2^m tokens, as square as it gets, never higher than wide."""
    rows = 2 ** ((n.bit_length() - 1) // 2)
    return rows, n // rows
