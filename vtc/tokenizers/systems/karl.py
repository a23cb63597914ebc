from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import present
from ..parts.distillation import DistillationConfig, LatentDistillation, table
from ..registry import register_tokenizer
from ..sequence import TokenSequence

BINS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.1)
BINS += (0.12, 0.14, 0.16, 0.18, 0.2, 0.24, 0.28, 0.32, 0.38)


@register_tokenizer
class KARL(LatentDistillation):
    """Tokens that halt by themselves, told the error that is allowed, in one pass (arXiv:2507.07995).

    One pass of the encoder over [epsilon | picture | T latents] gives T tokens and for each the probability
    that it halts. Any of them may: the tokens that `halt` gives are listed by `index`, and their number
    approximates the picture's Kolmogorov complexity. Epsilon is the mean absolute error of pixels in [0, 1],
    of 19 bins: the smallest that is not below it, else the last.

    `encode(images, k)` takes T = k at the epsilon of the configuration, and nothing halts. All tokens attend
    to each other, so that encoding with k tokens is not the first k of encoding with more.

    Departures from the official code (github.com/ShivamDuggal4/karl): the mask of halted tokens is each
    image's own (there, heads of one image get the mask of another); any square picture is taken whose grid is
    at most as large as the position tables; where all tokens would halt, the one least likely to (with
    `monotone` the first) stays, since a picture needs one; the mean of the VAE's posterior, see
    `grid_coders.KLVAE`.
    """

    name = "karl"
    paper = "arXiv:2507.07995"
    halts = True

    @dataclass(frozen=True)
    class Config(DistillationConfig):
        """max_tokens   T where nothing else is asked for, and from which tokens halt
        latents      latents that have weights: the most that max_tokens can be
        grid         side of the position tables, of which the nearest entries are taken
        epsilon      where `halt` is not told one, and of `encode`
        threshold    tokens of a higher halting probability halt
        monotone     the first token that halts takes all behind it along, so that what is left is a prefix
        """

        max_tokens: int = 256
        latents: int = 512
        grid: int = 64
        epsilon: float = 0.05
        threshold: float = 0.75
        monotone: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 1 <= self.max_tokens <= self.latents:
                raise ValueError(f"max_tokens is 1 to {self.latents}, not {self.max_tokens}")
            if self.image_size // self.patch > self.grid:
                raise ValueError(f"image_size is at most {self.grid * self.patch}, not {self.image_size}")

    published: ClassVar = {
        "karl_small_vqgan_quantized_latents.pth": Config(),
        "karl_small_vqgan_continuous_latents.pth": Config(quantized=False),
        "karl_small_vae_quantized_latents.pth": Config(base="vae"),
        "karl_small_vae_continuous_latents.pth": Config(base="vae", quantized=False),
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, w, d = config, config.encoder_width, config.decoder_width
        self.encoder_positional_embedding = table(w, w, c.grid, c.grid)
        self.encoder_ln_post_halt = nn.LayerNorm(w)
        self.halting_mlp = nn.Sequential(nn.Linear(w, 512), nn.Tanh(), nn.Linear(512, 1))
        self.latent_tokens = table(w, c.latents, w)
        self.rec_loss_embeddings = nn.Parameter(torch.tensor(BINS)[:, None].repeat(1, w))
        self.decoder_positional_embedding = table(d, d, c.grid, c.grid)
        self.decoder_embed = nn.Linear(c.dim, d)
        self.decoder_latent_tokens_timestep_embed = table(d, c.latents, d)
        self.register_buffer("bins", torch.tensor(BINS), persistent=False)
        # how often training draws each bin: at first those up to 0.04 alike
        low = (torch.tensor(BINS) <= 0.04).float()
        self.register_buffer("chances", low / low.sum(), persistent=False)
        self.initialise()

    @property
    def lengths(self) -> range:
        return range(1, self.config.max_tokens + 1)

    def bin_of(self, epsilon: Tensor) -> Tensor:
        """The number of the smallest bin that is not below epsilon, else of the last."""
        return torch.searchsorted(self.bins, epsilon.to(self.bins)).clamp(max=len(BINS) - 1)

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        code = self.code(self.read(images, k, self._epsilon(images, None)))
        return TokenSequence.of(code.values, code.ids)

    def read(self, images: Tensor, k: int, epsilon: Tensor, latents: Tensor | None = None) -> Tensor:
        """What k latents have become of images at epsilon (B,): (B, k, width). latents: of the base coder."""
        latents = self.coder.encode(images) if latents is None else latents
        grid = torch.cat([self.patches(images), latents], 2)  # (B, N, width)
        grid = grid + self._positions(self.encoder_positional_embedding)
        told = self.rec_loss_embeddings[self.bin_of(epsilon)][:, None]
        own = self.latent_tokens[:k].expand(len(grid), -1, -1)
        x = torch.cat([told, grid, own], 1)  # (B, 1 + N + k, width)
        return self.encoder(self.encoder_ln_pre(x))[:, -k:]

    def halting_logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, k, width) to (B, k); a token halts where their sigmoid is above the threshold."""
        return self.halting_mlp(self.encoder_ln_post_halt(hidden))[..., 0]

    def halt(
        self, images: Tensor, epsilon: float | None = None, monotone: bool | None = None
    ) -> TokenSequence:
        """The tokens of `max_tokens` that do not halt, in one pass; at least one.

        monotone: instead of the configuration's. Extras: `halting` (B, max_tokens), each place's probability.
        Raises ValueError for an epsilon below 0.
        """
        images = self._checked(images)
        monotone = self.config.monotone if monotone is None else monotone
        hidden = self.read(images, self.max_tokens, self._epsilon(images, epsilon))
        halting = self.halting_logits(hidden).sigmoid()
        active = halting <= self.config.threshold
        if monotone:
            active = active.cumprod(1).bool()
        last = F.one_hot(halting.argmin(1) * (not monotone), self.max_tokens).bool()
        active |= last & ~active.any(1, keepdim=True)  # a picture needs a token
        code = self.code(hidden)
        lengths = active.sum(1)
        place = (~active).int().argsort(dim=1, stable=True)[:, : int(lengths.max()) if len(images) else 0]
        values = code.values.gather(1, place[..., None].expand(-1, -1, code.values.shape[2]))
        ids = None if code.ids is None else code.ids.gather(1, place)
        return TokenSequence(values, lengths, ids, place, {"halting": halting})

    def decode_values(self, values: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        return self.picture(self._tell(values, valid, index.clamp(min=0)))

    def training_loss(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Losses to be summed: first it is estimated what T tokens reach, then learnt that they suffice.

        Draws T and each image's epsilon, and makes epsilons that were not reached rarer in the next steps
        (that state, `chances`, is not saved). Both phases compare the decoded grid with the base coder's;
        perceptual and adversarial losses of the second training stage need networks of others and are not
        part of it.
        """
        step = max(1, self.config.max_tokens // 16)
        counts = range(step, min(23 * step, self.config.latents) + 1, step)  # 16, 32, ... 368 of 256
        k = counts[int(torch.randint(len(counts), (), generator=generator))]
        drawn = torch.multinomial(self.chances.cpu(), len(images), replacement=True, generator=generator)
        estimate, error = self.estimate_loss(images, k, self.bins[drawn.to(self.bins.device)])
        self.chances *= torch.where(self.bins >= error.min(), 0.99, 1.0)
        self.chances /= self.chances.sum()
        return estimate | self.learn_loss(images, k, error)

    def estimate_loss(self, images: Tensor, k: int, epsilon: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of k tokens of which none is to halt, and the error (B,) that they reach."""
        latents = self.coder.encode(images)
        hidden = self.read(images, k, epsilon, latents)
        code, told = self._decoded(hidden)
        active = _halting_loss(self.halting_logits(hidden), 0.0)
        with torch.no_grad():
            error = (self.picture(told) - images).abs().flatten(1).mean(1)
        return self._named("estimate", told, latents, code.loss, active=active), error

    def learn_loss(self, images: Tensor, k: int, error: Tensor) -> dict[str, Tensor]:
        """The losses of max_tokens tokens that are told the error (B,) which k tokens reach.

        All behind the first k are to halt. The picture is decoded without those that do; as that is yes or
        no, nothing of its loss reaches the halting head.
        """
        latents = self.coder.encode(images)
        hidden = self.read(images, self.max_tokens, error, latents)
        logits = self.halting_logits(hidden)
        halting = {"active": _halting_loss(logits[:, :k], 0.0)}
        if k < self.max_tokens:
            halting["halted"] = _halting_loss(logits[:, k:], 1.0)
        code, told = self._decoded(hidden, logits.sigmoid() <= self.config.threshold)
        return self._named("learn", told, latents, code.loss, **halting)

    def _decoded(self, hidden: Tensor, active: Tensor | None = None) -> tuple:
        code = self.code(hidden)
        index = torch.arange(hidden.shape[1], device=hidden.device)
        return code, self._tell(code.values, active, index)

    def _tell(self, values: Tensor, active: Tensor | None, index: Tensor) -> Tensor:
        """What is told of each place of the grid from tokens (B, k, dim), without those not active."""
        tokens = self.decoder_embed(values) + self.decoder_latent_tokens_timestep_embed[index]
        grid = self.decoder_mask_token + self._positions(self.decoder_positional_embedding)
        grid = grid.expand(len(values), -1, -1)
        return self.decoder(grid, tokens, present(grid.shape[1], active))

    def _positions(self, embedding: Tensor) -> Tensor:
        side = self.config.image_size // self.config.patch
        return F.interpolate(embedding[None], size=(side, side)).flatten(2).transpose(1, 2)  # (1, N, width)

    def _named(self, phase: str, told: Tensor, latents: Tensor, bottleneck: Tensor, **more: Tensor) -> dict:
        losses = self.coder.losses(told, latents) | {"bottleneck": bottleneck} | more
        return {f"{phase}_{name}": loss for name, loss in losses.items()}

    def _epsilon(self, images: Tensor, epsilon: float | None) -> Tensor:
        epsilon = self.config.epsilon if epsilon is None else epsilon
        if not epsilon >= 0:
            raise ValueError(f"epsilon is a mean absolute error, 0 or more, not {epsilon}")
        return torch.full((len(images),), float(epsilon), device=images.device)


def _halting_loss(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
