from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Tokenizer
from ..bottlenecks import KL, VQ
from ..parts import titok_config
from ..parts.latent_vit import LatentDecoder, LatentEncoder, Size, measures
from ..parts.maskgit import MULTIPLIERS, Decoder, SoftCodes
from ..registry import register_tokenizer
from ..schedules import DropSchedule
from ..sequence import TokenSequence


@register_tokenizer
class TiTok(Tokenizer):
    """TiTok: a picture as a fixed number of unordered tokens (arXiv:2406.07550).

    Latent tokens attend with the patches in a transformer and become the tokens; in a second transformer,
    mask tokens attend with those and become the picture. Weights are of two kinds. The first (L-32, B-64,
    S-128) were trained in two stages: the decoder foretells codes of MaskGIT's VQGAN, whose decoder paints
    them. They also have their latents in another layout in front of the bottleneck, of which the paper does
    not tell (see `vtc.tokenizers.parts.latent_vit.legacy_layout`). The later ones (BL, SL, LL) give pixels at
    once.

    Departures from github.com/bytedance/1d-tokenizer: a VAE's tokens are its means unless `sample` is asked
    for; a VAE may be built with `legacy_layout` too, of which there are no weights.
    """

    name = "titok"
    paper = "arXiv:2406.07550"
    weights = "Apache-2.0"
    ordered = False
    prefix_stable = False
    drop: ClassVar[DropSchedule] = DropSchedule("full")  # of tokens in training

    @dataclass(frozen=True)
    class Config:
        """encoder, decoder   "small", "base", "large", or (width, depth, heads)
        bottleneck         "vq": `codes` of `dim` numbers, at length 1 with `l2`; or "kl": `dim` numbers, the
                           mean, or with `sample` a draw
        legacy_layout      weights trained in two stages: their layout of latents, and `pixel_codes` codes
                           that the VQGAN's decoder paints, whose size the other options with `pixel_` tell
        """

        image_size: int = 256
        patch: int = 16
        tokens: int = 32
        encoder: Size = "large"
        decoder: Size = "large"
        legacy_layout: bool = True
        bottleneck: str = "vq"
        codes: int = 4096
        dim: int = 12
        l2: bool = True
        beta: float = 0.25
        sample: bool = False
        pixel_codes: int = 1024
        pixel_dim: int = 256
        pixel_hidden: int = 128
        pixel_multipliers: tuple[int, ...] = MULTIPLIERS
        pixel_blocks: int = 2

        def __post_init__(self) -> None:
            if self.image_size % self.patch:
                raise ValueError(f"patch {self.patch} does not divide image_size {self.image_size}")
            if self.bottleneck not in ("vq", "kl"):
                raise ValueError(f"a bottleneck is vq or kl, not {self.bottleneck!r}")
            if self.sample and self.bottleneck != "kl":
                raise ValueError("codes are not drawn: sample goes with bottleneck 'kl'")
            if self.legacy_layout and self.patch != 2 ** (len(self.pixel_multipliers) - 1):
                levels = len(self.pixel_multipliers)
                raise ValueError(f"the {levels} pixel_multipliers do not paint patches of {self.patch}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        place = (c.image_size, c.patch, c.tokens)
        self.quantize = VQ(c.codes, c.dim, c.l2, c.beta) if c.bottleneck == "vq" else KL(c.dim, c.sample)
        width = measures(c.encoder)[0]
        self.latent_tokens = nn.Parameter(width**-0.5 * torch.randn(c.tokens, width))
        self.encoder = LatentEncoder(c.encoder, *place, self.quantize.channels, c.legacy_layout)
        self.decoder = self._decoder(place)
        if c.legacy_layout:
            self.pixel_quantize = SoftCodes(c.pixel_codes, c.pixel_dim)
            self.pixel_decoder = Decoder(c.pixel_hidden, c.pixel_multipliers, c.pixel_blocks, c.pixel_dim)

    def _decoder(self, place: tuple[int, int, int]) -> LatentDecoder:
        c = self.config
        return LatentDecoder(c.decoder, *place, c.dim, c.pixel_codes if c.legacy_layout else None)

    @property
    def lengths(self) -> tuple[int, ...] | range:
        return (self.config.tokens,)

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        code = self.quantize(self.encoder(images, self.latent_tokens))
        ids = None if code.ids is None else code.ids[:, :k]
        return TokenSequence.of(code.values[:, :k], ids)

    def decode_values(self, values: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        decoded = self._decoded(values, valid, index)
        return self.pixel_decoder(self.pixel_quantize(decoded)) if self.config.legacy_layout else decoded

    def _decoded(self, values: Tensor, valid: Tensor, index: Tensor, context: Tensor | None = None) -> Tensor:
        """Logits of codes (B, codes, h, w) with `legacy_layout`, else the picture (B, 3, H, W)."""
        missing = set(valid.sum(1).tolist()) - set(self.lengths)
        if missing:
            raise ValueError(
                f"{self.name} decodes all {self.max_tokens} tokens of an image, not {min(missing)} of them"
            )
        return self.decoder(values, valid, index, context)

    def training_loss(
        self,
        images: Tensor,
        codes: Tensor | None = None,
        generator: torch.Generator | None = None,
        **options: Tensor,
    ) -> dict[str, Tensor]:
        """Losses to be summed, of images (B, 3, H, W): `reconstruction`, and of all tokens `bottleneck`.

        With `legacy_layout` there are two stages. In the first give `codes` (B, h, w), those of MaskGIT's
        VQGAN for the images: the reconstruction loss is their cross-entropy, and nothing is painted. In the
        second give none: it is the mean square error of pixels, only the decoders learn, and there is no
        bottleneck loss. Without `legacy_layout` all learns from the mean square error. A VAE's tokens are
        drawn, and its loss has the paper's weight of 1e-6. The paper adds perceptual and adversarial losses,
        which take networks of others.

        generator: draws how many tokens are kept, where the system drops some. options: see `decode_values`.
        """
        legacy = self.config.legacy_layout
        if codes is not None and not legacy:
            raise ValueError(
                "codes are learnt with legacy_layout: without, the tokenizer has no logits of codes"
            )
        frozen = legacy and codes is None
        gaussian = self.config.bottleneck == "kl"
        with torch.no_grad() if frozen else nullcontext():
            latents = self.encoder(images, self.latent_tokens)
            code = (KL(self.config.dim, sample=True) if gaussian else self.quantize)(latents)
        kept = self.drop.draw(self.max_tokens, len(images), generator)
        tokens = TokenSequence.of(code.values).truncate(kept)
        given = (tokens.values, tokens.valid, tokens.index)
        if codes is not None:
            reconstruction = F.cross_entropy(self._decoded(*given), codes)
        else:
            reconstruction = F.mse_loss(self.decode_values(*given, **options), images)
        weight = 0.0 if frozen else 1e-6 * self.max_tokens if gaussian else 1.0
        return {"reconstruction": reconstruction, "bottleneck": weight * code.loss}

    # -- weights

    @classmethod
    def config_from(cls, published: dict[str, Any]) -> Config | None:
        """Reads the configurations of github.com/bytedance/1d-tokenizer, and of One-D-Piece's fork of it.

        Raises ValueError for weights that do not make pictures: those after the first of two stages.
        """
        found = titok_config.read(published)
        return cls.Config(**found[1]) if found and found[0] == cls.name else None

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out `quantize.embed_prob`, how often training has used each code."""
        return {name: value for name, value in state.items() if name != "quantize.embed_prob"}


def _one_stage(size: str, tokens: int, bottleneck: str) -> TiTok.Config:
    kind = {"codes": 8192, "dim": 64, "l2": False} if bottleneck == "vq" else {"dim": 16}
    return TiTok.Config(tokens=tokens, encoder=size, legacy_layout=False, bottleneck=bottleneck, **kind)


TiTok.published = {
    f"yucornetto/tokenizer_titok_{name}_imagenet": config
    for name, config in {
        "l32": TiTok.Config(),
        "b64": TiTok.Config(tokens=64, encoder="base", decoder="base"),
        "s128": TiTok.Config(tokens=128, encoder="small", decoder="small"),
        "bl64_vq8k": _one_stage("base", 64, "vq"),
        "bl128_vq8k": _one_stage("base", 128, "vq"),
        "sl256_vq8k": _one_stage("small", 256, "vq"),
        "ll32_vae_c16": _one_stage("large", 32, "kl"),
        "bl64_vae_c16": _one_stage("base", 64, "kl"),
        "bl128_vae_c16": _one_stage("base", 128, "kl"),
    }.items()
}
