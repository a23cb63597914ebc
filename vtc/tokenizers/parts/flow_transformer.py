"""The transformer that predicts velocities for RepTok (arXiv:2510.14630): blocks of the hourglass diffusion
transformer (arXiv:2401.11605) at one resolution, with the image's token in front of its patches.

Names of parameters are those of RepTok's checkpoint. There are no biases.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class FlowTransformer(nn.Module):
    """Latents (B, channels, H, W) to velocities of that shape, given a token and the time as a vector."""

    def __init__(
        self, channels: int, width: int, depth: int, head_dim: int, conditions: int, patch: int = 2
    ) -> None:
        super().__init__()
        self.patch = patch
        numbers = channels * patch**2
        pre_proj, post_proj = nn.Module(), nn.Module()
        pre_proj.proj = _linear(numbers, width)
        post_proj.norm, post_proj.proj = RMSNorm(width), _linear(width, numbers, zero=True)
        self.mid_merge = nn.ModuleDict({"pre_proj": pre_proj, "proj": _linear(width, width)})
        self.mid_level = nn.ModuleList(Layer(width, head_dim, conditions) for _ in range(depth))
        self.mid_split = nn.ModuleDict({"post_proj": post_proj})

    def forward(self, x: Tensor, token: Tensor, condition: Tensor) -> Tensor:
        """x (B, channels, H, W); token (B, 1, width); condition (B, conditions)."""
        h, w = (side // self.patch for side in x.shape[2:])
        x = x.unflatten(3, (w, self.patch)).unflatten(2, (h, self.patch))  # (B, c, h, p, w, q)
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, h * w, p * q * c)
        x = self.mid_merge["proj"](torch.cat([token, self.mid_merge["pre_proj"].proj(x)], 1))
        middle = x.new_zeros(1, 2)  # the token is in the middle of the picture
        places = torch.cat([middle, torch.cartesian_prod(_centres(h), _centres(w)).to(x)])
        for layer in self.mid_level:
            x = layer(x, places, condition)
        split = self.mid_split["post_proj"]
        x = split.proj(split.norm(x[:, 1:])).unflatten(2, (self.patch, self.patch, -1))
        x = x.unflatten(1, (h, w)).permute(0, 5, 1, 3, 2, 4)  # (B, c, h, p, w, q)
        return x.flatten(4).flatten(2, 3)


class Layer(nn.Module):
    def __init__(self, width: int, head_dim: int, conditions: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, head_dim, conditions)
        self.ff = FeedForward(width, AdaptiveRMSNorm(width, conditions))

    def forward(self, x: Tensor, places: Tensor, condition: Tensor) -> Tensor:
        return self.ff(self.self_attn(x, places, condition), condition)


class Attention(nn.Module):
    """Attention by the cosine of queries and keys, times a learned scale for each head, of rotated places."""

    def __init__(self, width: int, head_dim: int, conditions: int) -> None:
        super().__init__()
        self.head_dim, heads = head_dim, width // head_dim
        self.norm = AdaptiveRMSNorm(width, conditions)
        self.qkv_proj = _linear(width, 3 * width)
        self.scale = nn.Parameter(torch.full((heads,), 10.0))
        self.pos_emb = nn.Module()
        self.pos_emb.register_buffer("freqs", _frequencies(heads, head_dim // 8))
        self.out_proj = _linear(width, width, zero=True)

    def forward(self, x: Tensor, places: Tensor, condition: Tensor) -> Tensor:
        """x (B, T, width); places (T, 2), rows and columns from -1 to 1."""
        qkv = self.qkv_proj(self.norm(x, condition)).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        length = self.scale.sqrt()[:, None, None]
        q, k = (part * (length * _inverse_root(part.square().sum(-1, keepdim=True))) for part in (q, k))
        angles = torch.einsum("ta,ahf->htaf", places, self.pos_emb.freqs.to(places)).flatten(2)
        q, k = _rotate(q, angles), _rotate(k, angles)
        seen = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return x + self.out_proj(seen.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """A SwiGLU MLP of three times the width (arXiv:2002.05202), with its norm and residual."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.up_proj = _linear(width, 6 * width)
        self.down_proj = _linear(3 * width, width, zero=True)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        told, gate = self.up_proj(self.norm(x, *condition)).chunk(2, -1)
        return x + self.down_proj(told * F.silu(gate))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.scale * _inverse_root(x.square().mean(-1, keepdim=True)))


class AdaptiveRMSNorm(nn.Module):
    """A norm of which a condition (B, conditions) tells the scale."""

    def __init__(self, width: int, conditions: int) -> None:
        super().__init__()
        self.linear = _linear(conditions, width, zero=True)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale = 1 + self.linear(condition)[:, None]
        return x * (scale * _inverse_root(x.square().mean(-1, keepdim=True)))


class Mapping(nn.Module):
    """What the time becomes before all layers read it: (B, width) to (B, width)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.in_norm = RMSNorm(width)
        self.blocks = nn.ModuleList(FeedForward(width, RMSNorm(width)) for _ in range(depth))
        self.out_norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


class FourierFeatures(nn.Module):
    """Cosines and sines of a time (B,) with random frequencies, kept with the weights: (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(width // 2, 1))

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * math.pi * t[:, None] * self.weight[:, 0]
        return torch.cat([angles.cos(), angles.sin()], 1)


def _frequencies(heads: int, n: int) -> Tensor:
    """From pi to almost 10 pi, evenly in their logarithm and shared out over heads: (2, heads, n)."""
    steps = torch.arange(n * heads) / (n * heads)
    return (math.pi * 10**steps).view(n, heads).T.expand(2, -1, -1).contiguous()


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns numbers i and i + n of x (B, heads, T, d) by angle i of n (heads, T, n); the others stay."""
    n = angles.shape[-1]
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _centres(n: int) -> Tensor:
    """The middles of n cells between -1 and 1."""
    return (torch.arange(n) * 2 + 1) / n - 1


def _inverse_root(x: Tensor) -> Tensor:
    return (x + EPS).rsqrt()


def _linear(start: int, width: int, zero: bool = False) -> nn.Linear:
    layer = nn.Linear(start, width, bias=False)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer
