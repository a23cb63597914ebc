from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import blocks, causal_last, initialise, present, run
from ..base import Tokenizer, register_tokenizer
from ..bottlenecks import FSQ, KL, VQ, Bottleneck, Continuous
from ..sequence import TokenSequence


@register_tokenizer
class Ordered(Tokenizer):
    """Registers that read the picture in order, each the ones before it: exact prefixes and a halting head.

    The tokenizer of this project, made of published parts: the blocks of TiTok (arXiv:2406.07550); registers
    that are causal among themselves, so that k tokens are computed by k registers (FlexTok,
    arXiv:2502.13967); tails that are cut off in training and in use (One-D-Piece, arXiv:2501.10064); an error
    asked for, at which tokens stop (KARL, arXiv:2507.07995). There is no frozen base tokenizer: pixels in,
    pixels out.

    So that little training goes far, there is a linear code under it. Each token starts as a few components
    of the picture's thumbnail, and the decoder starts from the draft that these give; registers and decoder
    add to that. `start_from` makes them principal components.

    The halting head differs from KARL's. After each token it tells a logistic distribution of the logarithm
    of the error (root mean square, pixels in [0, 1]) that decoding the tokens so far leaves, so that one head
    serves every epsilon, and a smaller epsilon never gets fewer tokens. Its labels are the errors themselves,
    which a small decoder gives in training for nothing.
    """

    name = "ordered"
    paper = "arXiv:2502.13967, arXiv:2501.10064, arXiv:2507.07995"
    weights = "ours, Apache-2.0: models/tiny-tokenizer"
    halts = True

    @dataclass(frozen=True)
    class Config:
        """bottleneck is "fsq" with `levels`, "vq" with `codes` of `dim` numbers, "kl" or "none" with `dim`.

        epsilon and confidence are what `halt` uses where nothing is asked for: it stops at the first token
        after which the error is at most epsilon with that probability.
        """

        image_size: int = 48
        patch: int = 6
        thumbnail: int = 16
        tokens: int = 64
        width: int = 256
        heads: int = 4
        ratio: float = 3.0
        encoder_depth: int = 3
        decoder_depth: int = 3
        bottleneck: str = "fsq"
        levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
        codes: int = 4096
        dim: int = 12
        epsilon: float = 0.06
        confidence: float = 0.5

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.image_size % c.patch or c.width % c.heads:
            raise ValueError("patch must divide image_size, and heads must divide width")
        self.grid = c.image_size // c.patch
        n, w, small = self.grid**2, c.width, 3 * c.thumbnail**2
        self.quantize = _bottleneck(c)
        dim = self.quantize.dim
        self.mean = nn.Parameter(torch.full((small,), 0.5))
        self.analysis = nn.Parameter(torch.randn(small, c.tokens * dim) * small**-0.5)
        self.synthesis = nn.Parameter(torch.randn(c.tokens * dim, small) * 0.01)
        self.patch_embed = nn.Conv2d(3, w, c.patch, c.patch)
        self.patch_position = nn.Parameter(torch.randn(n, w) * 0.02)
        self.registers = nn.Parameter(torch.randn(c.tokens, w) * 0.02)
        self.from_linear = nn.Linear(dim, w)
        self.encoder = blocks(w, c.encoder_depth, c.heads, c.ratio)
        self.encoder_norm = nn.LayerNorm(w)
        self.to_latent = nn.Linear(w, self.quantize.channels)
        self.halting = nn.Sequential(nn.Linear(w, w), nn.GELU(), nn.Linear(w, 2))
        self.from_latent = nn.Linear(dim, w)
        self.token_position = nn.Parameter(torch.randn(c.tokens, w) * 0.02)
        self.draft_embed = nn.Conv2d(3, w, c.patch, c.patch)
        self.draft_position = nn.Parameter(torch.randn(n, w) * 0.02)
        self.decoder = blocks(w, c.decoder_depth, c.heads, c.ratio)
        self.decoder_norm = nn.LayerNorm(w)
        self.to_pixels = nn.Linear(w, 3 * c.patch**2)
        initialise(self)
        # the linear part alone is what a fresh tokenizer does
        nn.init.zeros_(self.to_latent.weight)
        nn.init.zeros_(self.to_pixels.weight)

    @property
    def lengths(self) -> range:
        return range(1, self.config.tokens + 1)

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        code = self.quantize(self.latents(*self.read(images, k)))
        return TokenSequence.of(code.values, code.ids)

    def read(self, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """What the first k registers have read (B, k, width), and their linear part (B, k, dim)."""
        linear = self._components(images)[:, :k]  # (B, k, dim)
        x = self.patch_embed(images * 2 - 1).flatten(2).transpose(1, 2) + self.patch_position  # (B, N, width)
        n = x.shape[1]
        x = torch.cat([x, self.registers[:k] + self.from_linear(linear)], 1)  # (B, N + k, width)
        x = run(self.encoder, x, causal_last(n, k, x.device))
        return self.encoder_norm(x[:, n:]), linear

    def latents(self, hidden: Tensor, linear: Tensor) -> Tensor:
        """What the bottleneck is given: (B, k, channels)."""
        latent = self.to_latent(hidden)
        return latent + F.pad(linear, (0, latent.shape[-1] - linear.shape[-1]))

    def decode_values(self, values: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        c, n = self.config, self.grid**2
        place = index.clamp(min=0)
        tokens = self.from_latent(values) + self.token_position[place]  # (B, k, width)
        draft = self._draft(values * valid[..., None], place)  # (B, 3, H, W)
        x = self.draft_embed(draft * 2 - 1).flatten(2).transpose(1, 2) + self.draft_position
        x = run(self.decoder, torch.cat([x, tokens], 1), present(n, valid))  # (B, N + k, width)
        x = self.to_pixels(self.decoder_norm(x[:, :n])).transpose(1, 2)  # (B, 3 * patch * patch, N)
        return draft + F.pixel_shuffle(x.unflatten(2, (self.grid, self.grid)), c.patch)

    def _components(self, images: Tensor) -> Tensor:
        """The linear part of all tokens: (B, tokens, dim)."""
        side = self.config.thumbnail
        small = F.interpolate(images, (side, side), mode="area").flatten(1)
        return ((small - self.mean) @ self.analysis).unflatten(1, (self.config.tokens, -1))

    def _draft(self, values: Tensor, place: Tensor) -> Tensor:
        """The linear part of decoding: a blurred picture (B, 3, H, W) from values (B, k, dim), which are zero
        where there is no token."""
        c = self.config
        every = values.new_zeros(len(values), c.tokens, values.shape[2])
        every = every.scatter_add(1, place[..., None].expand_as(values), values)
        small = self.mean + every.flatten(1) @ self.synthesis
        small = small.view(-1, 3, c.thumbnail, c.thumbnail)
        return F.interpolate(small, (c.image_size, c.image_size), mode="bicubic")

    @torch.no_grad()
    def start_from(self, images: Tensor, gain: float = 0.5) -> None:
        """Makes the linear part the principal components of the thumbnails of images (n, 3, H, W), the
        largest first: of all linear codes the one whose first k numbers leave the least error, for every k.

        gain: the standard deviation of each component in front of the bottleneck. Components beyond what the
        images or thumbnails have are zero.
        """
        c = self.config
        small = F.interpolate(images, (c.thumbnail, c.thumbnail), mode="area").flatten(1)
        self.mean.copy_(small.mean(0))
        variance, basis = torch.linalg.eigh(torch.cov(small.T))  # ascending
        most = min(c.tokens * self.quantize.dim, len(images) - 1, len(variance))
        basis, spread = basis.flip(1)[:, :most], variance.flip(0)[:most].clamp(min=1e-6).sqrt()
        for part in (self.analysis, self.synthesis):
            part.zero_()
        self.analysis[:, :most] = basis / spread * gain
        linear = self._components(images)
        latent = self.latents(linear.new_zeros(*linear.shape[:2], c.width), linear)
        values = self.quantize(latent).values.flatten(1)[:, :most]  # (n, most)
        wanted = (small - self.mean) @ basis
        scale = (values * wanted).sum(0) / values.square().sum(0).clamp(min=1e-6)
        self.synthesis[:most] = scale[:, None] * basis.T

    def foretell(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of log error after each token, from what registers have read: two (B, k)."""
        location, scale = self.halting(hidden).float().unbind(-1)
        return location + math.log(0.1), F.softplus(scale) + 0.01

    def halt(
        self, images: Tensor, epsilon: float | None = None, confidence: float | None = None
    ) -> TokenSequence:
        """Tokens up to the first after which the root mean square error is at most epsilon, probably.

        confidence: how probably, between 0 and 1. All tokens where it is never so. Extras: `error` (B, K),
        the foretold median error after each token. Raises ValueError for an epsilon that is not positive.
        """
        self._check_images(images)
        epsilon = self.config.epsilon if epsilon is None else epsilon
        confidence = self.config.confidence if confidence is None else confidence
        if not epsilon > 0 or not 0 < confidence < 1:
            raise ValueError(
                f"epsilon is positive and confidence between 0 and 1, not {epsilon} and {confidence}"
            )
        hidden, linear = self.read(images, self.max_tokens)
        location, scale = self.foretell(hidden)
        enough = (math.log(epsilon) - location) / scale >= math.log(confidence / (1 - confidence))
        enough[:, -1] = True
        code = self.quantize(self.latents(hidden, linear))
        tokens = TokenSequence.of(code.values, code.ids, error=location.exp())
        return tokens.truncate(enough.int().argmax(1) + 1)

    def training_loss(self, images: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Losses to be summed, where image i is decoded from its first lengths[i] tokens: `reconstruction`,
        the mean log of the mean square error, so that a decibel counts the same at every length; the
        bottleneck's; `halting`, the likelihood of the errors, of which nothing but the halting head learns.

        Let some of the lengths be full in every step: nested dropout alone costs quality there.
        """
        hidden, linear = self.read(images, self.max_tokens)
        code = self.quantize(self.latents(hidden, linear))
        tokens = TokenSequence(code.values, lengths)
        decoded = self.decode_values(tokens.values, tokens.valid, tokens.index).float()
        error = (decoded - images).square().flatten(1).mean(1).clamp(min=1e-6).log()  # (B,)
        location, scale = (
            told.gather(1, lengths[:, None] - 1)[:, 0] for told in self.foretell(hidden.detach())
        )
        distance = (0.5 * error.detach() - location) / scale
        # negative log-likelihood of a logistic distribution
        halting = distance + 2 * F.softplus(-distance) + scale.log()
        return {"reconstruction": error.mean(), "bottleneck": code.loss, "halting": halting.mean()}


def _bottleneck(c: Ordered.Config) -> Bottleneck:
    made = {
        "fsq": lambda: FSQ(c.levels),
        "vq": lambda: VQ(c.codes, c.dim, l2=True),
        "kl": lambda: KL(c.dim),
        "none": lambda: Continuous(c.dim),
    }
    if c.bottleneck not in made:
        raise ValueError(f"a bottleneck is one of {', '.join(made)}, not {c.bottleneck!r}")
    return made[c.bottleneck]()
