"""RepTok: one continuous token, the adapted class token of a frozen DINOv2 (arXiv:2510.14630)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Tokenizer
from ..bottlenecks import Continuous
from ..parts.dinov2 import Adapted, DINOv2
from ..parts.flow import Velocity, flow_loss, logit_normal_times, same_noise, sample
from ..parts.flow_transformer import FlowTransformer, FourierFeatures, Mapping
from ..parts.vae import LatentVAE
from ..registry import register_tokenizer
from ..sequence import TokenSequence


@register_tokenizer
class RepTok(Tokenizer):
    """One continuous token: DINOv2's class token, of which only the start is learned (arXiv:2510.14630).

    From its 768 numbers a flow over the latents of a frozen VAE makes a picture that is alike in content, not
    pixel by pixel.

    Built without pretrained weights. To train one, give DINOv2's to `load_dinov2`, and to `ae.vae` those of
    stabilityai/sd-vae-ft-mse. All of the encoder but `cls_token` is frozen, and the VAE too.

    The authors' checkpoint (reptok-xl-600k-ImageNet.ckpt, at github.com/CompVis/RepTok) holds a generator
    beside it; `from_pretrained` takes this tokenizer out of it, with the repository's
    configs/model/reptok.yaml beside it as config.yaml, or with options. Of the frozen copy of DINOv2 only the
    class token is kept. Left out is what changes nothing: DINOv2's `mask_token`, and `new_reg`, tokens that
    are projected and thrown away. The generator, which makes tokens of classes, is no part of a tokenizer.

    Departure: noise comes from a seed and is the same for every image, whatever the batch; `seed` changes it.
    """

    name = "reptok"
    paper = "arXiv:2510.14630"
    weights = "research only: LMU licence, personal and scientific non-commercial use"

    @dataclass(frozen=True)
    class Config:
        """encoder       width, depth and heads of DINOv2; it sees `encoder_size` pixels, in patches
        positions     the side of its grid of position embeddings
        width, depth  of the flow transformer, with heads of `head_dim`
        mapping       width and depth of the network through which the time goes
        steps         Euler steps of decoding
        """

        image_size: int = 256
        encoder: tuple[int, int, int] = (768, 12, 12)
        encoder_size: int = 224
        encoder_patch: int = 14
        positions: int = 37
        registers: int = 4
        width: int = 1152
        depth: int = 28
        head_dim: int = 72
        mapping: tuple[int, int] = (1024, 2)
        latent_channels: int = 4
        vae_channels: tuple[int, ...] = (128, 256, 512, 512)
        vae_layers: int = 2
        vae_groups: int = 32
        steps: int = 50

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.width % c.head_dim or c.head_dim % 8 or c.width < c.encoder[0]:
            raise ValueError(
                "width is a multiple of head_dim, which is one of 8, and no less than the encoder's"
            )
        if c.encoder_size % c.encoder_patch or c.image_size % 2 ** len(c.vae_channels):
            raise ValueError(f"encoder_size is a multiple of {c.encoder_patch}, image_size one of "
                             f"{2 ** len(c.vae_channels)}")  # fmt: skip
        self.quantize = Continuous(c.encoder[0])
        dinov2 = DINOv2(*c.encoder, c.encoder_patch, c.positions, c.registers)
        self.encoder = nn.ModuleDict({"dino": Adapted(dinov2, c.encoder_size, c.width)})
        self.backbone = FlowTransformer(c.latent_channels, c.width, c.depth, c.head_dim, c.mapping[0])
        self.time_emb = FourierFeatures(c.mapping[0])
        self.time_in_proj = nn.Linear(c.mapping[0], c.mapping[0], bias=False)
        self.mapping = Mapping(*c.mapping)
        self.ae = LatentVAE(c.latent_channels, c.vae_channels, c.vae_layers, c.vae_groups)

    @property
    def lengths(self) -> Sequence[int]:
        return (1,)

    @classmethod
    def outline(cls, config: Config) -> tuple[tuple[int], None]:
        return (1,), None  # without the VAE, which is diffusers'

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        return TokenSequence.of(self.encoder["dino"](images)[:, None])

    def decode_values(
        self, values: Tensor, valid: Tensor, index: Tensor, steps: int | None = None, seed: int = 0
    ) -> Tensor:
        """steps: of the flow, the configuration's where None; seed: of the noise it starts from."""
        side = self.config.image_size // self.ae.factor
        noise = same_noise(len(values), (self.config.latent_channels, side, side), seed, values)
        steps = self.config.steps if steps is None else steps
        return self.ae.decode(sample(self.velocities(values), noise, steps))

    def velocities(self, values: Tensor) -> Velocity:
        """The flow's model for tokens (B, 1, 768): latents (B, C, h, w) and times (B,) to velocities."""
        token = self.encoder["dino"].project(values)

        def model(x: Tensor, t: Tensor) -> Tensor:
            return self.backbone(x, token, self.mapping(self.time_in_proj(self.time_emb(t.to(x)))))

        return model

    def training_loss(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`flow`, the squared error of velocities at random times, and `cosine`, how far tokens are from
        those of the encoder as it was: 1 - cos. The paper adds them up with a weight on the second."""
        tokens = self.encoder["dino"](images)
        with torch.no_grad():
            frozen = self.encoder["dino"].frozen(images)
            data = self.ae.encode(images, sample=True, generator=generator)
        noise = torch.randn(data.shape, generator=generator).to(data)
        t = logit_normal_times(len(data), generator=generator).to(data)
        flow = flow_loss(self.velocities(tokens[:, None]), data, noise, t)
        return {"flow": flow, "cosine": (1 - F.cosine_similarity(tokens, frozen)).mean()}

    def load_dinov2(self, state: dict[str, Tensor]) -> None:
        """Starts from DINOv2's published weights (dinov2_vitb14_reg4_pretrain.pth). Raises RuntimeError for
        weights of another size."""
        dino = self.encoder["dino"]
        dino.model.load_state_dict({name: value for name, value in state.items() if name != "mask_token"})
        dino.frozen_cls_token.copy_(dino.model.cls_token.detach())

    @classmethod
    def config_from(cls, published: dict[str, Any]) -> Config | None:
        model = published.get("model", {})
        if not str(model.get("_target_", "")).endswith("RepTokLatentRF2D"):
            return None
        level, dino = model["backbone"]["main_level"], model["encoder"]["dino"]
        if dino["model_version"] != "dinov2_vitb14_reg" or dino["target_key"] != "x_norm_clstoken":
            raise ValueError(
                f"RepTok reads the class token of dinov2_vitb14_reg, not {dino['model_version']}"
            )
        return cls.Config(
            image_size=model["val_shape"][1] * 8,
            encoder_size=dino["model_size"],
            width=level["width"],
            depth=level["depth"],
            head_dim=level["layer_params"]["d_head"],
            mapping=(model["mapping"]["width"], model["mapping"]["depth"]),
            latent_channels=model["backbone"]["in_features"],
        )

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        inner, dino = "first_stage.decoder.decoder.", "encoder.dino."
        if any(name.startswith(inner) for name in state):
            state = {name[len(inner) :]: value for name, value in state.items() if name.startswith(inner)}
        state = {
            name.replace(f"{dino}target_model.cls_token", f"{dino}frozen_cls_token"): value
            for name, value in state.items()
        }
        unused = (f"{dino}target_model.", f"{dino}new_reg", f"{dino}model.mask_token")
        return {
            name.replace("ae.ae.", "ae.vae.", 1) if name.startswith("ae.") else name: value
            for name, value in state.items()
            if not name.startswith(unused)
        }
