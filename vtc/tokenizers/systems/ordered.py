from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import blocks, causal_last, initialise, present, run
from ..base import Tokenizer
from ..bottlenecks import FSQ, KL, VQ, Bottleneck, Continuous
from ..parts.linear_code import LinearCode
from ..parts.places import at_places
from ..registry import register_tokenizer
from ..sequence import TokenSequence

LEAST = 0.002  # a share of wrong pixels below this counts as none


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

    The halting head differs from KARL's. The error is the share of wrong pixels: those of which a channel is
    off by more than `tolerance`. After each token the head tells a logistic distribution of its logarithm, so
    that one head serves every epsilon, and a smaller epsilon never gets fewer tokens. It is told what the
    registers have read, how many pixels stick out of the picture, and how wrong the draft is, which the
    encoder knows without decoding. Its labels are the errors themselves: it is trained last, when decoding a
    few lengths of every picture costs little.
    """

    name = "ordered"
    paper = "arXiv:2502.13967, arXiv:2501.10064, arXiv:2507.07995"
    weights = "ours, Apache-2.0: models/tiny-tokenizer"
    halts = True

    @dataclass(frozen=True)
    class Config:
        """bottleneck is "fsq" with `levels`, "vq" with `codes` of `dim` numbers, "kl" or "none" with `dim`.

        epsilon, a share of wrong pixels, and confidence are what `halt` uses where nothing is asked for: it
        stops at the first token after which the error is at most epsilon with that probability.
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
        tolerance: float = 0.15
        epsilon: float = 0.04
        confidence: float = 0.5

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.image_size % c.patch or c.width % c.heads:
            raise ValueError("patch must divide image_size, and heads must divide width")
        self.grid = c.image_size // c.patch
        n, w = self.grid**2, c.width
        self.quantize = _bottleneck(c)
        dim = self.quantize.dim
        self.linear = LinearCode(c.image_size, c.thumbnail, c.tokens, dim)
        self.patch_embed = nn.Conv2d(3, w, c.patch, c.patch)
        self.patch_position = nn.Parameter(torch.randn(n, w) * 0.02)
        self.registers = nn.Parameter(torch.randn(c.tokens, w) * 0.02)
        self.from_linear = nn.Linear(dim, w)
        self.encoder = blocks(w, c.encoder_depth, c.heads, c.ratio)
        self.encoder_norm = nn.LayerNorm(w)
        self.to_latent = nn.Linear(w, self.quantize.channels)
        self.halting = nn.Sequential(nn.Linear(w + 6, w), nn.GELU(), nn.Linear(w, 2))
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
        linear = self.linear.components(images)[:, :k]  # (B, k, dim)
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
        tokens = self.from_latent(values) + self.token_position[index.clamp(min=0)]  # (B, k, width)
        every = at_places(values, valid, index, values.new_zeros(()), c.tokens)  # (B, tokens, dim)
        draft = self.linear.draft(every)  # (B, 3, H, W)
        x = self.draft_embed(draft * 2 - 1).flatten(2).transpose(1, 2) + self.draft_position
        x = run(self.decoder, torch.cat([x, tokens], 1), present(n, valid))  # (B, N + k, width)
        x = self.to_pixels(self.decoder_norm(x[:, :n])).transpose(1, 2)  # (B, 3 * patch * patch, N)
        return draft + F.pixel_shuffle(x.unflatten(2, (self.grid, self.grid)), c.patch)

    def start_from(self, images: Tensor, gain: float = 0.5) -> None:
        """Makes the linear code the principal components of images (n, 3, H, W), each with a standard
        deviation of `gain` in front of the bottleneck."""

        def quantize(linear: Tensor) -> Tensor:
            hidden = linear.new_zeros(*linear.shape[:2], self.config.width)
            return self.quantize(self.latents(hidden, linear)).values

        self.linear.start_from(images, quantize, gain)

    def foretell(
        self, images: Tensor, hidden: Tensor, values: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Location and scale of the log error with `lengths` (B, m) of the tokens: two (B, m).

        hidden (B, K, width) and values (B, K, dim) are those of all tokens; later ones change nothing.
        """
        with torch.no_grad():
            off = self.linear.drafts(values.to(self.dtype), lengths) - images[:, None]  # (B, m, 3, H, W)
            size = off.square().flatten(2).mean(2).add(1e-6).log()
            plain = images - images.flatten(2).median(2).values[..., None, None]
            contrast = torch.stack([self._log_share(plain, times) for times in (0.5, 1.0, 1.5, 2.0)], -1)
            contrast = contrast[:, None].expand(-1, lengths.shape[1], -1)  # (B, m, 4)
            known = torch.cat([contrast, torch.stack([self._log_share(off), size], -1)], -1)
        read = hidden.gather(1, (lengths - 1)[..., None].expand(-1, -1, hidden.shape[2]))
        told = self.halting(torch.cat([read, known.to(read)], -1)).float()
        return contrast[..., 1] + told[..., 0], F.softplus(told[..., 1]) + 0.05

    def _log_share(self, off: Tensor, times: float = 1.0) -> Tensor:
        """Log of the share of wrong pixels, as if one in five hundred more was: (..., 3, H, W) to (...).

        times: for a tolerance that many times as large.
        """
        wrong = off.abs().amax(-3) > times * self.config.tolerance
        return (wrong.float().mean((-2, -1)) + LEAST).log()

    def halt(
        self, images: Tensor, epsilon: float | None = None, confidence: float | None = None
    ) -> TokenSequence:
        """Tokens up to the first after which the share of wrong pixels is at most epsilon, probably.

        confidence: how probably, between 0 and 1. All tokens where it is never so. Extras: `error` (B, K),
        the foretold median share after each token. Raises ValueError for an epsilon that is not positive.
        """
        images = self._checked(images)
        epsilon = self.config.epsilon if epsilon is None else epsilon
        confidence = self.config.confidence if confidence is None else confidence
        if not epsilon > 0 or not 0 < confidence < 1:
            raise ValueError(
                f"epsilon is positive and confidence between 0 and 1, not {epsilon} and {confidence}"
            )
        hidden, linear = self.read(images, self.max_tokens)
        code = self.quantize(self.latents(hidden, linear))
        every = torch.arange(1, self.max_tokens + 1, device=images.device).expand(len(images), -1)
        location, scale = self.foretell(images, hidden, code.values, every)
        enough = (math.log(epsilon + LEAST) - location) / scale >= math.log(confidence / (1 - confidence))
        enough[:, -1] = True
        error = (location.exp() - LEAST).clamp(min=0)
        return TokenSequence.of(code.values, code.ids, error=error).truncate(enough.int().argmax(1) + 1)

    def training_loss(self, images: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Losses to be summed, where image i is decoded from its first lengths[i] tokens: `reconstruction`,
        the mean log of the mean square error, so that a decibel counts the same at every length; and the
        bottleneck's.

        Let some of the lengths be full in every step: nested dropout alone costs quality there.
        """
        code = self.quantize(self.latents(*self.read(images, self.max_tokens)))
        tokens = TokenSequence(code.values, lengths)
        decoded = self.decode_values(tokens.values, tokens.valid, tokens.index).float()
        error = (decoded - images).square().flatten(1).mean(1).clamp(min=1e-6).log()  # (B,)
        return {"reconstruction": error.mean(), "bottleneck": code.loss}

    def halting_loss(self, images: Tensor, lengths: Tensor) -> Tensor:
        """How unlikely the halting head finds the errors at `lengths` (B, m); nothing else learns from it."""
        with torch.no_grad():
            hidden, linear = self.read(images, self.max_tokens)
            values = self.quantize(self.latents(hidden, linear)).values
            errors = []
            for own in lengths.unbind(1):
                tokens = TokenSequence(values, own)
                decoded = self.decode_values(tokens.values, tokens.valid, tokens.index)
                errors.append(self._log_share(decoded.float() - images))
        location, scale = self.foretell(images, hidden, values, lengths)
        distance = (torch.stack(errors, 1) - location) / scale
        # negative log-likelihood of a logistic distribution
        return (distance + 2 * F.softplus(-distance) + scale.log()).mean()


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
