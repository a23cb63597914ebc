from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import present
from ..bottlenecks import Code
from ..parts.distillation import Decoder, DistillationConfig, LatentDistillation, table
from ..registry import register_tokenizer
from ..sequence import TokenSequence

WEIGHTS = (2.5, 2.0, 1.5, 1.25, 1.0)  # of the iterations' losses; the last of all that follow
FOUND = {"vqgan": 0.55, "vae": 0.025}  # from which probability, or up to which error, a place is decoded well


@register_tokenizer
class ALIT(LatentDistillation):
    """Recurrent allocation: the same encoder again, with 32 more tokens each time (arXiv:2411.02393).

    Every iteration processes the earlier tokens anew, so that each length has a code of its own, and the
    first k tokens of a longer one are not trained to be a picture. Stopping at an iteration gives the code of
    running no further. `halt` chooses a length for each image by decoding after every iteration.

    Departures from the official code (github.com/ShivamDuggal4/adaptive-length-tokenizer): `halt` stops each
    image where its own error allows, not the batch where its mean does, and measures what `decode` gives,
    with values clamped to [0, 1]; replacing well decoded places of the picture by mask tokens, there a random
    part of every encoding, is off unless `mask_decoded` is set, and is then drawn from `seed`, the same for
    every image; with a VAE it replaces the places found (there it has no effect); nothing is replaced after
    the last iteration, as its authors meant; pictures are decoded from mixtures of the base's codes, as in
    the second training stage and the published weights, not from draws; the mean of the VAE's posterior, see
    `grid_coders.KLVAE`.
    """

    name = "alit"
    paper = "arXiv:2411.02393"
    ordered = False
    halts = True

    @dataclass(frozen=True)
    class Config(DistillationConfig):
        """tokens        tokens that each iteration adds
        iterations    at most
        epsilon       mean absolute error below which `halt` stops where it is not told one
        mask_decoded  whether encoding replaces places of the picture that are decoded well by mask tokens
        seed          of the noise that decides which
        """

        tokens: int = 32
        iterations: int = 8
        epsilon: float = 0.07
        mask_decoded: bool = False
        seed: int = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.tokens < 1 or self.iterations < 1:
                raise ValueError("ALIT adds 1 or more tokens in 1 or more iterations")

    published: ClassVar = {
        "alit_small_vqgan_quantized_latents.pth": Config(),
        "alit_vqgan_small_quantized_latent.pth": Config(),
        "alit_small_vqgan_continuous_latents.pth": Config(quantized=False),
        "alit_small_vae_quantized_latents.pth": Config(base="vae"),
        "alit_small_vae_continuous_latents.pth": Config(base="vae", quantized=False),
        "alit_base_vqgan_quantized_latents.pth": Config(
            encoder_width=768, encoder_depth=12, encoder_heads=12,
            decoder_width=768, decoder_depth=12, decoder_heads=12,
        ),
        "alit_semilarge_vqgan_quantized_latents.pth": Config(
            encoder_depth=16, encoder_heads=16, decoder_depth=16, decoder_heads=16
        ),
    }  # fmt: skip

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, w, d = config, config.encoder_width, config.decoder_width
        self.encoder_ln_recursive = nn.LayerNorm(w)
        self.encoder_positional_embedding = table(w, c.places + 1, w)
        self.encoder_class_embedding = table(w, 1, w)
        self.encoder_mask_token = table(w, 1, 1, w)
        self.decoder_positional_embedding = table(d, c.places + 1, d)
        self.decoder_class_embedding = table(d, 1, d)
        self.decoder.decoder_embed = nn.Linear(c.dim, d)
        self.decoder.latent_token_positional_embedding = table(d, max(self.lengths), d)
        self.latent_tokens = table(w, c.tokens, w)
        self.latent_token_positional_embedding = table(w, c.tokens, w)
        self.timestep_embedding = table(w, c.iterations, c.tokens, w)
        self.initialise()

    @property
    def lengths(self) -> range:
        c = self.config
        return range(c.tokens, c.tokens * c.iterations + 1, c.tokens)

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        *_, code = self.codes(images, k // self.config.tokens)
        return TokenSequence.of(code.values, code.ids)

    def codes(self, images: Tensor, iterations: int) -> Iterator[Code]:
        """The code after each iteration, of 1, 2, ... times `tokens` tokens."""
        latents = self.coder.encode(images)
        noise = None
        if self.config.mask_decoded:
            draw = torch.Generator().manual_seed(self.config.seed)
            # as many draws for every length, so that stopping earlier changes nothing
            shape = (self.config.iterations, 1, self.config.places)
            noise = torch.rand(shape, generator=draw).to(images.device)
        return (self.code(hidden) for hidden in self.rollout(images, latents, iterations, noise))

    def rollout(
        self, images: Tensor, latents: Tensor, iterations: int, noise: Tensor | None = None
    ) -> Iterator[Tensor]:
        """What the tokens have become after each iteration: (B, i * tokens, width).

        latents: of the base coder. noise (iterations, B or 1, N), in [0, 1): well decoded places of the
        picture are replaced where it is below the probability of their code; None: none are.
        """
        grid = F.normalize(torch.cat([latents, self.patches(images)], 2), dim=-1)  # (B, N, width)
        first = self.encoder_class_embedding.expand(len(grid), 1, -1)
        x = torch.cat([first, grid], 1) + self.encoder_positional_embedding  # (B, 1 + N, width)
        n = x.shape[1]
        fresh = self.latent_tokens + self.latent_token_positional_embedding
        for i in range(iterations):
            new = (fresh + self.timestep_embedding[i]).expand(len(x), -1, -1)
            norm = self.encoder_ln_recursive if i else self.encoder_ln_pre
            x = self.encoder(norm(torch.cat([x, new], 1)))  # (B, 1 + N + (i + 1) * tokens, width)
            yield x[:, n:]
            if noise is not None and i + 1 < iterations:
                found = self._found(x[:, n:], latents, noise[i])
                blank = self.encoder_mask_token + self.encoder_positional_embedding[1:]
                x = torch.cat([x[:, :1], torch.where(found[..., None], blank, x[:, 1:n]), x[:, n:]], 1)

    def decode_values(self, values: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        return self.picture(self._tell(values, valid, index.clamp(min=0)))

    def halt(self, images: Tensor, epsilon: float | None = None) -> TokenSequence:
        """The code of the first iteration with a mean absolute error below epsilon, else of the best.

        For each image; the batch is run for the one that needs most. Extras: `error` (B,), what is reached.
        Raises ValueError for an epsilon below 0.
        """
        images = self._checked(images)
        epsilon = self.config.epsilon if epsilon is None else epsilon
        if not epsilon >= 0:
            raise ValueError(f"epsilon is a mean absolute error, 0 or more, not {epsilon}")
        if not len(images):
            return self.encode_images(images, self.max_tokens)
        kept: list[TokenSequence] = [None] * len(images)
        best = torch.full((len(images),), torch.inf, device=images.device)
        for code in self.codes(images, self.config.iterations):
            tokens = TokenSequence.of(code.values, code.ids)
            error = (self.decode(tokens) - images).abs().flatten(1).mean(1).to(best)
            better = (best >= epsilon) & (error < best)
            best = torch.where(better, error, best)
            for i in better.nonzero()[:, 0].tolist():
                kept[i] = tokens[i]
            if bool((best < epsilon).all()):
                break
        chosen = TokenSequence.cat(kept)
        chosen.extras["error"] = best
        return chosen

    def training_loss(
        self, images: Tensor, generator: torch.Generator | None = None, mask_decoded: bool = True
    ) -> dict[str, Tensor]:
        """Losses to be summed: of every iteration that of the base's codes, the earlier the more it weighs.

        With a VQGAN it is their likelihood that is weighted so, and the square error of the mixture counts 1;
        with a VAE the square error of latents is. Perceptual and adversarial losses of the second training
        stage need networks of others and are not part of it.
        """
        count = self.config.iterations
        latents = self.coder.encode(images)
        noise = None
        if mask_decoded:
            shape = (count, len(images), self.config.places)
            noise = torch.rand(shape, generator=generator).to(images.device)
        losses = {}
        for i, hidden in enumerate(self.rollout(images, latents, count, noise)):
            code = self.code(hidden)
            found = self.coder.losses(self._tell_all(code.values), latents)
            weighted = "nll" if "nll" in found else "code"
            found[weighted] = found[weighted] * WEIGHTS[min(i, len(WEIGHTS) - 1)]
            losses |= {f"{name}_{i}": loss for name, loss in (found | {"bottleneck": code.loss}).items()}
        return losses

    def _found(self, hidden: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
        """(B, N), which places of the picture are decoded so well that they need not be looked at again."""
        told = self._tell_all(self.code(hidden).values)
        limit = FOUND[self.config.base]
        if self.config.base == "vae":
            return (told - latents).abs().mean(-1) < limit
        ids = self.coder.quantize(latents).ids
        chance = told.softmax(-1).gather(2, ids[..., None])[..., 0]
        return (noise < chance) & (chance >= limit)

    def _tell_all(self, values: Tensor) -> Tensor:
        return self._tell(values, None, torch.arange(values.shape[1], device=values.device))

    def _tell(self, values: Tensor, valid: Tensor | None, index: Tensor) -> Tensor:
        """What is told of each place of the grid, (B, N, outputs), from tokens (B, k, dim)."""
        decoder: Decoder = self.decoder
        tokens = decoder.decoder_embed(values) + decoder.latent_token_positional_embedding[index]
        grid = self.decoder_mask_token.expand(1, self.config.places, -1)
        grid = torch.cat([self.decoder_class_embedding[None], grid], 1) + self.decoder_positional_embedding
        grid = grid.expand(len(values), -1, -1)  # (B, 1 + N, width)
        return decoder(grid, tokens, present(grid.shape[1], valid))[:, 1:]
