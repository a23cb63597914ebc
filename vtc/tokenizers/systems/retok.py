from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import initialise, present
from ..base import Tokenizer
from ..parts.gigatok import Painter, Reader, RotatedVQ
from ..parts.gigatok_pixels import PixelDecoder, PixelEncoder
from ..registry import register_tokenizer
from ..schedules import DropSchedule
from ..sequence import TokenSequence

# width, depth, heads
SIZES = {
    "tiny": (256, 4, 4),
    "small": (512, 6, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
}
USES = ("discard", "omit", "keep")


@register_tokenizer
class ReTok(Tokenizer):
    """Redundant tokens behind the tail, so that nested dropout reaches all of it (ReToK, arXiv:2601.01535).

    Queries that start as averages of the picture, coarse to fine, read a convolutional encoder's map
    (GigaTok, arXiv:2504.08736). M queries more, which start like the last M, stand behind the N tokens. In
    training the first k of all N + M are kept, so that the last of the N is kept in (M + 1) / (N + M) of the
    steps, not 1 / N. In use the M are computed and thrown away: the others attend to them, and without them
    would be others. So `prefix_stable` is False; with the option `causal`, which needs weights trained so, it
    is True, and queries that are not asked for are not computed.

    The authors' training code is not published. Where the paper is silent, losses are GigaTok's, and the
    weight of `semantic_loss` falls linearly with the number of tokens. Perceptual and adversarial losses need
    other networks and are the caller's. Their codebook's usage counter and the drop-out probability 0 are
    left out.
    """

    name = "retok"
    paper = "arXiv:2601.01535"
    weights = "no licence; on the authors' Google Drive, see github.com/zfu006/ReTok"
    prefix_stable = False

    @dataclass(frozen=True)
    class Config:
        """channels, multipliers and z_channels are of the convolutional coder (see
        vtc.tokenizers.parts.gigatok_pixels), encoder and decoder width, depth and heads of the transformers.

        tokens         a power of two
        padding        how many redundant ones stand behind them
        padding_use    "discard": encode with them and throw them away; "omit": encode without; "keep":
                       have them as tokens too
        causal         queries attend to none behind them
        semantic_depth the block of the decoder of which features are aligned with frozen ones of
                       `semantic_dim` numbers; None: no head for it
        """

        image_size: int = 256
        channels: int = 128
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
        z_channels: int = 256
        encoder: tuple[int, int, int] = SIZES["small"]
        decoder: tuple[int, int, int] = SIZES["base"]
        tokens: int = 256
        padding: int = 224
        padding_use: str = "discard"
        causal: bool = False
        codes: int = 16384
        dim: int = 8
        semantic_depth: int | None = 3
        semantic_dim: int = 768

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        _check(c)
        grid = _grid(c)
        self.prefix_stable = c.causal
        self.encoder = PixelEncoder(c.channels, c.multipliers, c.z_channels)
        self.s2to1encoder = Reader(c.encoder, c.z_channels, grid, c.tokens, c.padding, c.causal)
        self.quant_conv = nn.Conv2d(c.z_channels, c.dim, 1)
        self.post_quant_conv = nn.Conv2d(c.dim, c.z_channels, 1)
        inner = None if c.semantic_depth is None else (c.semantic_depth, c.semantic_dim)
        self.s1to2decoder = Painter(c.decoder, c.z_channels, grid, c.tokens, c.padding, inner)
        self.decoder = PixelDecoder(c.channels, c.multipliers, c.z_channels)
        self.quantize = RotatedVQ(c.codes, c.dim)
        initialise(self)

    @property
    def lengths(self) -> range:
        c = self.config
        return range(1, c.tokens + (c.padding if c.padding_use == "keep" else 0) + 1)

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        c = self.config
        queries = k if c.causal else c.tokens + (0 if c.padding_use == "omit" else c.padding)
        code = self.quantize(self.read(self.encoder(images * 2 - 1), queries)[:, :k])
        return TokenSequence.of(code.values, code.ids)

    def read(self, grid: Tensor, n: int) -> Tensor:
        """The latents of the first n queries from the encoder's map (B, z_channels, h, w): (B, n, dim)."""
        latents = self.s2to1encoder(grid, n)  # (B, z_channels, n)
        return self.quant_conv(latents[:, :, None])[:, :, 0].transpose(1, 2)

    def decode_values(self, values: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        return self.decoder(self.paint(values, valid, index)[0]) / 2 + 0.5

    def paint(self, values: Tensor, valid: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The map that the convolutional decoder takes (B, z_channels, h, w), and the features to be aligned
        (B, h * w, semantic_dim)."""
        values = values.to(self.post_quant_conv.weight.dtype).transpose(1, 2)  # (B, dim, k)
        tokens = self.post_quant_conv(values[:, :, None])[:, :, 0].transpose(1, 2)
        return self.s1to2decoder(tokens, index, present(0, valid))

    def training_loss(
        self, images: Tensor, features: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses to be summed, where each image keeps the first k of N + M tokens, every k equally often.

        `reconstruction`: mean square error of pixels in [-1, 1]; `bottleneck`: of the codebook; `map`: mean
        square error of the decoder's map from the encoder's, which GigaTok leaves out after 15,000 steps;
        where features are given, `semantic` times GigaTok's 0.5.
        """
        c = self.config
        lengths = DropSchedule("uniform").draw(c.tokens + c.padding, len(images), generator).to(images.device)
        grid = self.encoder(images * 2 - 1)
        code = self.quantize(self.read(grid, c.tokens + c.padding))
        tokens = TokenSequence(code.values, lengths)
        painted, inner = self.paint(tokens.values, tokens.valid, tokens.index)
        losses = {
            "reconstruction": F.mse_loss(self.decoder(painted), images * 2 - 1),
            "bottleneck": code.loss,
            "map": F.mse_loss(painted, grid.detach()),
        }
        if features is not None:
            losses["semantic"] = 0.5 * self.semantic_loss(inner, features, lengths)
        return losses

    def semantic_loss(self, inner: Tensor | None, features: Tensor, lengths: Tensor) -> Tensor:
        """Hierarchical semantic regularisation: the mean cosine distance of `paint`'s features from frozen
        ones (B, h * w, semantic_dim), such as DINOv2's patch tokens, weighted by 1 - k / (N + M) for k tokens
        kept, so that short prefixes are meanings and long ones free for detail.

        Raises ValueError where the tokenizer has no head for it, or features are of another shape.
        """
        if inner is None or inner.shape != features.shape:
            wanted = "semantic_depth is None" if inner is None else f"they must be {tuple(inner.shape)}"
            raise ValueError(f"features {tuple(features.shape)} cannot be aligned: {wanted}")
        distance = 1 - F.cosine_similarity(inner, features, dim=-1)  # (B, h * w)
        weight = 1 - lengths / (self.config.tokens + self.config.padding)
        return (weight[:, None] * distance).mean()

    @classmethod
    def config_from(cls, published: dict[str, Any]) -> Config | None:
        model = published.get("model")
        if not isinstance(model, dict) or model.get("model_cls") != "VQVitModelPlus":
            return None
        args = model["init_args"]
        tokens = args["num_latent_tokens"]
        return cls.Config(
            multipliers=tuple(args["encoder_ch_mult"]),
            z_channels=args["z_channels"],
            encoder=SIZES[args["encoder_size"]],
            decoder=SIZES[args["decoder_size"]],
            tokens=tokens,
            padding=tokens - 32,
            codes=args["codebook_size"],
            dim=args["codebook_embed_dim"],
            semantic_depth=args["distill_depth"],
            semantic_dim=args.get("out_inner_dim", 768),
        )

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the counter of the codebook's usage."""
        return {name: value for name, value in state.items() if name != "quantize.codebook_used"}


def _grid(c: ReTok.Config) -> int:
    """The side of the map."""
    return c.image_size // 2 ** (len(c.multipliers) - 1)


def _check(c: ReTok.Config) -> None:
    grid, wrong = _grid(c), None
    if c.image_size % 2 ** (len(c.multipliers) - 1) or grid & (grid - 1):
        wrong = f"the map must be a power of two wide, not {c.image_size} / 2^{len(c.multipliers) - 1}"
    elif c.tokens & (c.tokens - 1) or not 2 <= c.tokens <= 2 * grid**2:
        wrong = f"tokens must be a power of two from 2 to {2 * grid**2}, not {c.tokens}"
    elif not 0 <= c.padding <= c.tokens:
        wrong = f"padding must be 0 to {c.tokens}, not {c.padding}"
    elif c.padding_use not in USES:
        wrong = f"padding_use must be one of {', '.join(USES)}, not {c.padding_use!r}"
    elif c.semantic_depth is not None and not 1 <= c.semantic_depth <= c.decoder[1]:
        wrong = f"semantic_depth must be a block of the decoder, 1 to {c.decoder[1]}, or None"
    if wrong:
        raise ValueError(wrong)
