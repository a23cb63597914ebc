"""CAT: a VAE that compresses a picture by 8, 16 or 32, as much as its content allows (arXiv:2501.03120)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Tokenizer
from ..bottlenecks import KL
from ..parts.nested import Decoder, Encoder
from ..registry import register_tokenizer
from ..sequence import TokenSequence


@register_tokenizer
class CAT(Tokenizer):
    """One VAE with several grids: 8x8, 16x16 or 32x32 tokens of a picture of 256 pixels, read row by row.

    The encoder leaves its way down at the grid asked for and goes through blocks that all grids share; the
    decoder enters its way up there. A coarse grid is no part of a finer one: a length is chosen when the
    image is encoded, by `encode(images, length)` or a policy (the paper's is a complexity score with
    thresholds: vtc.tokenizers.policies), and tokens of a longer one are never truncated to it. `index` tells
    the grid: a token takes the place of the first cell of the finest grid that it covers.

    Neither code nor weights are published, and the paper leaves sizes open. Ours: the residual blocks of the
    latent diffusion coder (arXiv:2112.10752), a residual block that matches the channels of each exit to
    those of the shared blocks, attention in the middle only. Scores come from the picture itself, not from a
    language model that reads its caption.
    """

    name = "cat"
    paper = "arXiv:2501.03120"
    ordered = False
    prefix_stable = False

    @dataclass(frozen=True)
    class Config:
        """width          channels at full resolution, which `multipliers`, one for each halving, multiply
        res_blocks     residual blocks of each resolution; the decoder has one more
        dim            numbers of a token
        ratios         pixels of a token's side, powers of two; the largest is 2^(levels - 1)
        sample         tokens are drawn from their distribution, not its mean; training wants it
        """

        image_size: int = 256
        width: int = 128
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
        res_blocks: int = 2
        dim: int = 16
        ratios: tuple[int, ...] = (8, 16, 32)
        sample: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if any(r < 2 or r & (r - 1) or c.image_size % r or r == c.image_size for r in c.ratios):
            raise ValueError(f"ratios are powers of two that divide {c.image_size} and are below it, "
                             f"not {c.ratios}")  # fmt: skip
        if max(c.ratios) != 2 ** (len(c.multipliers) - 1):
            raise ValueError(f"{len(c.multipliers)} multipliers go down to a ratio of "
                             f"{2 ** (len(c.multipliers) - 1)}, not {max(c.ratios)}")  # fmt: skip
        exits = {(c.image_size // r) ** 2: r.bit_length() - 1 for r in sorted(c.ratios, reverse=True)}
        self.level_of = exits  # tokens -> how often the picture was halved
        self.quantize = KL(c.dim, c.sample)
        widths, levels = [c.width * m for m in c.multipliers], list(exits.values())
        self.encoder = Encoder(widths, c.res_blocks, self.quantize.channels, levels)
        self.decoder = Decoder(widths, c.res_blocks + 1, self.quantize.dim, levels)

    @property
    def lengths(self) -> Sequence[int]:
        return tuple(self.level_of)

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        values = self.quantize(self.latents(images, k)).values
        lengths = torch.full((len(images),), k, device=images.device)
        return TokenSequence(values, lengths, index=self.places(k).to(images.device).expand(len(images), k))

    def latents(self, images: Tensor, k: int) -> Tensor:
        """Means and log-variances of k tokens of each image: (B, k, 2 dim)."""
        return self.encoder(images * 2 - 1, self.level_of[k]).flatten(2).transpose(1, 2)

    def decode_values(self, values: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        lengths, side = valid.sum(1), self.config.image_size
        parts, order = [values.new_empty(0, 3, side, side)], []
        for k in lengths.unique().tolist():
            own = (lengths == k).nonzero().flatten()
            if k not in self.level_of or (index[own, :k] != self.places(k).to(index)).any():
                raise ValueError(
                    f"these {k} tokens are no whole grid of {self.name}: encode the image with "
                    f"{' or '.join(map(str, self.lengths))} tokens instead of truncating"
                )
            z = values[own, :k].transpose(1, 2).unflatten(2, (math.isqrt(k), -1))  # (b, dim, h, w)
            parts.append(self.decoder(z, self.level_of[k]) / 2 + 0.5)
            order.append(own)
        return torch.cat(parts)[torch.cat(order).argsort()] if order else parts[0]

    def places(self, k: int) -> Tensor:
        """Which cells of the finest grid the k tokens of a grid take: (k,)."""
        finest, side = math.isqrt(self.max_tokens), math.isqrt(k)
        cells = torch.arange(side) * (finest // side)
        return (cells[:, None] * finest + cells).flatten()

    def draw_lengths(self, chosen: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
        """For training: the chosen length of each image (B,), but of about this share of them any one, so
        that every grid sees every kind of picture."""
        free = torch.rand(len(chosen), generator=generator) < share
        drawn = torch.tensor(self.lengths)[torch.randint(len(self.lengths), free.shape, generator=generator)]
        return torch.where(free.to(chosen.device), drawn.to(chosen.device), chosen)

    def training_loss(self, images: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Mean absolute error and KL divergence, each image at its length (B,), as `draw_lengths` gives them.

        The paper adds perceptual and adversarial losses, for which other networks are needed.
        """
        l1 = kl = images.new_zeros(())
        for k in self.check_length(lengths).unique().tolist():
            own = (lengths == k).to(images.device)
            code, share = self.quantize(self.latents(images[own], k)), own.float().mean()
            valid = torch.ones(code.values.shape[:2], dtype=torch.bool, device=images.device)
            decoded = self.decode_values(
                code.values, valid, self.places(k).to(images.device).expand_as(valid)
            )
            l1, kl = l1 + share * F.l1_loss(decoded, images[own]), kl + share * code.loss
        return {"l1": l1, "kl": kl}
