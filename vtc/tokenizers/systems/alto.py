from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...transformer import initialise
from ..base import Tokenizer
from ..parts import mask_losses, sam
from ..parts.latent_vit import Size, measures
from ..parts.mask_vit import (
    MODES,
    MaskDecoder,
    MaskEncoder,
    ProjectedVQ,
    adaptive_mask,
    expected_place,
    predicted_lengths,
    prefix_mask,
)
from ..parts.maskgit import MULTIPLIERS, Decoder
from ..parts.places import at_places
from ..registry import register_tokenizer
from ..sequence import TokenSequence

STAGES = ("tokens", "length")


@register_tokenizer
class ALTo(Tokenizer):
    """Segmentation masks as 1 to 32 tokens, as many as a head predicts for each (ALTo, arXiv:2505.16495).

    Images are masks (B, 3, H, W), three times the same channel. Decoding is conditioned on the picture to
    which a mask belongs: `decode(tokens, source=...)` takes SAM ViT-L's embedding of it (B, 256, 64, 64), or
    with `attach_sam` its pixels (B, 3, 1024, 1024) in [0, 1], padded to a square as the authors do. Without a
    source the mask tokens stay as they are, which the published weights have not been trained with.

    Latents are causal in the encoder; behind the misplaced latents of the published weights (`legacy_layout`)
    each token is a mixture of all of them nevertheless. Fewer tokens are the first of a full encoding.

    Departures from github.com/yayafengzi/ALToLLM: SAM is not part of the weights (theirs is Meta's, frozen).
    Edge losses are of the mean of the channels, not of their luminance. Its decoding from ids does not run;
    `tokens_of` does it. In ALToLLM a mask gets one token less than the tokenizer keeps in training; here it
    gets them all.
    """

    name = "alto"
    paper = "arXiv:2505.16495"
    weights = "Apache-2.0 (the authors' repository): alto.pth of yayafengzi/ALToLLM-8B"
    published_file = "alto.pth"
    halts = True

    @dataclass(frozen=True)
    class Config:
        """encoder, decoder   "small", "base", "large", or (width, depth, heads)
        drop_mode          what stands for tokens that are missing: "zero" values, as in training, so that the
                           embedding's bias and the position are left; "pad" for the position alone, as the
                           authors' decoder does with short sequences; "truncate" for nothing
        legacy_layout      misplaced latents, as in the published weights
        plain_scale        the length head's scores are scaled as in attention; the published ones are not
        source_channels    of the embedding of the picture
        pixel_codes        what the pixel decoder takes; the other options with `pixel_` tell its size
        """

        image_size: int = 256
        patch: int = 16
        tokens: int = 32
        encoder: Size = "large"
        decoder: Size = "large"
        codes: int = 1024
        dim: int = 12
        beta: float = 0.01
        drop_mode: str = "zero"
        legacy_layout: bool = True
        plain_scale: bool = False
        source_channels: int = 256
        pixel_codes: int = 1024
        pixel_hidden: int = 128
        pixel_multipliers: tuple[int, ...] = MULTIPLIERS
        pixel_blocks: int = 2

        def __post_init__(self) -> None:
            if self.image_size % self.patch or self.patch != 2 ** (len(self.pixel_multipliers) - 1):
                raise ValueError(
                    f"patch {self.patch} must divide image_size {self.image_size}, and be what the "
                    f"{len(self.pixel_multipliers)} levels of pixel_multipliers paint"
                )
            if self.drop_mode not in MODES:
                raise ValueError(f"drop_mode is one of {', '.join(MODES)}, not {self.drop_mode!r}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        place = (c.image_size, c.patch, c.tokens)
        width = measures(c.encoder)[0]
        self.latent_tokens = nn.Parameter(width**-0.5 * torch.randn(c.tokens, width))
        self.encoder = MaskEncoder(c.encoder, *place, c.dim, c.legacy_layout, c.plain_scale)
        self.quantize = ProjectedVQ(c.codes, c.dim, c.beta)
        self.decoder = MaskDecoder(c.decoder, *place, c.dim, c.pixel_codes, c.source_channels)
        self.pixel_decoder = Decoder(c.pixel_hidden, c.pixel_multipliers, c.pixel_blocks, c.pixel_codes)
        self._sam: tuple[nn.Module, ...] = ()

    @property
    def lengths(self) -> range:
        return range(1, self.config.tokens + 1)

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        code = self.quantize(self.encoder(images, self.latent_tokens)[0][:, :k])
        return TokenSequence.of(code.values, code.ids)

    def halt(self, images: Tensor, epsilon: float | None = None) -> TokenSequence:
        """As many tokens of each mask as the length head says. Extras: `expected` (B,), the expected place of
        the last, from 0. Raises ValueError for an epsilon, which this tokenizer does not know."""
        if epsilon is not None:
            raise ValueError("alto predicts a length, not an error: halt takes no epsilon")
        images = self._checked(images)
        latents, chances = self.encoder(images, self.latent_tokens)
        code = self.quantize(latents)
        expected = expected_place(chances) * self.max_tokens
        return TokenSequence.of(code.values, code.ids, expected=expected).truncate(predicted_lengths(chances))

    def decode_values(
        self,
        values: Tensor,
        valid: Tensor,
        index: Tensor,
        source: Tensor | None = None,
        drop_mode: str | None = None,
    ) -> Tensor:
        return self._logits(values, valid, index, source, drop_mode).sigmoid().expand(-1, 3, -1, -1)

    def mask_logits(
        self, tokens: TokenSequence, source: Tensor | None = None, drop_mode: str | None = None
    ) -> Tensor:
        """Masks before the sigmoid, between -6 and 6 where pixels are between 0 and 1: (B, 1, H, W)."""
        return self._logits(tokens.values, tokens.valid, tokens.index, source, drop_mode)

    def _logits(
        self, values: Tensor, valid: Tensor, index: Tensor, source: Tensor | None, mode: str | None
    ) -> Tensor:
        mode = mode or self.config.drop_mode
        if mode not in MODES:
            raise ValueError(f"drop_mode is one of {', '.join(MODES)}, not {mode!r}")
        zero = values.new_zeros(())
        placed, kept = (  # (B, K, dim) and (B, K, 1)
            at_places(own, valid, index, zero, self.max_tokens) for own in (values, valid[..., None])
        )
        decoded = self.decoder(placed, kept[..., 0], self._embedded(source, len(values)), mode)
        return (self.pixel_decoder(decoded).mean(1, keepdim=True) * 2 - 1) * 6

    def attach_sam(self, encoder: nn.Module) -> None:
        """Lets `source` be pixels: encoder is SAM's, a transformers `SamVisionModel`.

        Not part of this module: neither of its weights nor of what `to` moves.
        """
        self._sam = (encoder.eval(),)  # in a tuple, where torch does not see it

    def _embedded(self, source: Tensor | None, batch: int) -> Tensor | None:
        """The embedding of pixels; an embedding as it is. Raises ValueError for anything else."""
        side = 4 * self.config.image_size // self.config.patch
        wanted = (batch, self.config.source_channels, side, side)
        if source is not None and self._sam and source.shape != wanted:
            source = sam.embedding(self._sam[0], source)
        if source is not None and source.shape != wanted:
            raise ValueError(
                f"source is SAM's embedding {wanted}, or pixels after attach_sam, not {tuple(source.shape)}"
            )
        return source

    # -- training

    def begin(self, stage: str) -> None:
        """Sets what learns in a stage, as the authors do.

        "tokens": the encoder without its length head, the codebook and the transformer of the decoder.
        "length": the length head alone, started anew. Raises ValueError for another stage.
        """
        self._check_stage(stage)
        head = self.encoder.length_encoder
        self.requires_grad_(False)
        if stage == "length":
            initialise(head)
        else:
            for part in (self.encoder, self.quantize, self.decoder):
                part.requires_grad_(True)
        head.requires_grad_(stage == "length")

    def training_loss(
        self,
        images: Tensor,
        source: Tensor | None = None,
        stage: str = "tokens",
        edge_growth: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses to be summed, of masks (B, 3, H, W), in one of two stages (see `begin`).

        In "tokens" each mask keeps 1 to K tokens, all equally often; in "length" as many as the length head
        says, to which gradients pass straight through. Values of the others are zero. `reconstruction`: mean
        square error with edges up to 5 times as strong; `edges`: 0.2 times that of gradients; `bottleneck`;
        `length`: 0.01 times the expected place of the last token, the price of tokens.

        edge_growth: edges count 4 * (k / K)^edge_growth for k tokens kept. The authors' code has 0.
        """
        self._check_stage(stage)
        masks = images.mean(1, keepdim=True)
        latents, chances = self.encoder(images, self.latent_tokens)
        code = self.quantize(latents)
        if stage == "tokens":
            last = torch.randint(self.max_tokens, (len(images),), generator=generator).to(images.device)
            keep = prefix_mask(F.one_hot(last, self.max_tokens).to(images.dtype))
        else:
            keep = adaptive_mask(chances)
        tokens = TokenSequence.of(code.values * keep[..., None])
        decoded = self._logits(tokens.values, tokens.valid, tokens.index, source, "zero").sigmoid()
        emphasis = 4 * (keep.detach().sum(1) / self.max_tokens) ** edge_growth
        return {
            "reconstruction": mask_losses.edge_mse(decoded, masks, emphasis),
            "edges": 0.2 * mask_losses.edge_loss(decoded, masks, emphasis),
            "bottleneck": code.loss,
            "length": 0.01 * expected_place(chances).mean(),
        }

    def mix(self, probabilities: Tensor) -> Tensor:
        """Values of tokens of which a language model tells probabilities (B, k, codes): (B, k, dim).

        The mixture of the codebook's entries, probabilities at length 1, so that gradients reach the model;
        `mask_losses.overlap_loss` is the authors' loss of what is decoded from it, and `mask_losses.reward`
        what they maximise in the last stage.
        """
        entries = self.quantize.lookup(torch.arange(self.config.codes, device=probabilities.device))
        return F.normalize(probabilities, dim=-1) @ entries

    def _check_stage(self, stage: str) -> None:
        if stage not in STAGES:
            raise ValueError(f"a stage of training is one of {', '.join(STAGES)}, not {stage!r}")

    # -- weights

    @classmethod
    def config_from(cls, published: dict[str, Any]) -> Config | None:
        """Reads the configurations of github.com/yayafengzi/ALToLLM (config/alto.yaml)."""
        model = published.get("model")
        vq = model.get("vq_model") if isinstance(model, dict) else None
        if not isinstance(vq, dict) or "finetune_length" not in vq:
            return None
        return cls.Config(
            image_size=published["dataset"]["preprocessing"]["crop_size"],
            patch=vq["vit_enc_patch_size"],
            tokens=vq["num_latent_tokens"],
            encoder=vq["vit_enc_model_size"],
            decoder=vq["vit_dec_model_size"],
            codes=vq["codebook_size"],
            dim=vq["token_size"],
            beta=vq["commitment_cost"],
            legacy_layout=vq.get("is_legacy", True),
        )

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without SAM, which their file holds too."""
        return {name: value for name, value in state.items() if not name.startswith("sam.")}


ALTo.published = {"yayafengzi/ALToLLM-8B": ALTo.Config()}
