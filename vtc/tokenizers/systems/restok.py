"""ResTok: levels of tokens, each the residual of the coarser ones (arXiv:2601.03955)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import initialise
from ..base import Tokenizer
from ..bottlenecks import VQ
from ..parts import maskgit
from ..parts.imagenet import Normalise
from ..parts.restok_coders import Decoder, Encoder, level_sizes
from ..registry import register_tokenizer
from ..schedules import DropSchedule
from ..sequence import TokenSequence

SIZES = {"small": (512, 6, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, depth, heads
# what the published model has, and the value that its code takes where nothing is said
BUILT = {
    "merge_tokens": (True, False), "reduction_ratio": (0.5, 0.5), "residual_image_tokens": (True, True),
    "residual_latent_tokens": (True, True), "learnable_latent_tokens": (False, False),
    "learnable_dec_image_tokens": (True, True), "multi_quant": (True, True), "vae_encoder": (True, False),
    "latent_hierarchy": (True, True), "use_l2_norm": (True, None), "is_legacy": (True, True),
    "rope_base_len": (10000, 10000),
}  # fmt: skip


@register_tokenizer
class ResTok(Tokenizer):
    """128 tokens in levels of 1, 1, 2, 4, 8, 16, 32 and 64: the first 4, 8, 16, 32, 64 or all are a picture.

    A convolutional coder makes a map of the picture, a transformer with levels on the image's side and on the
    latents' reads it (vtc.tokenizers.parts.restok_coders). Levels that are cut off are a learned token to the
    decoder.

    In the published layout the encoder's last step reads the latents' (tokens, width) numbers as (width,
    tokens) without turning them, so that each code has a part of every level: levels are causal inside the
    encoder, the codes are not. `legacy_layout=False` turns them, and codes of a level depend on no later one;
    no published weights are trained so. Its decoder ends in the same map, where the official code has pixels
    there, which it then gives to a pixel decoder of 256 channels.

    Departures: precision is that of the weights (the official pixel decoder forces CUDA's autocast off). The
    network whose features supervise training (DINOv3 ViT-L) is not part of this: give `training_loss` its
    features. Dropped from published weights: that network (`foundation_model.`), the projections to its
    features (`vf_proj.`, `vf_proj_dec.`) and the decoder's mask token for them (`decoder.feat_mask_token`).
    """

    name = "restok"
    paper = "arXiv:2601.03955"
    weights = "Apache-2.0"

    @dataclass(frozen=True)
    class Config:
        """encoder, decoder     width, depth and heads of the transformers
        tokens, min_tokens   all of them, a power of two, and the fewest that stay
        codes, dim           of the codebook
        stages               levels of image tokens in the encoder
        hidden, multipliers  channels of the convolutional coders, see vtc.tokenizers.parts.maskgit
        drop                 how often training cuts tokens off
        features             channels of the features that supervise training; 0: none do
        """

        image_size: int = 256
        encoder: tuple[int, int, int] = SIZES["large"]
        decoder: tuple[int, int, int] = SIZES["large"]
        tokens: int = 128
        min_tokens: int = 4
        codes: int = 8192
        dim: int = 8
        stages: int = 4
        hidden: int = 128
        multipliers: tuple[int, ...] = maskgit.MULTIPLIERS
        legacy_layout: bool = True
        drop: float = 0.2
        beta: float = 0.25
        features: int = 0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        factor = 2 ** (len(c.multipliers) - 1)
        if c.image_size % factor:
            raise ValueError(f"image_size is a multiple of {factor}, not {c.image_size}")
        if not 0 < c.drop <= 1:
            raise ValueError(f"drop is a share above 0 and up to 1, not {c.drop}")
        grid = c.image_size // factor
        self.pixel_encoder = maskgit.Encoder(c.hidden, c.multipliers)
        self.encoder = Encoder(c.encoder, grid, c.tokens, c.dim, c.stages, c.legacy_layout)
        self.decoder = Decoder(c.decoder, grid, c.tokens, c.dim, bool(c.features))
        self.pixel_decoder = maskgit.Decoder(c.hidden, c.multipliers)
        if c.features:
            self.vf_proj = nn.Conv2d(c.encoder[0], c.features, 1, bias=False)
            self.vf_proj_dec = nn.Conv2d(c.decoder[0], c.features, 1, bias=False)
        initialise(self)
        self.quantize = VQ(c.codes, c.dim, l2=True, beta=c.beta)
        self.normalise = Normalise()

    @property
    def lengths(self) -> Sequence[int]:
        ends = accumulate(level_sizes(self.config.tokens))
        return tuple(end for end in ends if end >= self.config.min_tokens)

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        code = self.quantize(self.latents(images)[0])
        return TokenSequence.of(code.values, code.ids).truncate(k)

    def latents(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latents before they are quantised (B, tokens, dim), and the coarsest image tokens (B, n, width)."""
        return self.encoder(self.pixel_encoder(self.normalise(images)))

    def decode_values(self, values: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        self.check_length(valid.sum(1))  # the decoder has seen whole levels only
        return self.pixel_decoder(self.decoder(self.decoder.fill(values, valid, index)))

    @property
    def schedule(self) -> DropSchedule:
        """How many tokens training keeps: all, or else each length twice as often as the one below it.

        As in the official code, all have int(1 / drop) - 1 times the weight of the others together.
        """
        shorter = [2.0**i for i in range(len(self.lengths) - 1)]
        return DropSchedule(
            "levels", self.lengths, [*shorter, sum(shorter) * (int(1 / self.config.drop) - 1)]
        )

    def training_loss(
        self,
        images: Tensor,
        features: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Squared error of the pixels and the codebook's loss, with tokens cut off; and `features`, where
        given.

        features: of a frozen network that sees the same images, its class token (B, F) and its patch tokens
        (B, F, grid, grid). The paper adds LPIPS and a discriminator, for which other networks are needed.
        """
        z, image_tokens = self.latents(images)
        code = self.quantize(z)
        kept = self.schedule.draw(z.shape[1], len(images), generator).to(images.device)
        tokens = TokenSequence.of(code.values).truncate(kept)
        filled = self.decoder.fill(tokens.values, tokens.valid, tokens.index)
        decoded = self.pixel_decoder(self.decoder(filled))
        losses = {"reconstruction": F.mse_loss(decoded, images), "bottleneck": code.loss}
        if features is not None:
            losses["features"] = self.feature_loss(filled, image_tokens, *features)
        return losses

    def feature_loss(
        self, filled: Tensor, image_tokens: Tensor, whole: Tensor, patches: Tensor, margin: float = 0.25
    ) -> Tensor:
        """How far, beyond a margin of the cosine, the encoder's coarsest image tokens are on average from the
        class token `whole` (B, F), and what the decoder makes of second mask tokens from `patches`.

        filled: (B, tokens, dim), as `decoder.fill` gives it. Raises ValueError without `features` in the
        Config.
        """
        if not self.config.features:
            raise ValueError("this tokenizer was made without features: set features to their channels")
        seen = self.vf_proj(image_tokens.transpose(1, 2)[..., None]).mean((2, 3))
        made = self.decoder.read(filled, self.decoder.feat_mask_token).transpose(1, 2)
        made = self.vf_proj_dec(made.unflatten(2, patches.shape[2:]))
        near = [F.cosine_similarity(whole, seen), F.cosine_similarity(patches, made)]
        return sum(F.relu(1 - margin - cosine).mean() for cosine in near)

    @classmethod
    def config_from(cls, published: dict[str, Any]) -> Config | None:
        model = published.get("model", {}).get("vq_model", {})
        if "hierarchy_stages" not in model:
            return None
        other = [key for key, (built, default) in BUILT.items() if model.get(key, default) != built]
        if other:
            raise ValueError(
                f"this ResTok differs from the published one in {', '.join(other)}: there is no such"
            )
        return cls.Config(
            image_size=published.get("dataset", {}).get("preprocessing", {}).get("crop_size", 256),
            encoder=SIZES[model["vit_enc_model_size"]],
            decoder=SIZES[model["vit_dec_model_size"]],
            tokens=model["num_latent_tokens"],
            min_tokens=model["num_min_tokens"],
            codes=model["codebook_size"],
            dim=model["token_size"],
            stages=model["hierarchy_stages"],
            drop=model.get("drop_prob") or cls.Config.drop,  # 0 in configurations for inference
            beta=model["commitment_cost"],
        )

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        training = ("foundation_model.", "vf_proj.", "vf_proj_dec.", "decoder.feat_mask_token")
        named = {name.removeprefix("_orig_mod."): value for name, value in state.items()}
        return {name: value for name, value in named.items() if not name.startswith(training)}


ResTok.published = {"xushu-me/restok_l_128.r256_in1k": ResTok.Config()}
