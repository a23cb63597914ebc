from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...transformer import initialise
from ..base import Length
from ..parts.latent_vit import LatentDecoder, Size, measures
from ..registry import register_tokenizer
from .titok import TiTok


@register_tokenizer
class TATiTok(TiTok):
    """TA-TiTok: TiTok with a decoder that is told in words what is in the picture (arXiv:2501.07730).

    Its decoder attends to the features of a caption beside the tokens, so that tokens need not say what
    words can. It takes them as `text`, the last hidden state of the text transformer of CLIP ViT-L/14-336
    behind its final norm, of all 77 places: `tokenizer.decode(tokens, text=features)`. There is no decoding
    without, as in the official code. The encoder sees no text.

    Departures from github.com/bytedance/1d-tokenizer: a VAE's tokens are its means unless `sample` is asked
    for; the unused codes that training with `clustering_vq` moves are not moved here.
    """

    name = "ta-titok"
    paper = "arXiv:2501.07730"
    weights = "Apache-2.0"

    @dataclass(frozen=True)
    class Config(TiTok.Config):
        """As of TiTok, without legacy_layout. text_length and text_dim are of the features of the caption."""

        encoder: Size = "base"
        legacy_layout: bool = False
        codes: int = 8192
        dim: int = 64
        l2: bool = False
        text_length: int = 77
        text_dim: int = 768

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.legacy_layout:
                raise ValueError("ta-titok has no legacy_layout: its decoder gives pixels")

    def _decoder(self, place: tuple[int, int, int]) -> LatentDecoder:
        return _TextAwareDecoder(self.config, place)

    def decode_values(
        self, values: Tensor, valid: Tensor, index: Tensor, text: Tensor | None = None
    ) -> Tensor:
        """text: (B, text_length, text_dim). Raises ValueError for none, and for features of another shape."""
        c = self.config
        wanted = (len(values), c.text_length, c.text_dim)
        if text is None or tuple(text.shape) != wanted:
            given = "none" if text is None else tuple(text.shape)
            raise ValueError(
                f"{self.name} decodes with a caption of each image: give text= {wanted}, not {given}, the "
                "last hidden state of the text transformer of CLIP ViT-L/14-336 behind its final norm"
            )
        return self._decoded(values, valid, index, self.decoder.read(text))

    def forward(self, images: Tensor, length: Length | None = None, text: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(images, length), text=text)


class _TextAwareDecoder(LatentDecoder):
    def __init__(self, config: TATiTok.Config, place: tuple[int, int, int]) -> None:
        super().__init__(config.decoder, *place, config.dim)
        width = measures(config.decoder)[0]
        self.text_guidance_proj = nn.Linear(config.text_dim, width)
        initialise(self.text_guidance_proj)
        scale = width**-0.5
        self.text_guidance_positional_embedding = nn.Parameter(scale * torch.randn(config.text_length, width))

    def read(self, text: Tensor) -> Tensor:
        """Text features (B, T, text_dim) as tokens of the decoder (B, T, width)."""
        text = text.to(self.text_guidance_proj.weight)
        return self.text_guidance_proj(text) + self.text_guidance_positional_embedding


def _published(size: str, tokens: int, bottleneck: str) -> TATiTok.Config:
    kind = {} if bottleneck == "vq" else {"bottleneck": "kl", "dim": 16}
    return TATiTok.Config(tokens=tokens, encoder=size, **kind)


TATiTok.published = {
    f"turkeyju/tokenizer_tatitok_{name}": _published(*size)
    for name, size in {
        "bl32_vq": ("base", 32, "vq"),
        "bl64_vq": ("base", 64, "vq"),
        "bl128_vq": ("base", 128, "vq"),
        "bl32_vae": ("base", 32, "kl"),
        "bl64_vae": ("base", 64, "kl"),
        "sl128_vae": ("small", 128, "kl"),
    }.items()
}
