"""FlexTok: ordered registers over latents of a VAE, decoded by a rectified flow (arXiv:2502.13967)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Tokenizer
from ..bottlenecks import FSQ
from ..parts.flextok_network import DECODER, ENCODER, Decoder, Encoder
from ..parts.flextok_published import options
from ..parts.flow import Guidance, ProjectedGuidance, flow_loss, logit_normal_times, same_noise, sample
from ..parts.vae import LatentVAE
from ..registry import register_tokenizer
from ..schedules import DropSchedule
from ..sequence import TokenSequence


@register_tokenizer
class FlexTok(Tokenizer):
    """Registers that see the picture and the registers before them become codes; a flow decodes them.

    Encoding with k tokens computes k registers, which are the first k of encoding with all. The decoder
    always has all places: those without a token hold one learned vector. It generates: with few tokens a
    picture of the same meaning, not the same pixels. `decode` takes steps, guidance (1: none), projected
    (adaptive projected guidance) and seed; the noise of a seed is the same for every image.

    Departures from the official code (github.com/apple/ml-flextok): latents are the mean of the VAE's
    posterior, where it draws from it, so that codes do not change from run to run; images form a batch, where
    it packs them into one sequence; conditional and unconditional velocity are one pass; tokens are not
    masked in place. Whether and which tokens are corrupted in training is drawn for each image apart. A loss
    that compares features of the decoder with those of DINOv2 needs that network and is left out.

    The names of modules come from the configuration beside the weights, which also tells the scale of the
    latents. `published` has the sizes that the paper tells and diffusers' scale. Published weights of what
    only training used (a variance of the VAE, heads for features) are dropped.
    """

    name = "flextok"
    paper = "arXiv:2502.13967"
    weights = "research only: Apple Machine Learning Research Model licence"

    @dataclass(frozen=True)
    class Config:
        """Sizes of d18-d28. steps, guidance and projected are what `decode` uses where nothing is asked for.

        max_time         the latest time; frequencies of its embedding are times 1000 / max_time
        modulation_sets  1 for all tokens, or 2, for patches and for registers
        mup_readout      heads divide their input by width / mup_base_width (arXiv:2203.03466)
        scaling_factor   of the latents

        For training: `schedule` of a DropSchedule; how probable it is that codes of an image stay unrounded
        (drop_quantiser), that its condition is dropped, that tokens are corrupted: between the least and the
        most of corrupt_share.
        """

        image_size: int = 256
        tokens: int = 256
        levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
        patch: int = 2
        encoder_width: int = 1152
        encoder_depth: int = 18
        decoder_width: int = 1792
        decoder_depth: int = 28
        head_dim: int = 64
        mlp_ratio: float = 4.0
        encoder_positions: str = "sincos"
        decoder_positions: str = "sincos"
        token_positions: str = "learnable_sum"
        modulation_sets: int = 2
        time_frequencies: int = 256
        max_time: float = 1.0
        mup_readout: bool = False
        mup_base_width: int | None = None
        latent_channels: int = 16
        vae_channels: tuple[int, ...] = (128, 256, 512, 512)
        vae_layers: int = 2
        vae_groups: int = 32
        scaling_factor: float = 0.18215
        steps: int = 20
        guidance: float = 7.5
        projected: bool = True
        schedule: str = "pow2"
        drop_quantiser: float = 0.0
        drop_condition: float = 0.1
        corrupt: float = 0.0
        corrupt_share: tuple[float, float] = (0.0, 0.0)
        encoder_names: tuple[str, ...] = ENCODER
        decoder_names: tuple[str, ...] = DECODER

    published: ClassVar[dict[str, Config]] = {
        "EPFL-VILAB/flextok_d12_d12_in1k": Config(
            encoder_width=768, encoder_depth=12, decoder_width=768, decoder_depth=12
        ),
        "EPFL-VILAB/flextok_d18_d18_in1k": Config(decoder_width=1152, decoder_depth=18),
        "EPFL-VILAB/flextok_d18_d28_in1k": Config(),
        "EPFL-VILAB/flextok_d18_d28_dfn": Config(),
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        self.vae = LatentVAE(c.latent_channels, c.vae_channels, c.vae_layers, c.vae_groups, c.scaling_factor)
        side = self.vae.factor * c.patch
        if c.image_size % side:
            raise ValueError(f"image_size must be a multiple of {side}, not {c.image_size}")
        if c.modulation_sets not in (1, 2):
            raise ValueError(f"modulation_sets is 1 or 2, not {c.modulation_sets!r}")
        if c.mup_readout and not c.mup_base_width:
            raise ValueError("mup_readout needs mup_base_width, the width at which the heads are plain")
        self.quantize = FSQ(c.levels)
        self.drop_schedule = DropSchedule(c.schedule)
        shared = {
            "channels": c.latent_channels, "patch": c.patch, "rows": c.image_size // side, "tokens": c.tokens,
            "dim": self.quantize.dim, "head_dim": c.head_dim, "ratio": c.mlp_ratio,
            "readout_base": c.mup_base_width if c.mup_readout else None,
        }  # fmt: skip
        self.encoder = Encoder(
            c.encoder_names,
            width=c.encoder_width,
            depth=c.encoder_depth,
            positions=c.encoder_positions,
            **shared,
        )
        self.decoder = Decoder(
            c.decoder_names,
            width=c.decoder_width,
            depth=c.decoder_depth,
            positions=c.decoder_positions,
            token_positions=c.token_positions,
            modulation_sets=c.modulation_sets,
            time_frequencies=c.time_frequencies,
            max_time=c.max_time,
            **shared,
        )

    @property
    def lengths(self) -> range:
        return range(1, self.config.tokens + 1)

    @classmethod
    def outline(cls, config: Config) -> tuple[range, int]:
        return range(1, config.tokens + 1), math.prod(config.levels)  # without the VAE, which is diffusers'

    # -- images to tokens

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        code = self.quantize(self.encoder(self.latents(images), k))
        return TokenSequence.of(code.values, code.ids)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """What is encoded, and what the flow makes: (B, C, h, w)."""
        return self.vae.encode(images)

    @torch.no_grad()
    def decode_values(
        self,
        values: Tensor,
        valid: Tensor,
        index: Tensor,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        projected: bool | None = None,
        seed: int = 0,
    ) -> Tensor:
        c, b = self.config, len(values)
        scale = c.guidance if guidance is None else guidance
        condition = self.decoder.condition(values, valid, index)
        velocity = partial(self.decoder, condition=condition)
        if scale != 1:
            kind = ProjectedGuidance if (c.projected if projected is None else projected) else Guidance
            null = self.decoder.without(condition, torch.ones(b, dtype=torch.bool, device=values.device))
            velocity = partial(self._guided, kind(scale), torch.cat([condition, null]))
        side = c.image_size // self.vae.factor
        noise = same_noise(b, (c.latent_channels, side, side), seed, condition)
        return self.vae.decode(sample(velocity, noise, c.steps if steps is None else steps))

    def _guided(self, guide: Guidance, condition: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of x (B, C, h, w) from the condition and the null condition of each image (2 B, ...)."""
        velocity = self.decoder(torch.cat([x, x]), torch.cat([t, t]), condition)
        return guide(velocity[: len(x)], velocity[len(x) :])

    # -- training

    def training_loss(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`flow`: the error of the velocity at a random time, from a random number of tokens of each image.

        What the configuration says may happen to codes and condition happens. The VAE is not trained. All is
        drawn on the CPU, from `generator` where given.
        """
        c, b = self.config, len(images)
        latents = self.latents(images)
        z = self.encoder(latents, c.tokens)
        values = self._disturbed(z, generator)
        kept = self.drop_schedule.draw(c.tokens, b, generator).to(z.device)
        index = torch.arange(c.tokens, device=z.device).expand(b, -1)
        condition = self.decoder.condition(values, index < kept[:, None], index)
        condition = self.decoder.without(condition, _happens(c.drop_condition, (b,), generator).to(z.device))
        t = logit_normal_times(b, generator=generator).to(latents)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return {"flow": flow_loss(partial(self.decoder, condition=condition), latents, noise, t)}

    def _disturbed(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Values of the codes of z (B, K, 6): of some images unrounded, of some with random codes."""
        c, fsq, (b, k) = self.config, self.quantize, z.shape[:2]
        values = fsq(z).values
        if c.drop_quantiser:
            unrounded = _happens(c.drop_quantiser, (b, 1, 1), generator).to(z.device)
            values = torch.where(unrounded, fsq.bound(z) / (fsq.level // 2), values)
        if c.corrupt:
            least, most = c.corrupt_share
            share = least + (most - least) * torch.rand(b, 1, generator=generator)
            wrong = _happens(c.corrupt, (b, 1), generator) & (torch.rand(b, k, generator=generator) < share)
            codes = torch.randint(fsq.size, (b, k), generator=generator).to(z.device)
            values = torch.where(wrong.to(z.device)[..., None], fsq.lookup(codes), values)
        return values

    # -- weights

    @classmethod
    def config_from(cls, published: dict[str, Any]) -> Config | None:
        found = options(published)
        return None if found is None else cls.Config(**found)

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in state.items()}
        unused = {name.partition("out_proj.")[0] for name in state if ".out_proj." in name} | {"vae.logvar"}
        return {name: value for name, value in state.items() if not name.startswith(tuple(unused))}


def _happens(probability: float, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator) < probability
