"""DINOv2's class token, and its adaptation to pictures (RepTok, arXiv:2510.14630).

Names of parameters are those of DINOv2's published weights, of which `mask_token` is not used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .imagenet import Normalise


class DINOv2(nn.Module):
    """DINOv2's transformer with registers (arXiv:2304.07193, arXiv:2309.16588), as far as its class token
    goes: pictures (B, 3, H, W), normalised, to that token after the last norm (B, width).

    positions: the side of the grid of position embeddings, which is resized to the grid of the picture.
    """

    def __init__(
        self, width: int, depth: int, heads: int, patch: int = 14, positions: int = 37, registers: int = 4
    ) -> None:
        super().__init__()
        self.positions = positions
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = _embedding(1, 1, width)
        self.register_tokens = _embedding(1, registers, width)
        self.pos_embed = _embedding(1, 1 + positions**2, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, cls_token: Tensor | None = None) -> Tensor:
        """cls_token: (1, 1, width), in place of its own."""
        x = self.patch_embed["proj"](x)
        first = (self.cls_token if cls_token is None else cls_token) + self.pos_embed[:, :1]
        patches = (x + self._places(*x.shape[2:])).flatten(2).transpose(1, 2)  # (B, n, width)
        x = torch.cat([torch.cat([first, self.register_tokens], 1).expand(len(x), -1, -1), patches], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def _places(self, h: int, w: int) -> Tensor:
        """Position embeddings of a grid of patches: (1, width, h, w)."""
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self.positions, self.positions))
        if (h, w) == (self.positions, self.positions):
            return grid
        return F.interpolate(grid.float(), (h, w), mode="bicubic", antialias=True).to(grid.dtype)


class Block(nn.Module):
    """A pre-norm block with a learned scale on each branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Adapted(nn.Module):
    """DINOv2 of which only the start of the class token is learned, and a projection of its end.

    size: the pixels that DINOv2 sees; decoder: the width of the decoder, no less than DINOv2's.
    """

    def __init__(self, model: DINOv2, size: int, decoder: int) -> None:
        super().__init__()
        self.model, self.size = model.requires_grad_(False), size
        model.cls_token.requires_grad_(True)
        width = model.cls_token.shape[-1]
        self.register_buffer("frozen_cls_token", model.cls_token.detach().clone())
        self.temp_pos_embed = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.backbone = nn.ModuleDict({"fc": nn.Linear(width, decoder), "ln": nn.LayerNorm(decoder)})
        for p in self.backbone["fc"].parameters():
            nn.init.zeros_(p)
        self.normalise = Normalise()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to tokens (B, width)."""
        return self.model(self._prepared(images))

    def frozen(self, images: Tensor) -> Tensor:
        """The tokens of the encoder before it was adapted."""
        return self.model(self._prepared(images), self.frozen_cls_token)

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens (B, 1, width) to what the decoder reads, (B, 1, decoder): with zeros behind them, and a
        residual."""
        tokens = tokens + self.temp_pos_embed[0]
        residual = self.backbone["ln"](self.backbone["fc"](tokens))
        return residual + F.pad(tokens, (0, residual.shape[-1] - tokens.shape[-1]))

    def _prepared(self, images: Tensor) -> Tensor:
        # much larger pictures are averaged first, since bilinear resizing alone would skip pixels
        if (times := images.shape[-1] // self.size) > 1:
            images = F.avg_pool2d(images, times)
        images = F.interpolate(images, (self.size, self.size), mode="bilinear")
        return self.normalise(images)


def _embedding(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
