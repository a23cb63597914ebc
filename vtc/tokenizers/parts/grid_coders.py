"""The frozen coders of one token for each 16 x 16 pixels from which KARL and ALIT distil theirs.

Both take pictures with values in [0, 1] and give tokens in reading order, (B, N, dim). A decoder of 1D tokens
tells `outputs` numbers for each place; `code` makes latents of them, and `losses` compares them with the
picture's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bottlenecks import VQ
from . import kl_vae, maskgit


class VQGAN(nn.Module):
    """MaskGIT's VQGAN (arXiv:2202.04200) in the layout of MAGE (arXiv:2211.09117), whose weights these are.

    Of each place the logits of the codes are told, and a softmax mixes the codebook's entries. `encode` gives
    latents before they are quantised.
    """

    def __init__(
        self,
        hidden: int = 128,
        multipliers: Sequence[int] = maskgit.MULTIPLIERS,
        dim: int = 256,
        codes: int = 1024,
    ) -> None:
        super().__init__()
        self.dim, self.outputs = dim, codes
        self.encoder = maskgit.Encoder(hidden, multipliers, z_channels=dim)
        self.decoder = maskgit.Decoder(hidden, multipliers, z_channels=dim)
        self.quantize = VQ(codes, dim)

    def encode(self, images: Tensor) -> Tensor:
        return _tokens(self.encoder(images))

    def code(self, told: Tensor) -> Tensor:
        # the codebook learns nothing from being mixed
        return told.softmax(-1) @ self.quantize.embedding.weight.detach()

    def losses(self, told: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """`nll`, the mean negative log-likelihood of the picture's codes; `code`, the mean square error."""
        found = self.quantize(latents)
        code = F.mse_loss(self.code(told), self.quantize.lookup(found.ids).detach())
        return {"nll": F.cross_entropy(told.flatten(0, 1), found.ids.flatten()), "code": code}

    def decode(self, code: Tensor) -> Tensor:
        return self.decoder(_grid(code))

    @staticmethod
    def rename(name: str) -> str:
        """What `maskgit` calls a parameter of MAGE: two blocks and a convolution are named otherwise."""
        name = name.replace("mid.block_1.", "mid.0.").replace("mid.block_2.", "mid.1.")
        return name.replace(".upsample.conv.", ".upsample_conv.")


class KLVAE(nn.Module):
    """The KL-VAE of latent diffusion (arXiv:2112.10752) with 16 channels, of which MAR has weights.

    Of each place the latent is told. As in KARL and ALIT it is multiplied by 0.2325 where it is encoded and
    not divided where it is decoded, and pictures are not brought to [-1, 1]: their checkpoints carry a VAE
    that was trained on so. Departure: the mean of the posterior instead of a draw, so that a picture has one
    code.
    """

    scale = 0.2325

    def __init__(
        self, hidden: int = 128, multipliers: Sequence[int] = kl_vae.MULTIPLIERS, dim: int = 16
    ) -> None:
        super().__init__()
        self.dim = self.outputs = dim
        self.encoder = kl_vae.Encoder(hidden, multipliers, dim)
        self.decoder = kl_vae.Decoder(hidden, multipliers, dim)
        self.quant_conv = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.post_quant_conv = nn.Conv2d(dim, dim, 1)

    def encode(self, images: Tensor) -> Tensor:
        mean, _ = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return _tokens(mean * self.scale)

    def code(self, told: Tensor) -> Tensor:
        return told

    def losses(self, told: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """`code`, the mean square error."""
        return {"code": F.mse_loss(told, latents)}

    def decode(self, code: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(_grid(code)))

    @staticmethod
    def rename(name: str) -> str:
        return name


GridCoder = VQGAN | KLVAE


def _tokens(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)  # (B, N, dim)


def _grid(tokens: Tensor) -> Tensor:
    side = round(tokens.shape[1] ** 0.5)
    return torch.unflatten(tokens.transpose(1, 2), 2, (side, side))  # (B, dim, side, side)
